"""All uses of a model's variables in a traced forward pass, followed from each variable operation by operation.

What gradients of the prediction reach is followed and nothing else: a regulariser, a metric or what is behind
`tf.stop_gradient` is no use.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Any

import tensorflow as tf

from kfaccore_tensorflow.halves import halves
from kfaccore_tensorflow.kinds import Convolution, Lookup
from kfaccore_tensorflow.layout import Layout
from kfaccore_tensorflow.moves import moved
from kfaccore_tensorflow.reach import reaching
from kfaccore_tensorflow.rules import read
from kfaccore_tensorflow.sparse import summed_rows
from kfaccore_tensorflow.states import of_states
from kfaccore_tensorflow.uses import Hot, Operation, Tensor, Unread, Use, merged

SIZES = ("Shape", "ShapeN", "Size", "Rank", "ZerosLike", "OnesLike")
CALLS = ("PartitionedCall", "StatefulPartitionedCall")


@dataclass
class Followed:
    """The uses of one variable, and why some of them cannot be read."""

    variable: Any
    uses: list[Use] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


def followed(graph: Any, reach: set[str], variables: Sequence[Any]) -> list[Followed]:
    """Of each variable, along the operations of the graph that gradients `reach`."""
    inside = {id(outside): tensor for outside, tensor in graph.captures}
    found = []
    heads = []
    for variable in variables:
        one = Followed(variable)
        found.append(one)
        handle = inside.get(id(variable.value.handle))
        if handle is not None:
            heads.append((one, Hot(handle, Layout.of(variable.shape))))
    hot: set[int] = set()
    rows = of_states(graph, variables)
    for one, head in heads:
        _follow(one, head, reach, hot, rows)
    for one in found:
        one.uses = merged(one.uses)
        alone: list[Use] = []
        for use in one.uses:
            plain = use.x is None or id(use.x) not in hot
            apart = [use] if plain else halves(use, lambda here: _goes(here, reach, hot))
            if apart is None:
                one.reasons.append("it is multiplied with another parameter")
            alone += apart or []
        one.uses = alone
    return found


def _goes(here: Hot, reach: set[str], hot: set[int]) -> list[Use] | None:
    """The uses of a tensor that is made of parameters; None where one cannot be read, or is with a parameter."""
    one = Followed(None)
    _follow(one, here, reach, set())
    uses = merged(one.uses)
    return None if one.reasons or any(id(use.x) in hot for use in uses) else uses


def made_of(inputs: Iterable[Tensor]) -> set[str]:
    """Names of the operations whose values depend on those of `inputs`; on their sizes alone is no dependence."""
    waiting = [x for x in inputs if tf.is_tensor(x)]
    seen: set[str] = set()
    while waiting:
        for op in waiting.pop().consumers():
            if op.name not in seen and op.type not in SIZES:
                seen.add(op.name)
                waiting += op.outputs
    return seen


def _follow(one: Followed, head: Hot, reach: set[str], hot: set[int], rows: AbstractSet[int] = frozenset()) -> None:
    """rows: tensors with a row an example, though there is but one."""
    waiting = [head]
    while waiting:
        here = waiting.pop()
        hot.add(id(here.tensor))
        consumers = {op.name: op for op in here.tensor.consumers() if op.name in reach}
        for op in consumers.values():
            try:
                waiting += _step(one, op, here, reach, rows)
            except Unread as reason:
                one.reasons.append(str(reason))


def _step(one: Followed, op: Operation, here: Hot, reach: set[str], rows: AbstractSet[int]) -> list[Hot]:
    """Where one operation takes a tensor: on, or into a use."""
    going = None if any(id(x) in rows and x.shape.num_elements() != 1 for x in op.inputs) else moved(op, here)
    if going is not None:
        return list(going)
    use = _called(op, here) if op.type in CALLS else read(op, here)
    one.uses.append(summed_rows(use, reach) if isinstance(use.kind, Lookup) else use)
    return []


def _called(op: Operation, here: Hot) -> Use:
    """A function in which one operation uses it and one output shows that, as of compiled convolutions: its use,
    between the call's own tensors."""
    body = op.graph._functions.get(op.get_attr("f").name)
    if body is None or len(body.graph.inputs) != len(op.inputs):
        return read(op, here)
    graph = body.graph
    reach = reaching(graph.outputs)
    inner = Followed(None)
    for x, tensor in zip(op.inputs, graph.inputs, strict=True):
        if x is here.tensor:
            _follow(inner, Hot(tensor, here.layout), reach, set())
    if inner.reasons or len(inner.uses) != 1:
        return read(op, here)
    use = inner.uses[0]
    place = _end(use.out, graph.outputs, reach)
    if place is None:
        return read(op, here)
    outer = {id(a): b for a, b in zip(graph.inputs, op.inputs, strict=True)}
    x = use.x if use.x is None else _origin(use.x)
    out = _origin(graph.outputs[place])
    kind = use.kind
    if isinstance(kind, Convolution) and x is not None and (x.op.type, out.op.type) == ("ExpandDims", "Squeeze"):
        axis = tf.get_static_value(x.op.inputs[1])  # of one axis, run as of two
        taken = [i % x.shape.rank for i in out.op.get_attr("squeeze_dims")]
        if axis is None or [int(axis) % x.shape.rank] != taken:
            return read(op, here)
        kind = replace(kind, lone=taken[0])
        x, out = _origin(x.op.inputs[0]), _origin(out.op.inputs[0])
    outside = None if x is None else outer.get(id(x))
    if (x is not None and outside is None) or out is not use.out or use.hot.changed:
        return read(op, here)
    return replace(use, hot=here, kind=kind, x=outside, out=op.outputs[place])


def _end(start: Tensor, outputs: Sequence[Tensor], reach: set[str]) -> int | None:
    """The one output that gradients come to a tensor from, through views alone; None where they come another way too:
    those of that output would be a part of its own."""
    ends: list[int] = []
    waiting = [start]
    while waiting:
        here = waiting.pop()
        ends += [i for i, x in enumerate(outputs) if x is here]
        consumers = [op for op in here.consumers() if op.name in reach]
        if any(op.type not in ("Identity", "Squeeze") for op in consumers):
            return None
        waiting += [op.outputs[0] for op in consumers]
    return ends[0] if len(ends) == 1 else None


def _origin(tensor: Tensor) -> Tensor:
    while tensor.op.type == "Identity":
        tensor = tensor.op.inputs[0]
    return tensor
