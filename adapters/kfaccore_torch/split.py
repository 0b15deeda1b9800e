"""How the rows of a prediction make examples, as the shapes of calls suggest it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch

from kfaccore_torch.places import Axes, Place, by_shape, grouped


@dataclass(frozen=True)
class Split:
    """How the rows of a prediction make examples: `examples` of them, their rows behind each other or interleaved.

    apart   the rows of each head where all rows of all heads are examples of their own, those of one head behind those
            of another
    """

    examples: int
    inner: bool = False
    apart: tuple[int, ...] = ()

    @classmethod
    def rows_of(cls, heads: Sequence[torch.Tensor]) -> Split:
        """Every row an example: the same one in all heads where those have as many."""
        sizes = tuple(len(f) for f in heads)
        return cls(sizes[0]) if len(set(sizes)) == 1 else cls(sum(sizes), apart=sizes)

    def fits(self, heads: Sequence[torch.Tensor]) -> bool:
        """Whether every head has rows of all examples."""
        return bool(self.apart) or not any(len(f) % self.examples for f in heads)

    def of(self, head: int) -> Split:
        """That of one head alone."""
        return Split(self.apart[head]) if self.apart else self

    def owner(self, rows: int, head: int) -> torch.Tensor:
        """The example of each row of a head of the prediction."""
        if self.apart:
            return sum(self.apart[:head]) + torch.arange(rows)
        return Axes((rows,), 0, self.examples, self.inner).owner()

    def suggested(self, rows: tuple[int, ...]) -> Iterator[Place]:
        """Where shapes suggest that rows of a call stand, likeliest first."""
        if not self.apart:
            yield from by_shape(rows, self.examples)
        for head, size in enumerate(self.apart):
            if size == prod(rows):
                yield grouped(rows, self.owner(size, head), self.examples)


def splits(rows: Sequence[tuple[int, ...]], size: int) -> list[Split]:
    """Ways in which `size` rows of a prediction may be examples, by how many calls suggest each: those calls have an
    axis of as many, and others beside it that the prediction has joined to it."""
    votes: dict[Split, float] = {Split(size): sum(size in shape for shape in rows)}
    wide = [shape for shape in rows if len(shape) > 1]
    single = bool(wide) and all(shape[0] == 1 for shape in wide)
    for shape in wide:
        for axis in (0, 1):
            b = shape[axis]
            if b >= size or size % b or (b == 1 and not single) or (size in shape and not single):
                continue
            for inner in (False, True) if b > 1 else (False,):
                split = Split(b, inner)  # rows flattened in the order of the axes, or turned first
                votes[split] = votes.get(split, 0) + (1.0 if inner == bool(axis) else 0.5)
    return sorted(votes, key=lambda split: -votes[split])


def flattened(rows: Sequence[tuple[int, ...]], size: int) -> list[Split]:
    """Ways in which `size` numbers of a prediction may be features of fewer examples, a row of a call each. They are
    coarser, and so explain whatever finer ones do: of use where those leave rows that mix."""
    counts = Counter(shape[0] for shape in rows if len(shape) == 1 and 1 < shape[0] < size and size % shape[0] == 0)
    return [Split(b, inner) for b, _ in counts.most_common() for inner in (False, True)]


def candidates(rows: Sequence[tuple[int, ...]], each: Split) -> tuple[list[Split], list[Split]]:
    """Splits to ask for, and coarser ones; `each` has every row for an example. Heads of other lengths have examples in
    common only where that explains more."""
    if not each.apart:
        return splits(rows, each.examples), flattened(rows, each.examples)
    size = min(each.apart)
    return [each], [*splits(rows, size), *flattened(rows, size)] if size else []
