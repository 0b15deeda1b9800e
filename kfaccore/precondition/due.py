"""What is due in one step: Python flags on the host, traced ones where a step is compiled once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any, TypeVar

import numpy as np

from kfaccore import tree
from kfaccore.precondition.missed import MEASURE, REFRESH, Flags, Missed, places
from kfaccore.precondition.placement import assign
from kfaccore.precondition.schedule import Clocks
from kfaccore.xp.arrays import Array, is_tracer
from kfaccore.xp.numbers import when

Flag = bool | Array
T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """Layers that are refreshed together, and whether they are at this step."""

    names: tuple[str, ...]
    refresh: Flag


@dataclass(frozen=True)
class Each:
    """Flags (layers,): which layers are measured, and which are refreshed, where not all are alike."""

    names: tuple[str, ...]
    update: Flags
    refresh: Flags

    def of(self, flags: Flags, names: Collection[str]) -> Flags:
        """The flags of some layers."""
        return flags[places(names, self.names)]

    def may_measure(self, name: str) -> bool:
        """Whether a layer is measured, as far as that is known on the host."""
        return is_tracer(self.update) or name in self.measured

    @cached_property
    def measured(self) -> frozenset[str]:
        """The layers that are, where that is known."""
        return frozenset(name for name, flag in zip(self.names, np.asarray(self.update), strict=True) if flag)


@dataclass(frozen=True)
class Due:
    """Whether statistics move and whether inverses are made anew; an array decides on the device, under tracing.

    pieces   layers that are refreshed where not all are
    missed   what layers that take part have missed, which they do not wait with; None for nothing
    each     layers measured and refreshed where not all are: what was missed, once it is known who has records
    """

    update: Flag
    refresh: Flag
    pieces: tuple[Piece, ...] = ()
    missed: Missed | None = None
    each: Each | None = None

    @property
    def refreshes(self) -> Flag:
        """Whether any layer is refreshed."""
        return reduce(either, (piece.refresh for piece in self.pieces), self.refresh)

    def whole(self, flag: Flag) -> Due:
        """With a refresh of all layers where `flag` holds, or it was due."""
        every = either(self.refresh, flag)
        pieces = (Piece(piece.names, but(piece.refresh, every)) for piece in self.pieces)
        return replace(self, refresh=every, pieces=tuple(piece for piece in pieces if piece.refresh is not False))

    @property
    def measures(self) -> bool:
        """Whether statistics of any layer may move."""
        missed = self.missed
        return self.update is not False or (
            missed is not None and (is_tracer(missed.table) or bool(np.any(missed.has(MEASURE))))
        )

    def measuring(self, names: Collection[str]) -> Flag:
        """Whether statistics move of any of some layers that take part."""
        return self.met(names).update

    def met(self, batches: Collection[str]) -> Due:
        """With the layers that missed a date decided, and which have records."""
        if self.missed is None:
            return self
        with_record = self.missed.within(batches)
        measure = self.missed.has(MEASURE) & with_record
        renew = self.missed.has(REFRESH) & (with_record | ~self.missed.has(MEASURE))  # with its newest statistics
        names = self.missed.names
        if any(map(is_tracer, (measure, self.update, self.refresh))):
            each = Each(names, measure | self.update, renew | self.refresh)
            return Due(either(self.update, measure.any()), either(self.refresh, renew.any()), self.pieces, None, each)
        measure, renew = np.asarray(measure), np.asarray(renew)
        turns = {name for piece in self.pieces if piece.refresh for name in piece.names}
        late = tuple(name for name, flag in zip(names, renew, strict=True) if flag and name not in turns)
        pieces = (*self.pieces, Piece(late, True)) if late and not self.refresh else self.pieces
        each = None if self.update else Each(names, measure, renew)
        return Due(self.update or bool(measure.any()), self.refresh, pieces, None, each)

    def refreshed(self, names: tuple[str, ...]) -> Flag | Flags:
        """Whether a date of refresh is struck, of all layers or of each."""
        found: Any = self.refresh
        for piece in self.pieces:
            found = found | (np.array([name in piece.names for name in names], bool) & piece.refresh)
        return found

    def leaves(
        self,
        missed: Missed,
        present: Collection[str],
        measured: Collection[str],
        idle: Callable[[], Collection[str]],
        refused: Callable[[], Flags],
    ) -> Missed:
        """What layers have missed after the step, of which `missed` was known; see `Missed.after`."""
        nothing = self.update is False and self.refreshes is False
        every = len(present) == len(measured) == len(missed)
        if (missed.nothing and every) or (nothing and missed.among(present) is None):
            return missed
        caught_up = self.missed is not None
        return missed.after(self.update, self.refreshed(missed.names), caught_up, present, measured, idle(), refused)


def clocked(step: int | Array, clocks: Clocks, costs: Callable[[], Mapping[str, float]]) -> Due:
    """What the clocks say of a step; `costs` of each layer's refresh are asked for where its layers take turns."""
    update = strikes(step, clocks.update)
    if not clocks.staggered:
        return Due(update, strikes(step, clocks.refresh))
    slots = clocks.slots()
    turns = assign(costs(), len(slots))  # as ranks share the work: the most expensive first, to the least loaded
    pieces = []
    for i, slot in enumerate(slots):
        names = tuple(name for name, (turn, *_) in turns.items() if turn == i)
        pieces.append(Piece(names, strikes(step - slot, clocks.refresh)))
    first = step == 0
    return Due(update, False, tuple(piece for piece in pieces if piece.names)).whole(
        first if is_tracer(first) else bool(first)
    )


def strikes(step: int | Array, every: int) -> Flag:
    """Whether a clock strikes at a step; True itself where it always does, so that nothing is decided on a device."""
    if every == 1:
        return True
    struck = step % every == 0
    return struck if is_tracer(struck) else bool(struck)


def either(one: Flag, other: Flag) -> Flag:
    """`one` or `other`."""
    if one is True or other is True:
        return True
    return other if one is False else one if other is False else one | other


def but(one: Flag, other: Flag) -> Flag:
    """`one` and not `other`."""
    if one is False or other is True:
        return False
    return one if other is False else ~other if one is True else one & ~other


def gated(flag: Flag, yes: Callable[[], T], no: T) -> T:
    """yes() where the flag holds, else `no`, a tree of the same structure, shapes and dtypes; only one is run."""
    if isinstance(flag, bool):
        return yes() if flag else no
    leaves = iter(when(flag, lambda: tuple(tree.leaves(yes())), lambda: tuple(tree.leaves(no))))
    return tree.map(lambda _: next(leaves), no)
