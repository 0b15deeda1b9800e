"""What may wait for a step in place of a batch's records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from kfaccore.method import Additive, Method, RowsAtSolve, Stats, declares
from kfaccore.precondition.given import named, working
from kfaccore.precondition.preconditioner import Preconditioner, State
from kfaccore.precondition.side_by_side import outline, records_of_turn, shared
from kfaccore.precondition.stacks import Layers, cut_out, part
from kfaccore.record import Record
from kfaccore.xp import precision


def measured(pre: Preconditioner, state: State, name: str, record: Record) -> Stats | None:
    """Stats of one layer's record, as the step of a Preconditioner to come would measure them; None where that step
    needs the rows themselves, which must then be kept."""
    if pre.rule.needs_records or name not in state.layers or declares(pre.assigned.of(name), RowsAtSolve):
        return None
    # what is not finite is counted by the Stats
    with precision.measuring((name,)), np.errstate(all="ignore"):
        return pre.assigned.of(name).measure(state.layers[name], record, pre.schedules.hyper(name, state.step))


def measured_together(pre: Preconditioner, state: State, records: Mapping[str, Record]) -> dict[str, Stats | None]:
    """As `measured`, of several layers: those of one stack whose records are of one shape in one call."""
    if len(records) == 1:
        return {name: measured(pre, state, name, record) for name, record in records.items()}
    found: dict[str, Stats | None] = {}
    for stack, names in _runs(pre, state, records):
        turns = records_of_turn([[records[name]] for name in names]) if len(names) > 1 else []
        if turns:
            found |= _of_stack(pre, state, stack, names, turns[0])
        else:
            found |= {name: measured(pre, state, name, records[name]) for name in names}
    rest = {name: measured(pre, state, name, records[name]) for name in records if name not in found}
    found |= rest
    return {name: found[name] for name in records}


def _runs(
    pre: Preconditioner, state: State, records: Mapping[str, Record]
) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """(stack, those of its layers that lie side by side and have records of one shape)."""
    if pre.rule.needs_records or not isinstance(state.layers, Layers):
        return
    for stack in state.layers.stacks:
        if not _sums(pre.assigned.of(stack[0])):
            continue
        place = {name: i for i, name in enumerate(stack)}
        ours = [name for name in stack if name in records]
        # a run of neighbours keeps the difference between place and count
        marked = [(place[name] - count, outline(records[name]), name) for count, name in enumerate(ours)]
        for _, run in groupby(marked, key=lambda mark: mark[:2]):
            yield stack, tuple(name for *_, name in run)


def _sums(method: Method) -> bool:
    """Whether Stats are sums, so that those of a stack are those of its layers side by side."""
    return type(method).combine is Additive.combine and not declares(method, RowsAtSolve)


def _of_stack(
    pre: Preconditioner, state: State, stack: tuple[str, ...], names: Sequence[str], record: Record
) -> dict[str, Stats | None]:
    layers: Any = state.layers
    mine = part(layers.states[layers.stacks.index(stack)], stack, names)
    like = working(mine)
    hypers = [pre.schedules.hyper(name, state.step) for name in names]
    hyper = shared(hypers, record.blocks, record.g if like is None else like)
    with named(*names), precision.measuring(names), np.errstate(all="ignore"):
        stats = pre.assigned.of(stack[0]).measure(mine, record, hyper)
    return {name: cut_out(stats, i, len(names)) for i, name in enumerate(names)}
