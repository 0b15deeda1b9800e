"""Captured forwards of a step whose losses are still to come, and which of them made a prediction."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch

from kfaccore_torch.capture import Capture
from kfaccore_torch.masks import Told
from kfaccore_torch.shots import Shot

_FEW = 16  # open forwards, which are looked through each time


@dataclass(eq=False)
class Open:
    """One forward: its calls, what the caller told of its rows, and what its losses leave."""

    seen: Capture
    told: Told
    shot: Shot = field(default_factory=Shot)


@dataclass(eq=False)
class Opened:
    """Those of a step, in order; `lost` where one was let go of before its loss."""

    all: list[Open] = field(default_factory=list)
    lost: bool = False
    _firsts: list[int] = field(default_factory=list)  # where each begins in autograd's count; empty where spans overlap
    _ends: int = 0  # where the last does
    _looks: int = 0  # how many there are at the next look at who is held
    _inside: list[Capture] = field(default_factory=list)  # those that are not over
    _told: list[Open] = field(default_factory=list)  # those that were told of rows
    _shots: dict[int, ref[Shot]] = field(
        default_factory=dict
    )  # by place, those a loss was formed on; who forms it holds it

    def __bool__(self) -> bool:
        return bool(self.all)

    @property
    def shots(self) -> list[Shot]:
        """What their losses leave."""
        return [one.shot for one in self.all]

    def add(self, one: Open) -> None:
        """A forward that is over."""
        span = one.seen.span
        apart = len(self._firsts) == len(self.all) and (not self.all or span.first >= self._ends)
        if apart:
            self._firsts.append(span.first)
        else:
            self._firsts = []
        self._ends = span.last or 0
        self.all.append(one)
        if one.told.any:
            self._told.append(one)

    def clear(self) -> None:
        """Their parameters are no more."""
        self.lost = self.lost or any(not one.seen.spent for one in self.all)
        self.all = []
        self._firsts = []
        self._told = []

    def prune(self) -> None:
        """Before another forward: those of which nobody holds a prediction any more, as of a validation, are let go of
        with all that they keep. Of many, each time that there are twice as many: looking costs their number."""
        if _FEW < len(self.all) < self._looks:
            return
        kept = [one for one in self.all if one.seen.spent or _held(one.seen)]
        self.lost = self.lost or len(kept) < len(self.all)
        if len(self._firsts) == len(self.all):
            self._firsts = [one.seen.span.first for one in kept]
        self.all = kept
        self._told = [one for one in kept if one.told.any]
        self._looks = 2 * len(kept)

    @contextmanager
    def inside(self, seen: Capture) -> Iterator[None]:
        """Around a forward."""
        self._inside.append(seen)
        try:
            yield
        finally:
            self._inside.remove(seen)

    def before(self, shot: Shot) -> list[Shot]:
        """Others that losses were formed on, which may still count; a loss is formed on this one."""
        others = [x for one in self._shots.values() if (x := one()) is not None and x is not shot]
        known = self._shots.get(id(shot))
        if known is None or known() is not shot:
            self._shots.pop(id(shot), None)  # of one that is gone
            self._shots[id(shot)] = ref(shot)
        return others

    def of(self, heads: Sequence[torch.Tensor]) -> Open:
        """The forward that made a prediction, as autograd's record has it; the newest where the graph says nothing.

        Raises ValueError where none of them made it, or several that were told of different rows, or one that is not
        over: what a loss is made of would be taken for the model's.
        """
        whole = any(_made(one, heads) for one in self.all) if self._inside else True
        if any(_makes(seen, heads, whole) for seen in self._inside):
            raise ValueError(
                "this loss is formed inside the `with pre.capture():` of its own forward: leave the block first, "
                "`with pre.capture(): f = model(x)`, and then pre.loss(f, target); autocast may go on around both"
            )
        if not self.all:
            raise ValueError("this step updates statistics: run the model inside `with pre.capture():` before loss()")
        newest = self.all[-1]
        if len(self.all) == 1 and not self.lost and not self._inside:
            return newest
        found = self._newest(heads)
        if found is None:
            before = (node for node in _behind(heads) if node._sequence_nr() < newest.seen.span.first)
            if next(before, None) is not None:
                raise ValueError(
                    "this prediction is not of the newest captured forward, and that which made it is no more: nobody "
                    "held what it returned, or the model's parameters changed since. Form the loss of a forward before "
                    "the next one, or keep what the model returned"
                )
            return newest
        others = [one for one in self._told if one is not found and not one.seen.spent]
        if others and self._any_made(others, heads):
            raise ValueError(
                "this prediction is made of several captured forwards, one of which has a mask or examples of its own: "
                "run them inside one `with pre.capture(masks=...):`"
            )
        return found

    def _newest(self, heads: Sequence[torch.Tensor]) -> Open | None:
        """The newest forward that made a node behind a prediction."""
        if len(self._firsts) < len(self.all):
            return next((one for one in reversed(self.all) if _made(one, heads)), None)
        best = -1
        waiting = [f.grad_fn for f in heads]
        met: set[Any] = set()
        while waiting:
            node = waiting.pop()
            if node is None or node in met or node.name().endswith("AccumulateGrad"):
                continue
            met.add(node)
            place, inside = self._place(node)
            if place < best or place < 0:
                continue  # what is behind it was made before it
            best = place if inside else best
            waiting.extend(child for child, _ in node.next_functions)
        return self.all[best] if best >= 0 else None

    def _any_made(self, some: Sequence[Open], heads: Sequence[torch.Tensor]) -> bool:
        """Whether one of some forwards made a node behind a prediction."""
        if len(self._firsts) < len(self.all):
            return any(_made(one, heads) for one in some)
        wanted = {id(one) for one in some}
        places = {place for place, inside in map(self._place, _behind(heads)) if inside}
        return any(id(self.all[place]) in wanted for place in places)

    def _place(self, node: Any) -> tuple[int, bool]:
        """Which forward began last before a node was made, -1 for none, and whether it made the node."""
        number = node._sequence_nr()
        place = bisect_right(self._firsts, number) - 1
        return place, place >= 0 and number < (self.all[place].seen.span.last or 0)


def _made(one: Open, heads: Sequence[torch.Tensor]) -> bool:
    """Whether a node behind a prediction was made inside the forward; most often the first that is looked at."""
    span = one.seen.span
    return any(span.first <= node._sequence_nr() < (span.last or 0) for node in _behind(heads))


def _makes(seen: Capture, heads: Sequence[torch.Tensor], whole: bool) -> bool:
    """Whether a prediction is of a forward that is not over: a call of it is behind it, or, where it is not the `whole`
    of another's, any operation."""
    own = {use.call.node for use in seen.uses}
    return any(node in own or (not whole and node._sequence_nr() >= seen.span.first) for node in _behind(heads))


def _behind(heads: Iterable[torch.Tensor]) -> Iterator[Any]:
    """The nodes of a graph, from its end; those of leaves, which have no time, aside."""
    return _nodes([f.grad_fn for f in heads])


def _nodes(waiting: list[Any]) -> Iterator[Any]:
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen or node.name().endswith("AccumulateGrad"):
            continue
        seen.add(node)
        yield node
        waiting.extend(child for child, _ in node.next_functions)


def _held(seen: Capture) -> bool:
    """Whether somebody holds what a forward came to: a tensor that the graph we keep has no use for."""
    tensors = seen.made.held()
    nodes = _nodes([*(use.call.node for use in seen.uses), *(x.grad_fn for x in tensors)])
    inner = {child for node in nodes for child, _ in node.next_functions}
    return any(x.grad_fn is not None and x.grad_fn not in inner for x in tensors)
