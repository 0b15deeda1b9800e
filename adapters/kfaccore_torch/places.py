"""Where the rows of a call stand in a record: by example and position, ragged groups padded, or all in one example.

Rows of a call are the axes of its output before the features. A place moves arrays (..., *rows, d) to
(..., examples, positions, d).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod

import torch

RAGGED = 2  # positions a row from which on a padded layout is avoided where that can be


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


@dataclass(frozen=True, eq=False)
class Groups:
    """Any map of rows to examples: `of` is the example of each row, (rows,), -1 where it has none. The padded index is
    made when it is asked for: one long example among short ones makes it far larger than the rows."""

    rows: tuple[int, ...]
    of: torch.Tensor
    examples: int

    def owner(self) -> torch.Tensor:
        """The example of each row, (rows,); -1 where it has none."""
        return self.of

    @cached_property
    def counts(self) -> torch.Tensor:
        """How many rows each example has."""
        return torch.bincount(self.of[self.of >= 0], minlength=self.examples)

    @property
    def positions(self) -> tuple[int, ...]:
        """Ragged: the longest."""
        return (max(1, int(self.counts.max()) if len(self.counts) else 1),)

    @cached_property
    def exists(self) -> torch.Tensor:
        """(examples, positions), true where a row is."""
        return torch.arange(self.positions[0]) < self.counts[:, None]

    @cached_property
    def index(self) -> torch.Tensor:
        """(examples, positions) into the rows."""
        order = torch.argsort(self.of, stable=True)[int((self.of < 0).sum()) :]
        index = torch.zeros(self.exists.shape, dtype=torch.int64)
        index[self.exists] = order
        return index

    @property
    def sparse(self) -> bool:
        """Whether most positions do not exist."""
        return self.examples * self.positions[0] > RAGGED * prod(self.rows)

    @property
    def there(self) -> torch.Tensor | None:
        """The rows that have an example, (rows,); None where all have one."""
        return self.of >= 0 if bool((self.of < 0).any()) else None

    def put(self, x: torch.Tensor) -> torch.Tensor:
        """Rows gathered; what does not exist is masked by the record."""
        x = x.reshape(*x.shape[: x.ndim - 1 - len(self.rows)], -1, x.shape[-1])
        return x[..., self.index.to(x.device), :]

    def mask(self) -> torch.Tensor | None:
        """Which positions exist."""
        return None if bool((self.counts == self.positions[0]).all()) else self.exists


@dataclass(frozen=True)
class Together:
    """All rows are positions of one example, in the order of `like` where a shape suggests one; `exists`, (rows,),
    leaves some of them out."""

    rows: tuple[int, ...]
    like: Axes | None = None
    examples: int = 1
    exists: torch.Tensor | None = field(default=None, compare=False)

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
        """Which positions exist."""
        return None if self.exists is None else self.exists[None]


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
    return Groups(rows, owner.reshape(-1).cpu(), examples)


def together(place: Place) -> Together:
    """The same rows as positions of one example."""
    if isinstance(place, Together):
        return place
    axes = isinstance(place, Axes)
    return Together(place.rows, place if axes else None, exists=None if axes else place.there)


def joined(place: Place, exact: bool) -> Place:
    """The place of rows that mix examples: all together, or, where a rule needs rows an example, as shapes suggest."""
    like = place if isinstance(place, Axes) else place.like if isinstance(place, Together) else None
    return like if like is not None and not exact else Together(place.rows, like)


def plainly(place: Place, examples: int, ragged: bool) -> Place:
    """Rows for what does not look at examples: those of one example dealt to as many as their first axis has, where
    that is the number of `examples`, so that it sees a convolution's image, and no copy. Ragged ones are not padded:
    those of examples, nor what rows themselves are made of."""
    if ragged or (isinstance(place, Groups) and place.sparse):
        return replace(together(place), like=None)
    if not isinstance(place, Together) or place.exists is not None:
        return place
    plain = Axes(place.rows, 0, examples)
    return plain if place.rows[0] == examples and examples > 1 else place
