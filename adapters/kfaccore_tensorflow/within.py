"""Which masks the rows of a call stand under: Keras's, of the layer calls around it, else of the nearest before it or
behind; where there are none of those, masks that attention layers were told, then those that operations lay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import keras

from kfaccore_tensorflow.attention import Attended
from kfaccore_tensorflow.capture import Scope, Scopes
from kfaccore_tensorflow.observe import Call
from kfaccore_tensorflow.uses import Operation, Tensor

Masks = dict[int, tuple[int, Tensor]]  # id of a mask -> its place among the batch's
Noted = tuple[tuple[tuple[int, ...], int | None], ...]


def noted(calls: Sequence[Call], scopes: Scopes, masks: Masks) -> list[Noted]:
    """(places among the batch's masks, step or None) of each call of one part, the innermost first."""
    kinds = [Known.of_keras(scopes), Known.told(scopes), Known({}, scopes.laid)]
    if not any(known.inputs for known in kinds):
        return [()] * len(calls)
    within: dict[tuple[int, int], list[int]] = {}
    for i, call in enumerate(calls):
        for scope in call.scopes:
            within.setdefault((scope.start, scope.end), []).append(i)
    found = []
    for i, call in enumerate(calls):
        nearest = next((some for known in kinds if (some := _of(call, i, known, scopes, within))), [])
        places = [
            (tuple(masks.setdefault(id(mask), (len(masks), mask))[0] for mask in some), step) for some, step in nearest
        ]
        found.append(tuple(places))
    return found


@dataclass(frozen=True)
class Known:
    """Masks of one kind: by start and end of the layer calls under them, and by id of the tensors that they are of."""

    calls: dict[tuple[int, int], tuple[Scope, list[Tensor]]]
    inputs: dict[int, list[Tensor]]

    @classmethod
    def of_keras(cls, scopes: Scopes) -> Known:
        """Those that Keras hands on."""
        found = {(one.start, one.end): (one, [one.mask]) for one in scopes.calls if one.mask is not None}
        return cls(found, {id(one.input): masks for one, masks in found.values()})

    @classmethod
    def told(cls, scopes: Scopes) -> Known:
        """Those that attention layers were called under."""
        masks = scopes.told.masks
        found = {(one.start, one.end): (one, masks[id(one.input)]) for one in scopes.calls if id(one.input) in masks}
        return cls(found, masks)


def _of(
    call: Call, this: int, known: Known, scopes: Scopes, within: dict[tuple[int, int], list[int]]
) -> list[tuple[list[Tensor], int | None]]:
    """Masks that must be one, and step or None, the innermost first."""
    around = [(scope.start, scope.end) for scope in call.scopes]
    mine = [(known.calls[key][1], _step(known.calls[key], within[key], this)) for key in around if key in known.calls]
    if not around or around[0] not in known.calls:
        near = _before(call, known, scopes) or _behind(call, known, scopes)
        mine += [(list({id(mask): mask for mask in near}.values()), None)] if near else []
    return mine


def _step(one: tuple[Scope, list[Tensor]], calls: Sequence[int], this: int) -> int | None:
    """Which step of a layer that goes through them in order a call belongs to: each step makes as many, one step's
    behind the other's. Of other loops the gradients tell."""
    scope, masks = one
    steps = masks[0].shape[1]
    recurrent = isinstance(scope.layer, keras.layers.RNN)
    ordered = recurrent or isinstance(scope.layer, keras.layers.TimeDistributed)
    if not ordered or steps is None or len(calls) < 2 or len(calls) % steps:
        return None
    step = calls.index(this) // (len(calls) // steps)
    return steps - 1 - step if recurrent and scope.layer.go_backwards else step


def _crossed(place: int, scopes: Scopes) -> Attended | None:
    """What the attention layer attends in which an operation makes rows of the query; none of one on keys alone."""
    scope = next((scope for scope in scopes.crossings if scope.start <= place < scope.end), None)
    if scope is None or _on_keys([one for one in scopes.calls if one.start <= place < one.end], [scope]):
        return None
    return scope.attended


def _on_keys(calls: Iterable[Scope], crossings: Iterable[Scope]) -> bool:
    """Whether one of the calls is on what an attention layer around it looks at."""
    return any(
        scope.start <= call.start and call.end <= scope.end and any(call.input is x for x in scope.attended.keys)
        for scope in crossings
        if scope.attended is not None
        for call in calls
    )


def _before(call: Call, known: Known, scopes: Scopes) -> list[Tensor]:
    """Masks of the nearest layer calls that a call's operand comes from."""
    waiting: list[Operation] = [x.op for x in call.use.out.op.inputs]
    seen = {op.name for op in waiting}
    found = []
    while waiting:
        op = waiting.pop()
        place = scopes.places.get(op.name, -1)
        inner = next((masks for scope, masks in known.calls.values() if scope.start <= place < scope.end), None)
        if inner is not None:
            found += inner
            continue
        across = _crossed(place, scopes)
        inputs = op.inputs if across is None else [across.query]
        new = [x.op for x in inputs if x.op.name not in seen]
        seen |= {op.name for op in new}
        waiting += new
    return found


def _behind(call: Call, known: Known, scopes: Scopes) -> list[Tensor]:
    """Masks of the nearest layer calls whose input is made of a call's output; what others look at is not theirs."""
    keys = {id(x) for scope in scopes.crossings if scope.attended is not None for x in scope.attended.keys}
    if _on_keys(call.scopes, scopes.crossings):
        return []
    waiting = [call.use.out]
    seen = {id(call.use.out)}
    found = []
    while waiting:
        x = waiting.pop()
        if id(x) in known.inputs:
            found += known.inputs[id(x)]
            continue
        if id(x) in keys:
            continue
        ops = [op for op in x.consumers() if op.name in scopes.places]  # not those of gradients taken since
        new = [y for op in ops for y in op.outputs if id(y) not in seen]
        seen |= {id(y) for y in new}
        waiting += new
    return found
