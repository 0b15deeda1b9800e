"""Which masks of Keras the rows of a call stand under: of the layer calls around it, else of the nearest before it."""

from __future__ import annotations

from collections.abc import Sequence

import keras

from kfaccore_tensorflow.capture import Scope, Scopes
from kfaccore_tensorflow.observe import Call
from kfaccore_tensorflow.uses import Operation, Tensor

Masks = dict[int, tuple[int, Tensor]]  # id of a mask -> its place among the batch's


def noted(calls: Sequence[Call], scopes: Scopes, masks: Masks) -> list[tuple[tuple[int, int | None], ...]]:
    """(place among the batch's masks, step or None) of each call of one part, the innermost first."""
    masked = [scope for scope in scopes.calls if scope.mask is not None]
    if not masked:
        return [()] * len(calls)
    within: dict[tuple[int, int], list[int]] = {}
    for i, call in enumerate(calls):
        for scope in call.scopes:
            within.setdefault((scope.start, scope.end), []).append(i)
    found = []
    for i, call in enumerate(calls):
        mine = [(scope.mask, _step(scope, within[scope.start, scope.end], i)) for scope in call.scopes]
        own = bool(call.scopes) and call.scopes[0].mask is not None
        mine = [(mask, step) for mask, step in mine if mask is not None]
        mine += [] if own else _one(_before(call, masked, scopes)) or _one(_behind(call, masked, scopes))
        found.append(tuple((masks.setdefault(id(mask), (len(masks), mask))[0], step) for mask, step in mine))
    return found


def _step(scope: Scope, calls: Sequence[int], this: int) -> int | None:
    """Which step of a layer that goes through them in order a call belongs to: each step makes as many, one step's
    behind the other's. Of other loops the gradients tell."""
    steps = None if scope.mask is None else scope.mask.shape[1]
    recurrent = isinstance(scope.layer, keras.layers.RNN)
    ordered = recurrent or isinstance(scope.layer, keras.layers.TimeDistributed)
    if not ordered or steps is None or len(calls) < 2 or len(calls) % steps:
        return None
    step = calls.index(this) // (len(calls) // steps)
    return steps - 1 - step if recurrent and scope.layer.go_backwards else step


def _one(masks: Sequence[Tensor]) -> list[tuple[Tensor, None]]:
    """The mask, if they are one and the same: of several it is not to be seen which is that of the rows."""
    found = {id(mask): mask for mask in masks}
    return [(mask, None) for mask in found.values()] if len(found) == 1 else []


def _before(call: Call, masked: Sequence[Scope], scopes: Scopes) -> list[Tensor]:
    """Masks of the nearest layer calls that a call's operand comes from."""
    waiting: list[Operation] = [x.op for x in call.use.out.op.inputs]
    seen = {op.name for op in waiting}
    found = []
    while waiting:
        op = waiting.pop()
        place = scopes.places.get(op.name, -1)
        inner = next((scope for scope in masked if scope.start <= place < scope.end), None)
        if inner is not None:
            found.append(inner.mask)
            continue
        new = [x.op for x in op.inputs if x.op.name not in seen]
        seen |= {op.name for op in new}
        waiting += new
    return found


def _behind(call: Call, masked: Sequence[Scope], scopes: Scopes) -> list[Tensor]:
    """Masks of the nearest layer calls whose input is made of a call's output."""
    inputs = {id(scope.input): scope.mask for scope in masked}
    waiting = [call.use.out]
    seen = {id(call.use.out)}
    found = []
    while waiting:
        x = waiting.pop()
        if id(x) in inputs:
            found.append(inputs[id(x)])
            continue
        ops = [op for op in x.consumers() if op.name in scopes.places]  # not those of gradients taken since
        new = [y for op in ops for y in op.outputs if id(y) not in seen]
        seen |= {id(y) for y in new}
        waiting += new
    return found
