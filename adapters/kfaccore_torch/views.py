"""Which elements of a parameter an operation was given, and in which order.

A view is a box of the parameter's memory order: each of its axes is made of strides through the flattened parameter.
Transposes, slices, splits, reshapes and casts of a parameter are followed on what autograd kept of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import array_api_compat as aac
import torch

Fine = tuple[int, int]  # size and stride, in elements of the flattened parameter
Cut = tuple[int, int, int]  # of a range: its beginning, how many pieces it is split into, and their length


@dataclass(frozen=True)
class View:
    """Axes of fine axes (size, stride), slowest first, from `offset` on; a stride of 0 repeats."""

    axes: tuple[tuple[Fine, ...], ...]
    offset: int = 0

    @classmethod
    def whole(cls, shape: Sequence[int]) -> View:
        """All of a parameter as it is."""
        return cls(tuple(_fine((n, prod(shape[i + 1 :]))) for i, n in enumerate(shape)))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(prod(n for n, _ in axis) for axis in self.axes)

    def permuted(self, order: Sequence[int]) -> View:
        """The axes in another order."""
        return View(tuple(self.axes[i] for i in order), self.offset)

    def narrowed(self, axis: int, start: int, size: int, step: int = 1) -> View | None:
        """`size` elements of an axis; None where the axis is no single stride."""
        if (start, size, step) == (0, self.shape[axis], 1):
            return self
        if len(self.axes[axis]) > 1:
            return None
        stride = self.axes[axis][0][1] if self.axes[axis] else 0
        axes = (*self.axes[:axis], _fine((size, stride * step)), *self.axes[axis + 1 :])
        return View(axes, self.offset + start * stride)

    def reshaped(self, shape: Sequence[int]) -> View | None:
        """The same elements in the same order on other axes; None where that splits no stride evenly."""
        left = [fine for axis in self.axes for fine in axis]
        axes = []
        for size in shape:
            axis: list[Fine] = []
            while prod(n for n, _ in axis) < size:
                n, stride = left.pop(0)
                need = size // prod(m for m, _ in axis)
                if n <= need:
                    axis.append((n, stride))
                elif n % need:
                    return None
                else:
                    axis.append((need, stride * (n // need)))
                    left.insert(0, (n // need, stride))
            if prod(n for n, _ in axis) != size:
                return None
            axes.append(_merged(axis))
        return View(tuple(axes), self.offset)

    def expanded(self, shape: Sequence[int]) -> View:
        """New axes in front, and axes of 1 repeated."""
        old = ((),) * (len(shape) - len(self.axes)) + self.axes
        sizes = (1,) * (len(shape) - len(self.axes)) + self.shape
        pairs = zip(old, sizes, shape, strict=True)
        return View(tuple(axis if n == now else ((now, 0),) for axis, n, now in pairs), self.offset)

    @property
    def repeats(self) -> bool:
        """Whether an element appears more than once."""
        return any(stride == 0 for axis in self.axes for _, stride in axis)

    def boxed(self, numel: int) -> tuple[tuple[Cut, ...], tuple[int, ...]] | None:
        """(how the flattened parameter is cut into the box's axes, their order in the view); None where it is no box.

        Axes go from the largest stride: of what is left, a range that the axis divides evenly, beginning as late as it
        can, so that the next one has the most room.
        """
        fine = [f for axis in self.axes for f in axis]
        order = sorted(range(len(fine)), key=lambda i: -fine[i][1])
        room = numel
        offset = self.offset
        cuts: list[Cut] = []
        for i in order:
            n, stride = fine[i]
            start = min(offset, room - n * stride)
            offset -= start
            if start < 0 or offset >= stride:
                return None
            cuts.append((start, n, stride))
            room = stride
        cuts.append((offset, 1, 1))
        places = [order.index(i) for i in range(len(fine))]
        return tuple(cuts), (*places, len(fine))

    def take(self, x: Any) -> Any:
        """The elements of x, an array or tensor like the parameter, in the view's shape."""
        cuts, order = self._box(x)
        xp = aac.array_namespace(x)
        found = xp.reshape(x, (-1,))
        for start, n, stride in cuts:  # a range of the last axis, split in two: no copies
            found = found[..., start : start + n * stride]
            found = xp.reshape(found, (*found.shape[:-1], n, stride))
        return xp.reshape(xp.permute_dims(found[..., 0], order), self.shape)

    def put(self, part: Any, like: tuple[int, ...]) -> Any:
        """Zeros of the shape `like` with the view's elements in their places."""
        xp = aac.array_namespace(part)
        cuts, order = self._box(part, prod(like))
        sizes = [n for _, n, _ in cuts]
        back = sorted(range(len(order)), key=lambda i: order[i])
        found = xp.permute_dims(xp.reshape(part, [sizes[i] for i in order]), back)[..., None]
        rooms = (prod(like), *(stride for _, _, stride in cuts))
        for (start, n, stride), room in zip(reversed(cuts), reversed(rooms[:-1]), strict=True):
            lead = found.shape[:-2]
            found = xp.reshape(found, (*lead, n * stride))
            if n * stride < room:
                wide = xp.zeros((*lead, room), dtype=part.dtype, device=aac.device(part))
                wide[..., start : start + n * stride] = found
                found = wide
        return xp.reshape(found, like)

    def _box(self, x: Any, numel: int | None = None) -> tuple[tuple[Cut, ...], tuple[int, ...]]:
        numel = prod(x.shape) if numel is None else numel
        found = self.boxed(numel)
        if found is None:
            raise ValueError(f"{self} is no box of a parameter of {numel} numbers")
        return found

    def within(self, x: torch.Tensor) -> torch.Tensor | None:
        """The elements of x as a view of its memory, to write to; None where x lies in another order."""
        if not x.is_contiguous():
            return None
        fine = [f for axis in self.axes for f in axis]
        return x.as_strided([n for n, _ in fine], [s for _, s in fine], x.storage_offset() + self.offset)


def _fine(fine: Fine) -> tuple[Fine, ...]:
    return () if fine[0] == 1 else (fine,)


def _merged(axis: Sequence[Fine]) -> tuple[Fine, ...]:
    """Fine axes that are one stride joined, so that equal arrangements are equal."""
    found: list[Fine] = []
    for n, stride in axis:
        if n == 1:
            continue
        if found and found[-1][1] == n * stride:
            found[-1] = found[-1][0] * n, stride
        else:
            found.append((n, stride))
    return tuple(found)


@dataclass(frozen=True)
class Ref:
    """Part of a parameter of the model, by the parameter's name.

    factor   what it was multiplied with before it was used, None where it was not
    """

    name: str
    view: View
    factor: float | torch.Tensor | None = field(default=None, compare=False)


def overlapping(views: Iterator[View] | list[View], numel: int) -> bool:
    """Whether two of the views have an element in common."""
    hit = torch.zeros(numel, dtype=torch.bool, device="cpu")
    for view in views:
        part = view.within(hit)
        if part is None or bool(part.any()):
            return True
        part.fill_(True)
    return False
