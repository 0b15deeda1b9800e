"""What parameters were seen to be used for, as plain lists: saved with a state, so that it loads before a forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kfaccore import Window
from kfaccore.layers import Bias, Conv, Embedding, Gain, Linear
from kfaccore_torch.calls import Mark
from kfaccore_torch.kinds import Stack
from kfaccore_torch.plan import Plan, remade
from kfaccore_torch.views import Ref, View

Table = dict[str, Any]


def written(plan: Plan) -> Table:
    """The table of a plan, of numbers, texts and lists alone."""
    marks = [[_kind(mark.kind), _ref(mark.weight), _ref(mark.bias), mark.scaled] for mark in plan.marks]
    return {"seen": plan.seen, "marks": marks, "odd": dict(plan.odd)}


def read(table: Table, plan: Plan) -> Plan:
    """The plan of a model that a table says; ValueError where the table is of other parameters."""
    marks = tuple(Mark(_kind_of(kind), _ref_of(w), _ref_of(b), any(scaled)) for kind, w, b, *scaled in table["marks"])
    named = {name: tuple(p.shape) for name, p, _ in plan.made_of}
    missing = {ref.name for mark in marks for ref in (mark.weight, mark.bias) if ref is not None} - named.keys()
    if missing:
        raise ValueError(f"the state is of another model: it has layers of {sorted(missing)[:5]}, which are not here")
    return remade(plan, marks, dict(table["odd"]), bool(table["seen"]))


def _kind(kind: Any) -> list[Any]:
    if isinstance(kind, Linear):
        return ["linear", kind.d_in, kind.d_out]
    if isinstance(kind, Conv):
        return ["conv", list(kind.window.kernel), list(kind.channels), kind.groups]
    if isinstance(kind, Embedding):
        return ["embedding", kind.size, kind.d_out]
    if isinstance(kind, Stack):
        return ["stack", kind.blocks, kind.d_in, kind.d_out]
    if isinstance(kind, Bias):
        return ["gain" if isinstance(kind, Gain) else "bias", kind.d]
    return []


def _kind_of(given: Sequence[Any]) -> Any:
    if not given:
        return None
    name, *numbers = given
    if name == "conv":
        kernel, channels, groups = numbers
        return Conv(Window(tuple(kernel)), (channels[0], channels[1]), groups, bias=False, channels_first=True)
    if name == "linear":
        return Linear(numbers[0], numbers[1], bias=False)
    return {"embedding": Embedding, "stack": Stack, "gain": Gain, "bias": Bias}[name](*numbers)


def _ref(ref: Ref | None) -> list[Any]:
    return [] if ref is None else [ref.name, [[list(fine) for fine in axis] for axis in ref.view.axes], ref.view.offset]


def _ref_of(given: Sequence[Any]) -> Ref | None:
    if not given:
        return None
    name, axes, offset = given
    return Ref(name, View(tuple(tuple((n, stride) for n, stride in axis) for axis in axes), offset))
