"""What is known of a captured batch before its draws: which calls count, and whose rows are whose.

Maps are kept by the shapes of the calls and the way of the graph. Where data may decide them, because something between
a row and the prediction moves rows by an index or weighs sums of them, or because shapes alone do not give a row to one
example, they are confirmed at every capture; all others at the second, fourth, eighth and so on, since numbers may open
a way that the first batch did not see: a gain that began at zero, in front of a norm over the batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kfaccore_torch.beside import Quiet
from kfaccore_torch.calls import Call
from kfaccore_torch.empty import tell
from kfaccore_torch.fixed import loose
from kfaccore_torch.fixed_rules import Passed
from kfaccore_torch.graph import Behind
from kfaccore_torch.kinds import Rest
from kfaccore_torch.masks import Told
from kfaccore_torch.owner import Owned, dealt, still
from kfaccore_torch.places import Place, Together, joined
from kfaccore_torch.question import Question
from kfaccore_torch.rows import by_rows
from kfaccore_torch.scaled import rounding
from kfaccore_torch.settle import Layer
from kfaccore_torch.sight import Sight
from kfaccore_torch.split import Split, candidates

_MOST = 256  # combinations of shapes that are remembered
_MOST_ROWS = 1 << 23  # numbers in the maps of all of them


@dataclass(frozen=True)
class Observed:
    """Calls that reach the prediction, by layer and in order, and where the rows of each stand."""

    calls: tuple[tuple[str, Call], ...]
    split: Split
    owned: tuple[Owned, ...]
    key: Any
    expected: tuple[torch.Tensor | None, ...] = ()
    times: float = 1.0  # what draws are multiplied by to be pulled, so that the backward pass is linear
    quiet: Quiet = field(default_factory=Quiet)  # what no draw may move

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
    sizes: dict[Any, int] = field(default_factory=dict)  # of their maps, in numbers
    turns: dict[Any, int] = field(default_factory=dict)
    times: dict[Any, float] = field(default_factory=dict)  # of draws, where it is not 1
    bent: set[str] = field(default_factory=set)  # layers behind a backward pass that is not linear
    empty: set[str] = field(default_factory=set)  # layers whose empty rows were named
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
        each = Split.rows_of(heads)
        given = [told.place_of(name, call, (split or each).examples) for name, call in calls]
        fixed = [Owned(place, shaped=False) if place is not None else None for place in given]
        for i, (name, call) in enumerate(calls):
            if isinstance(layers[name].kind, Rest):
                fixed[i] = Owned(Together(call.rows), mixes=True, shaped=False)
        turn = self.turns.get(key, 0) + 1
        once_more = turn & (turn - 1) == 0
        times = self.times.get(key, 1.0)
        if known is not None and not once_more:
            held = self._held(key, [call for _, call in calls], graph, heads)
            fixed = [f or x for f, x in zip(fixed, held, strict=True)]
        expected: tuple = ()
        if any(f is None for f in fixed):
            asked = [i for i, f in enumerate(fixed) if f is None]
            probe, parameters = first()
            question = Question(heads, [calls[i] for i in asked], layers, probe, sight.quiet, times, once_more)
            expected = question.pull_first(() if known else parameters)
            if known is None:
                self._tell_empty(question, graph, told)
            old = [known[1][i] if known else None for i in asked]
            wanted = [rows[i] for i in asked]
            asked_for, coarser = ([split], []) if split else candidates(wanted, each)
            split, found = question.answer(asked_for, old, coarser)
            times = question.times
            self._name([calls[asked[i]][0] for i in question.bent])
            fixed = dealt(fixed, found, [name for name, _ in calls])
            if all(place is None for place in given):
                self._keep(key, split, fixed, times)
        if key in self.kept:
            self.turns[key] = turn
        owned = tuple(owned for owned in fixed if owned is not None)
        return Observed(tuple(calls), split or each, owned, key, expected, times, sight.quiet)

    def _tell_empty(self, question: Question, graph: Behind, told: Told) -> None:
        """A warning for layers that data fill, of which many rows hold nothing."""
        filled = [i for i, (_, call) in enumerate(question.calls) if call.node in graph.moved]
        calls = [question.calls[i] for i in filled]
        tell(calls, [question.asked.first(i) for i in filled], question.layers, told, self.empty)

    def _keep(self, key: Any, split: Split, owned: Sequence[Owned | None], times: float) -> None:
        """What was found; the oldest goes where that is too much."""
        self.kept[key] = split, tuple(one for one in owned if one is not None)
        self.sizes[key] = sum(one.numbers for one in self.kept[key][1])
        if times != 1:
            self.times[key] = times
        while len(self.kept) > _MOST or (len(self.kept) > 1 and sum(self.sizes.values()) > _MOST_ROWS):
            oldest = next(iter(self.kept))
            for known in (self.kept, self.turns, self.times, self.loose, self.sizes):
                known.pop(oldest, None)

    def _name(self, layers: Sequence[str]) -> None:
        """A warning for layers behind a backward pass that is not linear, once each."""
        fresh = sorted(set(layers) - self.bent)
        self.bent |= set(fresh)
        if fresh:
            warnings.warn(
                f"gradients reach layers {fresh} in a way that is not linear: twice the loss does not give twice the "
                f"gradient, however small, as with a hook or an autograd.Function whose backward rounds, takes signs "
                f"or adds noise. Draws of the Fisher go the same way, so that the curvature of these layers is not "
                f"that of the network; skip them, or take the hook off the forward that is captured",
                stacklevel=2,
            )

    def _held(self, key: Any, calls: list[Call], graph: Behind, heads: Sequence[torch.Tensor]) -> list[Owned | None]:
        """What is kept of each call, or None where data may have changed it."""
        split, kept = self.kept[key]
        if key not in self.loose:
            self.loose[key] = loose(calls, heads, split, Passed())
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
        question = Question(
            heads, [observed.calls[i] for i in asked], layers, None, observed.quiet, observed.times, False
        )
        question.pull_first(())
        _, found = question.answer([observed.split], [observed.owned[i] for i in asked])
        owned = list(observed.owned)
        kept = list(self.kept[observed.key][1]) if observed.key in self.kept else None
        for i, new in zip(asked, found, strict=True):
            owned[i] = still(observed.owned[i], new)
            if kept is not None:  # the others may stand otherwise here than was found
                kept[i] = owned[i]
        if kept is not None:
            self.kept[observed.key] = observed.split, tuple(kept)
        return replace(observed, owned=tuple(owned))


def wakes(observed: Observed, layers: dict[str, Layer], i: int, g: torch.Tensor) -> bool:
    """Whether draws (draws, *shape) move rows of the i-th call that no draw had moved before."""
    owned = observed.owned[i]
    name, call = observed.calls[i]
    if owned.undecided is None or owned.mixes or len(g) == 0:
        return False
    size = torch.stack([by_rows(layers[name], call, draw).abs().amax(1) for draw in g]).amax(0)
    return bool((size[owned.undecided.to(size.device)] > rounding(size.dtype) * size.max()).any())
