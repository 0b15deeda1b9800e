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

from kfaccore_torch.places import Groups, Place, Together, by_shape, grouped
from kfaccore_torch.split import Split

_ROUNDINGS = 32  # of the largest number: what sums that should cancel leave; of 16 bits, summed in 32, fewer
_FEW_ROUNDINGS = 4
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
    undecided   rows without a gradient so far, (k,)
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
    def unmoved(self) -> bool:
        """Whether no row has a gradient and shapes say nothing of their examples."""
        return not (self.mixes or self.shaped or self.decided)


@dataclass(frozen=True)
class Asked:
    """Rows (rows, d) of one call under the draw v, and how large they are."""

    first: torch.Tensor
    size: torch.Tensor
    alive: torch.Tensor

    @classmethod
    def of(cls, first: torch.Tensor) -> Asked:
        """From the rows' gradients of the first draw; rows of rounding alone do not count."""
        size = first.abs().amax(1)
        largest = size.max() if len(size) else size.sum()
        return cls(first, size, size > rounding(first.dtype) * largest)

    def scaled_by(self, second: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """Whether each row is `factor` times what it was, (rows,). What is let pass goes with the factor: beside a
        factor of 2^-64 anything else would."""
        info = torch.finfo(self.first.dtype)
        slack = min(info.eps**0.5, 0.02)
        factor = factor.to(second)
        gap = (second - factor[:, None] * self.first).abs().amax(1)
        near = rounding(self.first.dtype)
        least = info.tiny if info.bits > 16 else near * info.tiny  # what is below the smallest number is cut off
        return gap <= factor * (slack * self.size + near * self.size.max()) + least

    def multiplied(self, second: torch.Tensor, factor: float) -> bool:
        """Whether all rows are `factor` times what they were, a power of two, to what passes of one draw differ by."""
        eps = torch.finfo(self.first.dtype).eps
        gap = (second / factor - self.first).abs().amax(1)
        return bool((gap <= min(eps**0.5, 0.02) * self.size + rounding(self.first.dtype) * self.size.max()).all())


def rounding(dtype: torch.dtype) -> float:
    """How small beside the largest a gradient may be that is rounding alone, as that of a query which sees one key."""
    info = torch.finfo(dtype)
    return (_ROUNDINGS if info.bits > 16 else _FEW_ROUNDINGS) * info.eps


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
    asked: Sequence[Asked],
    passes: Sequence[Sequence[torch.Tensor]],
    split: Split,
    s: Sequence[torch.Tensor],
    kept: Sequence[Owned | None],
) -> list[Owned | None]:
    """The first suggestion for each call that every scaled pass agrees with, or None."""
    found: list[Owned | None] = []
    for i, (shape, before, old) in enumerate(zip(rows, asked, kept, strict=True)):
        candidates = [] if old is None or old.place.examples != split.examples else [old]
        candidates += [Owned(place) for place in split.suggested(shape)]
        after = [scaled[i] for scaled in passes]
        found.append(next((c for c in candidates if _agrees(c, before, after, s)), None))
    return found


def _agrees(candidate: Owned, before: Asked, after: Sequence[torch.Tensor], s: Sequence[torch.Tensor]) -> bool:
    place = candidate.place
    if candidate.mixes or isinstance(place, Together):
        return False
    owner = place.owner()
    for scaled, by in zip(after, s, strict=True):
        factor = torch.where(owner < 0, torch.zeros((), dtype=by.dtype), by[owner.clamp(min=0)]).to(scaled)
        if not bool((before.scaled_by(scaled, factor) | ~before.alive).all()):
            return False
    return True


def search(rows: tuple[int, ...], before: Asked, passes: Sequence[torch.Tensor], split: Split) -> Owned | None:
    """The map read from one pass a binary digit; None where a row agrees with neither digit, so mixes examples."""
    owner = torch.zeros(len(before.size), dtype=torch.int64, device=before.size.device)
    pure = torch.ones_like(before.alive)
    one = torch.ones_like(before.size)
    for digit, after in enumerate(passes):
        high = before.scaled_by(after, 2 * one)
        owner += high.to(torch.int64) << digit
        pure &= high ^ before.scaled_by(after, one)
    alive = owner[before.alive]  # a row without a gradient agrees with every digit
    if bool((before.alive & ~pure).any()) or int(alive.max()) >= split.examples:
        return None
    owner = torch.where(before.alive, owner, -1).cpu()
    place = grouped(rows, _filled(owner), split.examples)
    return Owned(place, shaped=False, undecided=torch.nonzero(owner < 0)[:, 0] if bool((owner < 0).any()) else None)


def waiting(rows: tuple[int, ...], split: Split) -> Owned:
    """Rows of which none has a gradient, where shapes say nothing: nobody's until one has."""
    count = prod(rows)
    owner = torch.full((count,), -1)
    return Owned(grouped(rows, owner, split.examples), shaped=False, undecided=torch.arange(count))


def dealt(found: Sequence[Owned | None], names: Sequence[str]) -> list[Owned | None]:
    """Calls of layers `names`, those of which no row has a gradient with an example that no other call of the layer
    has, in order: their rows count in the mean of inputs, and beside those of another example only where none is left.
    """
    dealt = list(found)
    waiting = [i for i, owned in enumerate(found) if owned is not None and owned.unmoved]
    free: dict[str, list[int]] = {}
    for name in {names[i] for i in waiting}:
        others = [x.place for x, n in zip(found, names, strict=True) if n == name and x is not None and not x.unmoved]
        taken = {int(k) for place in others if not isinstance(place, Together) for k in place.owner().unique()}
        free[name] = [k for k in range(others[0].examples if others else 0) if k not in taken]
    for i in waiting:
        owned = dealt[i]
        assert owned is not None and isinstance(owned.place, Groups)
        left = free[names[i]]
        example = left.pop(0) if left else 0
        dealt[i] = replace(owned, place=replace(owned.place, of=torch.full_like(owned.place.of, example)))
    return dealt


def mixed(rows: tuple[int, ...], before: Asked, second: torch.Tensor, split: Split, s: torch.Tensor) -> Owned:
    """Rows that move several examples; the shape is kept in mind where each still moves one of them most. `second` is
    scaled by numbers s of which none drowns the others."""
    like = None
    for place in by_shape(rows, split.examples):
        own = s[place.owner()].to(second)[:, None] * before.first
        if float((second - own).square().sum()) < 0.25 * float(own.square().sum()):
            like = place
            break
    return Owned(Together(rows, like), mixes=True)


def settled(owned: Owned, alive: torch.Tensor) -> Owned:
    """With the rows that had no gradient noted."""
    dead = ~alive
    return replace(owned, undecided=torch.nonzero(dead)[:, 0].cpu() if bool(dead.any()) else None)


def still(old: Owned, new: Owned) -> Owned:
    """The newer finding; where both are the same, rows that either decided are decided."""
    if old.undecided is None or new.undecided is None or not (old.shaped and new.shaped and old.place == new.place):
        return new
    both = new.undecided[torch.isin(new.undecided, old.undecided)]
    return replace(new, undecided=both if len(both) else None)


def _filled(owner: torch.Tensor) -> torch.Tensor:
    """Undecided rows go with the row before them, the first ones with the first decided."""
    known = owner >= 0
    place = torch.where(known, torch.arange(len(owner)), -1)
    place = torch.cummax(place, 0).values
    first = int(torch.nonzero(known)[0, 0])
    return owner[place.clamp(min=first)]
