"""Where the elements of a tensor sit in the variable that it came from: an offset and strides, followed without memory.

Transposes, reshapes and slices of a variable are views of it; the inverse of any chain of them is reading or writing
through the strides that are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np

Axis = tuple[int, int]  # size, stride in elements


@dataclass(frozen=True)
class Layout:
    """Element (i, j, ...) is number offset + i stride_0 + j stride_1 + ... of the variable, row-major."""

    offset: int
    axes: tuple[Axis, ...]

    @classmethod
    def of(cls, shape: Sequence[int]) -> Layout:
        """A variable as it is."""
        return cls(0, tuple((int(size), prod(int(s) for s in shape[i + 1 :])) for i, size in enumerate(shape)))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(size for size, _ in self.axes)

    @property
    def size(self) -> int:
        return prod(self.shape)

    def transposed(self, order: Sequence[int]) -> Layout:
        """Axes in another order."""
        return replace(self, axes=tuple(self.axes[i] for i in order))

    def reshaped(self, shape: Sequence[int]) -> Layout:
        """Axes split and joined; ValueError where joined axes are not neighbours in memory."""
        groups = self.grouped(shape)
        if any(len(group) > 1 for group in groups):
            raise ValueError("a reshape joins axes that are not neighbours in the variable")
        return replace(self, axes=tuple(group[0] if group else (1, 0) for group in groups))

    def grouped(self, shape: Sequence[int]) -> tuple[tuple[Axis, ...], ...]:
        """The axes that each axis of a reshape is made of; ValueError where one spans a part of another's."""
        waiting = list(reversed(joined(self.axes)))
        groups = []
        for size in (int(s) for s in shape):
            group = []
            while size != 1:
                have, stride = waiting.pop() if waiting else (1, 0)
                taken = min(have, size)
                if taken <= 1 or have % taken or size % taken:
                    raise ValueError("a reshape joins axes that are not neighbours in the variable")
                group.append((taken, stride * (have // taken)))
                size //= taken
                if have > taken:
                    waiting.append((have // taken, stride))
            groups.append(tuple(group))
        return tuple(groups)

    def sliced(self, axis: int, start: int, count: int, step: int = 1) -> Layout:
        """`count` elements of an axis from `start` on."""
        stride = self.axes[axis][1]
        axes = (*self.axes[:axis], (count, stride * step), *self.axes[axis + 1 :])
        return Layout(self.offset + start * stride, axes)

    def flipped(self, axis: int) -> Layout:
        """An axis backwards."""
        size = self.axes[axis][0]
        return self.sliced(axis, size - 1, size, -1)

    def take(self, variable: np.ndarray) -> np.ndarray:
        """The elements of a variable, as an array of this shape; a view of a contiguous one."""
        flat = np.ascontiguousarray(variable).reshape(-1)
        return self._view(flat)

    def put(self, variable: np.ndarray, values: np.ndarray) -> None:
        """Writes them into a contiguous variable."""
        self._view(variable.reshape(-1))[...] = values

    def _view(self, flat: np.ndarray) -> np.ndarray:
        strides = [stride * flat.itemsize for _, stride in self.axes]
        return np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, strides)


def joined(axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """Axes without those of size 1, neighbours in memory as one: equal for equal orders of elements."""
    found: list[Axis] = []
    for size, stride in axes:
        if size == 1:
            continue
        if found and found[-1][1] == stride * size:
            found[-1] = (found[-1][0] * size, stride)
        else:
            found.append((size, stride))
    return tuple(found)


@dataclass(frozen=True)
class Matrix:
    """The matrix (blocks, d_out, d_in) that elements of a variable make."""

    offset: int
    blocks: tuple[Axis, ...]
    outs: tuple[Axis, ...]
    ins: tuple[Axis, ...] = ()

    @classmethod
    def split(cls, layout: Layout, blocks: Sequence[int], outs: Sequence[int], ins: Sequence[int] = ()) -> Matrix:
        """From places of a layout's axes."""
        return cls(layout.offset, *(tuple(layout.axes[i] for i in group) for group in (blocks, outs, ins)))

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(blocks, d_out, d_in)."""
        blocks, outs, ins = (prod(size for size, _ in group) for group in (self.blocks, self.outs, self.ins))
        return blocks, outs, ins

    @property
    def key(self) -> tuple:
        """Equal where the matrices are one."""
        return self.offset, joined(self.blocks), joined(self.outs), joined(self.ins)

    def turned(self) -> Matrix:
        """The transpose of each block."""
        return replace(self, outs=self.ins, ins=self.outs)

    def layout(self) -> Layout:
        """All axes: blocks, outs, ins."""
        return Layout(self.offset, (*self.blocks, *self.outs, *self.ins))

    def of(self, variable: np.ndarray) -> np.ndarray:
        """(blocks, d_out, d_in) of an array like the variable."""
        return self.layout().take(variable).reshape(self.sizes)

    def into(self, variable: np.ndarray, matrix: np.ndarray) -> None:
        """The inverse of `of`, into a contiguous array like the variable."""
        layout = self.layout()
        layout.put(variable, matrix.reshape(layout.shape))
