"""Where the rows of a call stand in a record: by example and position, ragged groups padded, or all in one example.

Rows of a call are the axes of its output before the features. A place moves arrays (..., *rows, d) to
(..., examples, positions, d).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch


@dataclass(frozen=True)
class Axes:
    """The example of a row is read off one of its axes: the index along it, divided (outer) or modulo (inner).

    rows       sizes of the row axes
    axis       which one
    examples   how many there are; they divide the axis
    """

    rows: tuple[int, ...]
    axis: int
    examples: int
    inner: bool = False

    def owner(self) -> torch.Tensor:
        """The example of each row, (rows,)."""
        index = torch.arange(self.rows[self.axis])
        index = index % self.examples if self.inner else index // (len(index) // self.examples)
        shape = [1] * len(self.rows)
        shape[self.axis] = -1
        return index.reshape(shape).expand(self.rows).reshape(-1)

    @property
    def positions(self) -> tuple[int, ...]:
        """Sizes of the axes that are left, in order."""
        apart = self.rows[self.axis] // self.examples
        return (*self.rows[: self.axis], *((apart,) if apart > 1 else ()), *self.rows[self.axis + 1 :])

    @property
    def plain(self) -> bool:
        """Whether the first axis is the examples."""
        return self.axis == 0 and self.rows[0] == self.examples

    def put(self, x: torch.Tensor) -> torch.Tensor:
        """A view where strides allow: with examples behind positions, memory stays in the order of the rows."""
        lead = x.ndim - 1 - len(self.rows)
        axis = lead + self.axis
        if self.axis:
            x = x.contiguous()  # a and g in one order: neither is copied when positions are folded
        apart = self.rows[self.axis] // self.examples
        x = x.unflatten(axis, (apart, self.examples) if self.inner else (self.examples, apart))
        x = x.movedim(axis + self.inner, lead)
        return x.reshape(*x.shape[: lead + 1], prod(self.positions), x.shape[-1])

    def mask(self) -> torch.Tensor | None:
        """Every position exists."""
        return None


@dataclass(frozen=True)
class Groups:
    """Any map of rows to examples: `index` (examples, positions) into the rows, `exists` where it counts."""

    rows: tuple[int, ...]
    index: torch.Tensor
    exists: torch.Tensor

    @property
    def examples(self) -> int:
        """How many there are."""
        return self.index.shape[0]

    def owner(self) -> torch.Tensor:
        """The example of each row, (rows,); -1 where it has none."""
        owner = torch.full((prod(self.rows),), -1)
        examples = torch.arange(self.examples)[:, None].expand_as(self.index)
        owner[self.index[self.exists]] = examples[self.exists]
        return owner

    @property
    def positions(self) -> tuple[int, ...]:
        """Ragged: the longest."""
        return (self.index.shape[1],)

    def put(self, x: torch.Tensor) -> torch.Tensor:
        """Rows gathered; what does not exist is masked by the record."""
        x = x.reshape(*x.shape[: x.ndim - 1 - len(self.rows)], -1, x.shape[-1])
        return x[..., self.index.to(x.device), :]

    def mask(self) -> torch.Tensor | None:
        """Which positions exist."""
        return None if bool(self.exists.all()) else self.exists


@dataclass(frozen=True)
class Together:
    """All rows are positions of one example, in the order of `like` where a shape suggests one."""

    rows: tuple[int, ...]
    like: Axes | None = None
    examples: int = 1

    @property
    def positions(self) -> tuple[int, ...]:
        """All rows as positions of one example."""
        return (prod(self.rows),)

    def put(self, x: torch.Tensor) -> torch.Tensor:
        """(..., 1, rows, d)."""
        lead = x.ndim - 1 - len(self.rows)
        x = x if self.like is None else self.like.put(x)
        return x.reshape(*x.shape[:lead], 1, -1, x.shape[-1])

    def mask(self) -> torch.Tensor | None:
        """Every position exists."""
        return None


Place = Axes | Groups | Together


def by_shape(rows: tuple[int, ...], examples: int) -> Iterator[Axes]:
    """What shapes suggest, likeliest first: an axis of as many examples, or one that they divide, in either order."""
    for axis, size in enumerate(rows):
        if size == examples:
            yield Axes(rows, axis, examples)
    if examples == 1 and 1 not in rows:
        yield Axes(rows, 0, 1)
    for axis, size in enumerate(rows if examples > 1 else ()):
        if size > examples and size % examples == 0:
            yield Axes(rows, axis, examples)
            yield Axes(rows, axis, examples, inner=True)


def grouped(rows: tuple[int, ...], owner: torch.Tensor, examples: int) -> Groups:
    """The place of rows whose examples are known, (rows,); a negative one is nobody's and does not exist."""
    owner = owner.reshape(-1).cpu()
    counts = torch.bincount(owner[owner >= 0], minlength=examples)
    order = torch.argsort(owner, stable=True)[int((owner < 0).sum()) :]
    longest = max(1, int(counts.max()) if len(counts) else 1)
    exists = torch.arange(longest) < counts[:, None]
    index = torch.zeros((examples, longest), dtype=torch.int64)
    index[exists] = order
    return Groups(rows, index, exists)


def joined(place: Place, exact: bool) -> Place:
    """The place of rows that mix examples: all together, or, where a rule needs rows an example, as shapes suggest."""
    like = place if isinstance(place, Axes) else place.like if isinstance(place, Together) else None
    return like if like is not None and not exact else Together(place.rows, like)


def plainly(place: Together, examples: int) -> Place:
    """Rows of one example dealt to as many as their first axis has, where that is the number of `examples`: what does
    not look at examples then sees a convolution's image, and no copy."""
    plain = Axes(place.rows, 0, examples)
    return plain if place.rows[0] == examples and examples > 1 else place
