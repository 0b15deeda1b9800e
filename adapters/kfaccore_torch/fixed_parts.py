"""Rules of `fixed_rules` for parts of a tensor: cut out of it, or joined."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from kfaccore_torch.fixed import Part
from kfaccore_torch.provenance import axis_of, output_shape

Shape = tuple[int, ...]
Found = np.ndarray | Part | None


def ends(node: Any, joins: bool, axis: int) -> list[int | None]:
    """Where each part ends along an axis, of what it joins from the front as far as sizes are known, from the back
    after a constant, whose size autograd does not keep; None between two of them."""
    if not joins:
        return list(accumulate(tuple(one.shape)[axis] for one in node._input_metadata))
    sizes = [None if child is None else _shape(child, k)[axis] for child, k in node.next_functions]
    total = output_shape(node)[axis]
    if None not in sizes:
        return list(accumulate(sizes))
    first = sizes.index(None)
    last = len(sizes) - 1 - sizes[::-1].index(None)
    after = [total - n for n in accumulate([size or 0 for size in sizes[:last:-1]], initial=0)][::-1]
    return [*accumulate(sizes[:first]), *(None for _ in sizes[first:last]), *after]


def sliced(node: Any, x: np.ndarray, out: Shape, i: int, shape: Shape, number: int) -> Found:
    """A slice: at its places of the axis it was cut from."""
    axis = axis_of(node, len(shape))
    start = signed(node._saved_start)
    start = max(0, start + shape[axis]) if start < 0 else start
    return _placed(x, axis, slice(start, start + out[axis] * node._saved_step, node._saved_step), shape[axis])


def selected(node: Any, x: np.ndarray, out: Shape, i: int, shape: Shape, number: int) -> Found:
    """One place of an axis, which is no more."""
    axis = axis_of(node, len(shape))
    start = signed(node._saved_index) % shape[axis]
    return _placed(np.expand_dims(x, axis), axis, slice(start, start + 1), shape[axis])


def split(node: Any, x: np.ndarray, out: Shape, i: int, shape: Shape, number: int, ends: Sequence[int | None]) -> Found:
    """A part of several: at its own places, `ends` as found once for all of them."""
    axis = axis_of(node, len(shape))
    end = ends[number]
    return None if end is None else _placed(x, axis, slice(end - out[axis], end), shape[axis])


def unbound(node: Any, x: np.ndarray, out: Shape, i: int, shape: Shape, number: int) -> Found:
    """One of all places of an axis."""
    axis = axis_of(node, len(shape))
    return _placed(np.expand_dims(x, axis), axis, slice(number, number + 1), shape[axis])


def _placed(x: np.ndarray, axis: int, at: slice, size: int) -> np.ndarray | Part:
    """Numbers of a part along an axis."""
    return x if len(range(size)[at]) == size else Part(x, axis, at, size)


def stacked(node: Any, x: np.ndarray, out: Shape, i: int, shape: Shape, number: int) -> np.ndarray:
    """The argument that became this place of a new axis."""
    axis = axis_of(node, len(out))
    return x.take(i if x.shape[axis] > 1 else 0, axis)


def joined(
    node: Any, x: np.ndarray, out: Shape, i: int, shape: Shape, number: int, ends: Sequence[int | None]
) -> Found:
    """The argument at its own places of the axis that all were joined along; None where they are not known."""
    axis = axis_of(node, len(out))
    if x.shape[axis] == 1:
        return x
    end = ends[i]
    return None if end is None else x[(slice(None),) * axis + (slice(end - shape[axis], end),)]


def _shape(node: Any, number: int) -> Shape:
    return tuple(node.variable.shape) if node.name().endswith("AccumulateGrad") else output_shape(node, number)


def signed(n: int) -> int:
    """A saved number, which may be negative in 64 bits."""
    return n - 2**64 if n >= 2**63 else n
