"""Captured forwards of a step whose losses are still to come, and which of them made a prediction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Any
from weakref import ref

import torch

from kfaccore_torch.capture import Capture
from kfaccore_torch.masks import Told
from kfaccore_torch.shots import Shot

_FEW = 8  # forwards that are all looked at before each other


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
    _inside: list[Capture] = field(default_factory=list)  # those that are not over
    _weighed: bool = False  # whether a loss had another weight than 1
    _shots: list[ref[Shot]] = field(default_factory=list)  # those a loss was formed on; who forms it holds it

    def __bool__(self) -> bool:
        return bool(self.all)

    @property
    def shots(self) -> list[Shot]:
        """What their losses leave."""
        return [one.shot for one in self.all]

    def clear(self) -> None:
        """Their parameters are no more."""
        self.lost = self.lost or any(not one.seen.spent for one in self.all)
        self.all = []

    def prune(self) -> None:
        """Before another forward: those of which nobody holds a prediction any more, as of a validation, are let go of
        with all that they keep. Of many the newest is looked at, and all whenever their number has doubled: a forward
        for each step of a long episode costs the same."""
        many = len(self.all)
        doubled = many.bit_count() == 1
        start = 0 if many < _FEW or doubled else many - 1
        kept = [one for one in self.all[start:] if one.seen.spent or _held(one.seen)]
        self.lost = self.lost or start + len(kept) < many
        self.all[start:] = kept

    @contextmanager
    def inside(self, seen: Capture) -> Iterator[None]:
        """Around a forward."""
        self._inside.append(seen)
        try:
            yield
        finally:
            self._inside.remove(seen)

    def before(self, shot: Shot, weight: float) -> list[Shot]:
        """Others that losses were formed on, which may still count; a loss of this weight is formed on this one. None
        while no weight is another than 1: then each is a micro-batch, and nothing of many is looked at."""
        if not shot.formed:
            self._shots.append(ref(shot))
        self._weighed = self._weighed or weight != 1.0
        return [x for one in self._shots if (x := one()) is not None and x is not shot] if self._weighed else []

    def of(self, heads: Sequence[torch.Tensor]) -> Open:
        """The forward that made a prediction, as autograd's record has it; the newest where the graph says nothing.

        Raises ValueError where none of them made it, or several that were told of different rows, or one that is not
        over: what a loss is made of would be taken for the model's.
        """
        whole = self._newest(heads) is not None if self._inside else True
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
        others = [one for one in self.all if one is not found and not one.seen.spent and one.told.any]
        if others and any(_made(one, node) for node in _behind(heads) for one in others):
            raise ValueError(
                "this prediction is made of several captured forwards, one of which has a mask or examples of its own: "
                "run them inside one `with pre.capture(masks=...):`"
            )
        return found

    def _newest(self, heads: Sequence[torch.Tensor]) -> Open | None:
        """The last forward that a node behind a prediction was made in. The newest nodes come first: most often the
        first that is looked at is one of it, however much of other forwards lies behind."""
        seen: set[Any] = set()
        waiting = [(-node._sequence_nr(), id(node), node) for node in _inner(f.grad_fn for f in heads)]
        heapify(waiting)
        while waiting:
            node = heappop(waiting)[2]
            if node in seen:
                continue
            seen.add(node)
            found = next((one for one in reversed(self.all) if _made(one, node)), None)
            if found is not None:
                return found
            for child in _inner(child for child, _ in node.next_functions):
                heappush(waiting, (-child._sequence_nr(), id(child), child))
        return None


def _made(one: Open, node: Any) -> bool:
    """Whether a node was made inside the forward."""
    span = one.seen.span
    return span.first <= node._sequence_nr() < (span.last or 0)


def _makes(seen: Capture, heads: Sequence[torch.Tensor], whole: bool) -> bool:
    """Whether a prediction is of a forward that is not over: a call of it is behind it, or, where it is not the `whole`
    of another's, any operation."""
    own = {use.call.node for use in seen.uses}
    return any(node in own or (not whole and node._sequence_nr() >= seen.span.first) for node in _behind(heads))


def _behind(heads: Iterable[torch.Tensor]) -> Iterator[Any]:
    """The nodes of a graph, from its end; those of leaves, which have no time, aside."""
    return _nodes(list(_inner(f.grad_fn for f in heads)))


def _nodes(waiting: list[Any]) -> Iterator[Any]:
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        waiting.extend(_inner(child for child, _ in node.next_functions))


def _inner(nodes: Iterable[Any]) -> Iterator[Any]:
    """Those that are operations: a leaf's has no time of its own."""
    return (node for node in nodes if node is not None and not node.name().endswith("AccumulateGrad"))


def _held(seen: Capture) -> bool:
    """Whether somebody holds what a forward came to: a tensor that the graph we keep has no use for."""
    tensors = seen.made.held()
    ends = (*(use.call.node for use in seen.uses), *(x.grad_fn for x in tensors))
    nodes = _nodes(list(_inner(ends)))
    inner = {child for node in nodes for child, _ in node.next_functions}
    return any(x.grad_fn is not None and x.grad_fn not in inner for x in tensors)
