"""What parameters were seen to be used for, as plain lists: saved with a state, so that it loads before a forward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from kfaccore import Window
from kfaccore.layers import Bias, Conv, Embedding, Gain, Linear
from kfaccore_torch.calls import Mark
from kfaccore_torch.kinds import Stack
from kfaccore_torch.plan import Layer, Plan, as_trained, remade
from kfaccore_torch.views import Ref, View

Table = dict[str, Any]


def written(plan: Plan) -> Table:
    """The table of a plan, of numbers, texts and lists alone."""
    marks = [[_kind(mark.kind), _ref(mark.weight), _ref(mark.bias), mark.scaled] for mark in plan.marks]
    shown = [sorted(names) for names in plan.shown]
    return {"seen": plan.seen, "marks": marks, "odd": dict(plan.odd), "shown": shown}


def with_held(plan: Plan, layers: Iterable[Layer]) -> Table:
    """The table of a plan, and of which parameters a state has layers."""
    return {**written(plan), "held": list(dict.fromkeys(path for layer in layers for path in layer.paths.values()))}


def as_saved(table: Table, plan: Plan) -> Plan:
    """The plan of the same model where that is trained which a state has layers of; by a table of before, what it has
    marks of and what is trained here."""
    found = read(table, plan)
    if "held" in table:
        return remade(as_trained(plan, {*table["held"], *table["odd"]}), found.marks, found.odd, found.seen)
    shown = {ref.name for mark in found.marks for ref in (mark.weight, mark.bias) if ref is not None}
    here = {name for name, _, trained in plan.made_of if trained}
    return remade(as_trained(plan, shown | here), found.marks, found.odd, found.seen)


def read(table: Table, plan: Plan) -> Plan:
    """The plan of a model that a table says of what is trained in it; ValueError where the table is of other
    parameters."""
    _check_plain(table)
    marks = tuple(Mark(_kind_of(kind), _ref_of(w), _ref_of(b), any(scaled)) for kind, w, b, *scaled in table["marks"])
    named = {name: tuple(p.shape) for name, p, _ in plan.made_of}
    missing = {ref.name for mark in marks for ref in (mark.weight, mark.bias) if ref is not None} - named.keys()
    missing |= {*table.get("held", ())} - named.keys()
    if missing:
        raise ValueError(f"the state is of another model: it has layers of {sorted(missing)[:5]}, which are not here")
    for mark in marks:
        for ref in filter(None, (mark.weight, mark.bias)):
            _check_inside(ref, named[ref.name])
    shown = tuple(frozenset(names) for names in table.get("shown", ()))
    return remade(replace(plan, shown=shown), marks, dict(table["odd"]), bool(table["seen"]))


def _check_plain(table: object) -> None:
    """ValueError where a table is not made of whole numbers, texts and lists."""
    if not isinstance(table, Mapping) or not {"seen", "marks", "odd"} <= set(table):
        raise ValueError(f"the state is damaged: its layers are {table!r:.60}, need `seen`, `marks` and `odd`")
    if not isinstance(table["seen"], bool) or not isinstance(table["odd"], Mapping):
        raise ValueError("the state is damaged: `seen` is to be true or false, `odd` reasons by name")
    if not all(isinstance(text, str) for pair in table["odd"].items() for text in pair):
        raise ValueError("the state is damaged: `odd` holds what is no text")
    if not all(isinstance(name, str) for names in [table.get("held", ()), *table.get("shown", ())] for name in names):
        raise ValueError("the state is damaged: `held` and `shown` are to be names of parameters")
    for mark in table["marks"]:
        kind, weight, bias, *scaled = mark
        if not _plain([kind, weight, bias]) or not all(isinstance(flag, bool) for flag in scaled):
            raise ValueError(f"the state is damaged: a layer is {mark!r:.80}, need numbers, texts and lists")


def _plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return isinstance(value, str) or (type(value) is int and 0 <= value < 2**63)


def _check_inside(ref: Ref, shape: tuple[int, ...]) -> None:
    """ValueError for a view that is not within its parameter."""
    fine = [pair for axis in ref.view.axes for pair in axis]
    last = ref.view.offset + sum((n - 1) * stride for n, stride in fine)
    if any(n < 1 for n, _ in fine) or last >= prod(shape):
        raise ValueError(f"the state is damaged: it has elements of {ref.name!r} that shape {shape} does not have")


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
