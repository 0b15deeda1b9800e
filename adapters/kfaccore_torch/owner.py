"""Whose row is it? Asked of autograd: which examples of the loss each row of each call moves.

A draw v and the same draw with each example scaled by a power of two are pulled back to the rows. A row that one
example owns is scaled by that example's number, exactly, in any precision; no other row is. What shapes suggest is
confirmed so in two backward passes, of more examples than there are numbers to give in three; where it fails, one more
for each binary digit of the examples' numbers reads the map. Rows whose gradient is zero stay undecided.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from kfaccore_torch.places import RAGGED, Groups, Place, Together, by_shape, grouped
from kfaccore_torch.scaled import Asked, Rows
from kfaccore_torch.split import Split

_LEVELS = {torch.float16: 3, torch.float64: 512}  # powers of two of a confirmation, as a dtype has range for
_MOST_LEVELS = 128
_FEW_LEVELS = 6
Pull = Callable[[torch.Tensor, Sequence[int]], list[torch.Tensor]]


@dataclass(frozen=True)
class Owned:
    """What was found for one call.

    place       where its rows stand
    mixes       whether rows of it move several examples
    shaped      whether `place` is what shapes suggest
    undecided   rows without a gradient so far, (k,), on the device of the prediction: each draw is asked for them
    """

    place: Place
    mixes: bool = False
    shaped: bool = True
    undecided: torch.Tensor | None = None

    @property
    def decided(self) -> bool:
        """Whether some row was seen to be of one example."""
        return not self.mixes and (self.undecided is None or len(self.undecided) < prod(self.place.rows))

    @property
    def numbers(self) -> int:
        """How many are kept of it, a number a row where its rows are in a map: what shapes say takes none."""
        undecided = 0 if self.undecided is None else len(self.undecided)
        return undecided + (prod(self.place.rows) if isinstance(self.place, Groups) else 0)

    def on(self, device: torch.device) -> Owned:
        """With the undecided rows there."""
        return self if self.undecided is None else replace(self, undecided=self.undecided.to(device))

    @property
    def unmoved(self) -> bool:
        """Whether no row has a gradient and shapes say nothing of their examples."""
        return not (self.mixes or self.shaped or self.decided)


def factors(examples: int, dtype: torch.dtype, few: bool = False) -> list[torch.Tensor]:
    """A power of two an example, for each pass; over all passes no two examples have the same. `few` are near each
    other, and take more passes."""
    levels = _FEW_LEVELS if few else _LEVELS.get(dtype, _MOST_LEVELS)
    number = torch.arange(examples)
    found = []
    while not found or bool(number.any()):
        found.append(2.0 ** (number % levels - min(levels, int(number.max()) + 1) // 2).double())
        number = number // levels
    return found


def few(examples: int, dtype: torch.dtype) -> torch.Tensor:
    """Powers of two near each other, so that none drowns the others."""
    levels = min(_FEW_LEVELS, _LEVELS.get(dtype, _FEW_LEVELS))
    return 2.0 ** torch.randint(levels, (examples,), generator=torch.Generator().manual_seed(examples))


def confirm(
    rows: Sequence[tuple[int, ...]],
    asked: Rows,
    passes: Sequence[Sequence[torch.Tensor]],
    split: Split,
    s: Sequence[torch.Tensor],
    kept: Sequence[Owned | None],
) -> list[Owned | None]:
    """The first suggestion for each call that every scaled pass agrees with, or None."""
    found = []
    for k, (group, own) in enumerate(zip(asked.groups, asked.asked, strict=True)):
        suggested = [_candidates(rows[i], split, kept[i]) for i in group]
        found.append(_confirmed([rows[i] for i in group], own, [scaled[k] for scaled in passes], s, suggested))
    return asked.each(found)


def _confirmed(
    rows: Sequence[tuple[int, ...]],
    asked: Asked,
    passes: Sequence[torch.Tensor],
    s: Sequence[torch.Tensor],
    left: list[list[Owned]],
) -> list[Owned | None]:
    """Of calls of one layer, what is suggested of each in turn until all agrees."""
    found: list[Owned | None] = [None] * len(rows)
    while any(left):
        now = [candidates.pop(0) if candidates else None for candidates in left]
        owner = torch.cat([_owner(one, shape) for one, shape in zip(now, rows, strict=True)])
        holds = torch.ones_like(asked.alive)
        for scaled, by in zip(passes, s, strict=True):
            factor = torch.where(owner < 0, torch.zeros((), dtype=by.dtype), by[owner.clamp(min=0)]).to(scaled)
            holds &= asked.scaled_by(scaled, factor) | ~asked.alive
        for i, agrees in enumerate(asked.every(holds)):
            if agrees and now[i] is not None:
                found[i] = now[i]
                left[i] = []
    return found


def _candidates(rows: tuple[int, ...], split: Split, old: Owned | None) -> list[Owned]:
    """What a call may be: what it was, and what its shape suggests."""
    known = old is not None and old.place.examples == split.examples
    candidates = [old] if known and old is not None else []
    candidates += [Owned(place) for place in split.suggested(rows)]
    return [one for one in candidates if not one.mixes and not isinstance(one.place, Together)]


def _owner(candidate: Owned | None, rows: tuple[int, ...]) -> torch.Tensor:
    """The example of each row, (rows,); -1 of a call that nothing is suggested for."""
    if candidate is None or isinstance(candidate.place, Together):
        return torch.full((prod(rows),), -1)
    return candidate.place.owner()


def search(
    rows: Sequence[tuple[int, ...]],
    asked: Rows,
    passes: Sequence[Sequence[torch.Tensor]],
    split: Split,
    calls: set[int],
) -> dict[int, Owned | None]:
    """The maps of some calls, read from one pass a binary digit; None where a row agrees with neither digit, so mixes
    examples."""
    found: dict[int, Owned | None] = {}
    for k, (group, own) in enumerate(zip(asked.groups, asked.asked, strict=True)):
        if calls.isdisjoint(group):
            continue
        owner = torch.zeros(len(own.size), dtype=torch.int64, device=own.size.device)
        pure = torch.ones_like(own.alive)
        one = torch.ones_like(own.size)
        for digit, after in enumerate(scaled[k] for scaled in passes):
            high = own.scaled_by(after, 2 * one)
            owner += high.to(torch.int64) << digit
            pure &= high ^ own.scaled_by(after, one)
        there = own.every((pure & (owner < split.examples)) | ~own.alive)  # one without a gradient agrees with all
        owner = torch.where(own.alive, owner, -1).cpu()
        for i, part, ok in zip(group, owner.split(own.lengths), there, strict=True):
            if i in calls:
                found[i] = _read(rows[i], part, split) if ok else None
    return found


def _read(rows: tuple[int, ...], owner: torch.Tensor, split: Split) -> Owned:
    """The map of a call, of which rows without an example are negative."""
    undecided = torch.nonzero(owner < 0)[:, 0]
    if not len(undecided):
        return Owned(grouped(rows, owner, split.examples), shaped=False)
    return Owned(grouped(rows, _filled(owner), split.examples), shaped=False, undecided=undecided)


def waiting(rows: tuple[int, ...], split: Split) -> Owned:
    """Rows of which none has a gradient, where shapes say nothing: nobody's until one has."""
    count = prod(rows)
    owner = torch.full((count,), -1)
    return Owned(grouped(rows, owner, split.examples), shaped=False, undecided=torch.arange(count))


