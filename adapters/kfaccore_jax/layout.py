"""Where the elements of a parameter leaf lie: shape, element strides and offset; no arrays, no memory.

A chain of reshape, transpose, slice and broadcast is followed by moving a Layout, and undone by reading it backwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

Axis = tuple[int, int]  # size, stride


@dataclass(frozen=True)
class Layout:
    """Element (i, j, ...) of a value is element offset + i strides[0] + ... of the flat leaf; stride 0 repeats."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> Layout:
        """Row-major."""
        return cls(tuple(shape), tuple(prod(shape[i + 1 :]) for i in range(len(shape))))

    @classmethod
    def from_axes(cls, axes: tuple[Axis, ...], offset: int = 0) -> Layout:
        """One axis a pair."""
        return cls(tuple(n for n, _ in axes), tuple(s for _, s in axes), offset)

    @property
    def axes(self) -> tuple[Axis, ...]:
        """(size, stride) of each axis."""
        return tuple(zip(self.shape, self.strides, strict=True))

    @property
    def repeated(self) -> bool:
        """Whether an element is seen more than once; axes of one element have any stride."""
        return any(s == 0 and n > 1 for n, s in self.axes)

    def transpose(self, order: tuple[int, ...]) -> Layout:
        """The axes in another order."""
        return Layout.from_axes(tuple(self.axes[i] for i in order), self.offset)

    def squeeze(self, dimensions: tuple[int, ...]) -> Layout:
        """Without the axes named, which have size 1."""
        drop = {d % len(self.shape) for d in dimensions}
        return Layout.from_axes(tuple(x for i, x in enumerate(self.axes) if i not in drop), self.offset)

    def broadcast(self, shape: tuple[int, ...], places: tuple[int, ...]) -> Layout:
        """Axis i goes to places[i] of `shape`; new axes and stretched ones have stride 0."""
        strides = [0] * len(shape)
        for (n, s), place in zip(self.axes, places, strict=True):
            strides[place] = s if n == shape[place] and n > 1 else 0
        return Layout(tuple(shape), tuple(strides), self.offset)

    def stretch(self, shape: tuple[int, ...]) -> Layout:
        """Broadcast by the usual rule, trailing axes aligned."""
        return self.broadcast(shape, tuple(range(len(shape) - len(self.shape), len(shape))))

    def slice(self, start: tuple[int, ...], limit: tuple[int, ...], step: tuple[int, ...] | None = None) -> Layout:
        """Entries from `start` to `limit` in steps, along each axis."""
        step = step or (1,) * len(start)
        axes = tuple((-(-(b - a) // k), s * k) for a, b, k, (_, s) in zip(start, limit, step, self.axes, strict=True))
        return Layout.from_axes(axes, self.offset + sum(a * s for a, s in zip(start, self.strides, strict=True)))

    def reshape(self, new: tuple[int, ...]) -> Layout | None:
        """The same elements in the same order under another shape, or None where strides cannot say it."""
        if prod(new) != prod(self.shape) or prod(new) == 0:
            return None
        old = [axis for axis in self.axes if axis[0] != 1]
        strides = [0] * len(new)
        i = 0
        j = 0
        wanted = [k for k, n in enumerate(new) if n != 1]
        while j < len(wanted):
            last_i = i
            last_j = j
            have = old[i][0]
            need = new[wanted[j]]
            while have != need:
                if have < need:
                    last_i += 1
                    have *= old[last_i][0]
                else:
                    last_j += 1
                    need *= new[wanted[last_j]]
            if any(old[k][1] != old[k + 1][0] * old[k + 1][1] for k in range(i, last_i)):
                return None
            stride = old[last_i][1]
            for k in reversed(wanted[j : last_j + 1]):
                strides[k] = stride
                stride *= new[k]
            i = last_i + 1
            j = last_j + 1
        return Layout(tuple(new), tuple(strides), self.offset)

    def region(self, size: int) -> tuple[tuple[int, ...], tuple[Any, ...], tuple[int, ...]] | None:
        """(dims, index, order): `leaf.reshape(dims)[index]` holds the elements in the order of falling strides, `order`
        lists this layout's axes in it; None where they are no box of the leaf (size elements)."""
        order = sorted((i for i, n in enumerate(self.shape) if n > 1), key=lambda i: -self.strides[i])
        dims = []
        index = []
        rest = self.offset
        outer = size
        for n, s in merged(tuple(self.axes[i] for i in order)):
            if s == 0 or outer % s:
                return None
            first, rest = divmod(rest, s)
            if first + n > outer // s:
                return None
            dims.append(outer // s)
            index.append(slice(first, first + n))
            outer = s
        return (*dims, outer), (*index, rest), tuple(order)


def merged(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
    """The shortest list of axes that visits the same elements in the same order."""
    found: list[Axis] = []
    for n, s in axes:
        if n == 1:
            continue
        if found and found[-1][1] == n * s:
            found[-1] = (found[-1][0] * n, s)
        else:
            found.append((n, s))
    return tuple(found)


def take(leaf: Any, layout: Layout, shape: tuple[int, ...]) -> Any:
    """The elements of `layout` in its order, as `shape`."""
    dims, index, order = _box(layout, leaf.size)
    back = sorted(range(len(order)), key=lambda i: order[i])
    return leaf.reshape(dims)[index].reshape([layout.shape[i] for i in order]).transpose(back).reshape(shape)


def put(leaf: Any, layout: Layout, part: Any) -> Any:
    """`leaf` with the elements of `layout` replaced by `part`, of any shape in the layout's order."""
    dims, index, order = _box(layout, leaf.size)
    part = part.reshape([n for n in layout.shape if n > 1])
    rank = {axis: i for i, axis in enumerate(sorted(order))}
    part = part.transpose([rank[axis] for axis in order]).astype(leaf.dtype)
    if part.size == leaf.size:
        return part.reshape(leaf.shape)
    box = [x.stop - x.start for x in index[:-1]]
    return leaf.reshape(dims).at[index].set(part.reshape(box)).reshape(leaf.shape)


def _box(layout: Layout, size: int) -> Any:
    found = layout.region(size)
    if found is None:
        raise ValueError(f"{layout} is no box of a leaf of {size} elements")
    return found
