"""What is due in one step: Python flags on the host, traced ones where a step is compiled once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import TypeVar

from kfaccore import tree
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
class Due:
    """Whether statistics move and whether inverses are made anew; an array decides on the device, under tracing.

    pieces   layers that are refreshed where not all are
    """

    update: Flag
    refresh: Flag
    pieces: tuple[Piece, ...] = ()

    @property
    def refreshes(self) -> Flag:
        """Whether any layer is refreshed."""
        return reduce(either, (piece.refresh for piece in self.pieces), self.refresh)

    def whole(self, flag: Flag) -> Due:
        """With a refresh of all layers where `flag` holds, or it was due."""
        every = either(self.refresh, flag)
        pieces = (Piece(piece.names, but(piece.refresh, every)) for piece in self.pieces)
        return Due(self.update, every, tuple(piece for piece in pieces if piece.refresh is not False))


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
