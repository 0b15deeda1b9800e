"""What is known of a captured batch before its draws: which calls count, and whose rows are whose.

Maps are kept by the shapes of the calls and the way of the graph. Where data may decide them, because something between
a row and the prediction moves rows by an index or weighs sums of them, or because shapes alone do not give a row to one
example, they are confirmed at every capture; all others at the second, fourth, eighth and so on, since numbers may open
a way that the first batch did not see: a gain that began at zero, in front of a norm over the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kfaccore_torch.calls import Call
from kfaccore_torch.fixed import loose
from kfaccore_torch.fixed_rules import passed
from kfaccore_torch.graph import Behind
from kfaccore_torch.kinds import Rest
from kfaccore_torch.masks import Told
from kfaccore_torch.owner import (
    Asked,
    Owned,
    Split,
    confirm,
    factors,
    few,
    mixed,
    rounding,
    search,
    settled,
    splits,
    still,
)
from kfaccore_torch.places import Place, Together, joined
from kfaccore_torch.rows import by_rows
from kfaccore_torch.settle import Layer
from kfaccore_torch.sight import Sight

_MOST = 256  # combinations of shapes that are remembered


@dataclass(frozen=True)
class Observed:
    """Calls that reach the prediction, by layer and in order, and where the rows of each stand."""

    calls: tuple[tuple[str, Call], ...]
    split: Split
    owned: tuple[Owned, ...]
    key: Any
    expected: tuple[torch.Tensor | None, ...] = ()

    @property
    def mixing(self) -> set[str]:
        """Layers with rows that move several examples."""
        return {name for (name, _), owned in zip(self.calls, self.owned, strict=True) if owned.mixes}

    def places(self, exact: bool) -> list[Place]:
        """A call each; rows that mix examples all together if `exact`, else as their shape suggests."""
        return [joined(owned.place, exact) if owned.mixes else owned.place for owned in self.owned]


@dataclass
class Observer:
    """Maps found so far, how often each was used, and the calls that it is confirmed for every time."""

    kept: dict[Any, tuple[Split, tuple[Owned, ...]]] = field(default_factory=dict)
    turns: dict[Any, int] = field(default_factory=dict)
    loose: dict[Any, dict[int, bool]] = field(default_factory=dict)

    def look(
        self,
        sight: Sight,
        layers: dict[str, Layer],
        heads: Sequence[torch.Tensor],
        told: Told,
        first: Callable[[], tuple[Any, tuple]] = lambda: (None, ()),
    ) -> Observed:
        """The batch of `sight`. `first()`, asked for only if anything is to be pulled back, gives the draw to begin
        with, or None, and parameters to pull it back to as well."""
        graph = sight.graph
        calls = list(sight.calls)
        rows = [call.rows for _, call in calls]
        told_apart = tuple((name, call.rows, graph.nodes.get(call.node)) for name, call in calls)
        key = (graph.key, told_apart, tuple(f.shape for f in heads))
        known = self.kept.get(key)
        split = None if known is None else known[0]
        size = min(len(f) for f in heads)
        given = [told.place_of(name, call, split.examples if split else size) for name, call in calls]
        fixed = [Owned(place, shaped=False) if place is not None else None for place in given]
        for i, (name, call) in enumerate(calls):
            if isinstance(layers[name].kind, Rest):
                fixed[i] = Owned(Together(call.rows), mixes=True, shaped=False)
        turn = self.turns.get(key, 0) + 1
        if known is not None and turn & (turn - 1):
            fixed = [
                f or x for f, x in zip(fixed, self._held(key, [call for _, call in calls], graph, heads), strict=True)
            ]
        expected: tuple = ()
        if any(f is None for f in fixed):
            asked = [i for i, f in enumerate(fixed) if f is None]
            probe, parameters = first()
            question = _Question(heads, [calls[i] for i in asked], layers, probe)
            expected = question.pull_first(() if known else parameters)
            old = [known[1][i] if known else None for i in asked]
            split, found = question.answer([split] if split else splits([rows[i] for i in asked], size), old)
            for i, owned in zip(asked, found, strict=True):
                fixed[i] = owned
            if all(place is None for place in given):
                self.kept[key] = split, tuple(owned for owned in fixed if owned is not None)
                if len(self.kept) > _MOST:
                    oldest = next(iter(self.kept))
                    del self.kept[oldest], self.turns[oldest]
                    self.loose.pop(oldest, None)
        if key in self.kept:
            self.turns[key] = turn
        owned = tuple(owned for owned in fixed if owned is not None)
        return Observed(tuple(calls), split or Split(size), owned, key, expected)

    def _held(self, key: Any, calls: list[Call], graph: Behind, heads: Sequence[torch.Tensor]) -> list[Owned | None]:
        """What is kept of each call, or None where data may have changed it."""
        split, kept = self.kept[key]
        if key not in self.loose:
            self.loose[key] = loose(calls, heads, split, passed)
        free = self.loose[key]
        held: list[Owned | None] = []
        for i, (call, owned) in enumerate(zip(calls, kept, strict=True)):
            changes = i in free and (owned.decided or free[i])
            held.append(None if changes or call.node in graph.moved else owned)
        return held

    def again(
        self, observed: Observed, layers: dict[str, Layer], heads: Sequence[torch.Tensor], grads: Sequence[Any]
    ) -> Observed:
        """The same, with maps asked for once more where draws moved rows that no draw had moved before."""
        asked = [i for i, g in enumerate(grads) if g is not None and wakes(observed, layers, i, g)]
        if not asked:
            return observed
        question = _Question(heads, [observed.calls[i] for i in asked], layers, None)
        question.pull_first(())
        _, found = question.answer([observed.split], [observed.owned[i] for i in asked])
        owned = list(observed.owned)
        for i, new in zip(asked, found, strict=True):
            owned[i] = still(observed.owned[i], new)
        if observed.key in self.kept:
            self.kept[observed.key] = observed.split, tuple(owned)
        return replace(observed, owned=tuple(owned))


class _Question:
    """Backward passes to the rows of some calls."""

    def __init__(
        self, heads: Sequence[torch.Tensor], calls: Sequence[tuple[str, Call]], layers: dict[str, Layer], probe: Any
    ) -> None:
        self.heads = list(heads)
        self.calls = calls
        self.layers = layers
        rng = torch.Generator().manual_seed(0)
        random = (torch.randn(f.shape, generator=rng, dtype=torch.float32) for f in heads)
        self.v = [v.to(f) for v, f in zip(probe or random, heads, strict=True)]

    def pull_first(self, parameters: Sequence[torch.nn.Parameter]) -> tuple:
        """Pull the draw itself; gradients of `parameters` under it come back."""
        found = self._pull(self.v, parameters)
        self.asked = [Asked.of(rows) for rows in self._rows(found[: len(self.calls)])]
        return tuple(found[len(self.calls) :])

    def answer(self, candidates: Sequence[Split], old: Sequence[Owned | None]) -> tuple[Split, list[Owned]]:
        """The split that explains most calls, and the map of each call."""
        rows = [call.rows for _, call in self.calls]
        best: tuple[int, Split, list, list, list[torch.Tensor]] | None = None
        for split in candidates:
            if any(len(f) % split.examples for f in self.heads):
                continue
            s = factors(split.examples, self.heads[0].dtype)
            scaled = [self._scaled(by, split) for by in s]
            found = confirm(rows, self.asked, scaled, split, s, old)
            count = sum(owned is not None for owned in found)
            if best is None or count > best[0]:
                best = count, split, found, scaled, s
            if count == len(found):
                break
        assert best is not None
        _, split, found, scaled, s = best
        open_ = [i for i, owned in enumerate(found) if owned is None]
        search_in = [i for i in open_ if _is_some_power(self.asked[i], scaled[0][i], s[0])]
        passes = self._digits(split) if search_in else []
        for i in search_in:
            found[i] = search(rows[i], self.asked[i], [p[i] for p in passes], split)
        mixing = [i for i in open_ if found[i] is None]
        by = few(split.examples, self.heads[0].dtype)
        second = self._scaled(by, split) if mixing else []
        for i in mixing:
            found[i] = mixed(rows[i], self.asked[i], second[i], split, by)
        return split, [
            owned if owned.mixes or not owned.shaped else settled(owned, asked.alive)
            for owned, asked in zip(found, self.asked, strict=True)
        ]

    def _digits(self, split: Split) -> list[list[torch.Tensor]]:
        """One pass a binary digit of the examples' numbers: those that have it count twice."""
        number = torch.arange(split.examples)
        digits = max(1, (split.examples - 1).bit_length())
        return [self._scaled(1.0 + ((number >> digit) & 1), split) for digit in range(digits)]

    def _scaled(self, s: torch.Tensor, split: Split) -> list[torch.Tensor]:
        """Rows of all calls under the draw with each example scaled."""
        scaled = []
        for v, f in zip(self.v, self.heads, strict=True):
            factor = s[split.owner(len(f))].to(v)
            scaled.append(v * factor.reshape(-1, *(1,) * (v.ndim - 1)))
        return self._rows(self._pull(scaled, ()))

    def _pull(self, v: Sequence[torch.Tensor], parameters: Sequence[torch.nn.Parameter]) -> Sequence[Any]:
        wanted = [call.edge for _, call in self.calls] + list(parameters)
        return torch.autograd.grad(self.heads, wanted, v, retain_graph=True, allow_unused=True)

    def _rows(self, found: Sequence[Any]) -> list[torch.Tensor]:
        pairs = zip(self.calls, found, strict=True)
        return [
            by_rows(self.layers[name], call, torch.zeros(call.shape) if g is None else g) for (name, call), g in pairs
        ]


def _is_some_power(before: Asked, second: torch.Tensor, s: torch.Tensor) -> bool:
    """Whether every row was scaled by the number of some example."""
    hit = ~before.alive
    for level in s.unique():
        hit = hit | before.scaled_by(second, level.expand(len(hit)))
    return bool(hit.all())


def wakes(observed: Observed, layers: dict[str, Layer], i: int, g: torch.Tensor) -> bool:
    """Whether draws (draws, *shape) move rows of the i-th call that no draw had moved before."""
    owned = observed.owned[i]
    name, call = observed.calls[i]
    if owned.undecided is None or owned.mixes or len(g) == 0:
        return False
    size = torch.stack([by_rows(layers[name], call, draw).abs().amax(1) for draw in g]).amax(0)
    return bool((size[owned.undecided.to(size.device)] > rounding(size.dtype) * size.max()).any())