def dealt(known: Sequence[Owned | None], fresh: Sequence[Owned], names: Sequence[str]) -> list[Owned | None]:
    """Calls of layers `names`, what is `fresh` where nothing was known; those of which no row has a gradient go with an
    example that no other call of the layer has, in order: their rows count in the mean of inputs, and beside those of
    another example only where none is left."""
    given = iter(fresh)
    found = [next(given) if owned is None else owned for owned in known]
    dealt: list[Owned | None] = list(found)
    waiting = [i for i, owned in enumerate(found) if owned.unmoved]
    free: dict[str, list[int]] = {}
    for name, examples in {names[i]: found[i].place.examples for i in waiting}.items():
        others = [x.place for x, n in zip(found, names, strict=True) if n == name and not x.unmoved]
        taken = {int(k) for place in others if not isinstance(place, Together) for k in place.owner().unique()}
        free[name] = [k for k in range(examples) if k not in taken]
    for i in waiting:
        owned = dealt[i]
        assert owned is not None
        assert isinstance(owned.place, Groups)
        left = free[names[i]]
        example = left.pop(0) if left else 0
        dealt[i] = replace(owned, place=replace(owned.place, of=torch.full_like(owned.place.of, example)))
    return dealt


def mixed(rows: tuple[int, ...], first: torch.Tensor, second: torch.Tensor, split: Split, s: torch.Tensor) -> Owned:
    """Rows that move several examples; the shape is kept in mind where each still moves one of them most. `second` is
    scaled by numbers s of which none drowns the others."""
    like = None
    for place in by_shape(rows, split.examples):
        own = s[place.owner()].to(second)[:, None] * first
        if float((second - own).square().sum()) < 0.25 * float(own.square().sum()):
            like = place
            break
    return Owned(Together(rows, like), mixes=True)


def settled(owned: Owned, alive: torch.Tensor) -> Owned:
    """With the rows that had no gradient noted."""
    return replace(owned, undecided=torch.nonzero(~alive)[:, 0])


def still(old: Owned, new: Owned) -> Owned:
    """The newer finding; where both are the same, rows that either decided are decided."""
    if old.undecided is None or new.undecided is None or not (old.shaped and new.shaped and old.place == new.place):
        return new
    both = new.undecided[torch.isin(new.undecided, old.undecided)]
    return replace(new, undecided=both if len(both) else None)


def _filled(owner: torch.Tensor) -> torch.Tensor:
    """Undecided rows go with the row before them, the first ones with the first decided; where that would pad all
    examples to far more rows than they have, as of masked pixels, with those that have fewest."""
    known = owner >= 0
    place = torch.where(known, torch.arange(len(owner)), -1)
    place = torch.cummax(place, 0).values
    first = int(torch.nonzero(known)[0, 0])
    filled = owner[place.clamp(min=first)]
    counts = torch.bincount(owner[known])
    there = torch.nonzero(counts)[:, 0]
    level = max(int(counts.max()), -(-len(owner) // len(there)))
    if int(torch.bincount(filled).max()) <= RAGGED * level:
        return filled
    free = torch.repeat_interleave(there, level - counts[there])
    owner = owner.clone()
    owner[~known] = free[: int((~known).sum())]
    return owner
