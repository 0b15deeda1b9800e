"""Masks that operations of a model's own lay on rows: where what is made of weights meets a number for each position
that is made of the inputs alone. It may be multiplied by 0 or 1, or summed under such weights, as in a mean over the
positions of `h * mask[..., None]`; chosen or not; or have a number added that leaves no maximum and no softmax of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from kfaccore_tensorflow.terms import einsum_terms
from kfaccore_tensorflow.uses import Operation, Tensor

Names = AbstractSet[str]
Met = Iterator[tuple[Tensor, Tensor, Callable[[], Tensor]]]  # rows, numbers, and which of (batch, *positions) go on
NEVER = -9999.0  # what is added to that is never the largest


class Laid(dict[int, list[Any]]):
    """{id of a tensor that is made of weights: masks (batch, *positions) laid on it}; a mask is made when it is asked
    for, as a loop lays one at each step that Keras's own masks tell of already."""

    def __getitem__(self, key: int) -> list[Tensor]:
        made = [mask if tf.is_tensor(mask) else mask() for mask in super().__getitem__(key)]
        self[key] = made
        return made


def laid(graph: Any, reach: Names, given: Names, hot: Names) -> Laid:
    """Where operations lay masks.

    reach, given, hot    names of the operations that gradients of the prediction reach, that are made of the inputs or
                         are one, and that are made of weights
    """
    found = Laid()
    for op in graph.get_operations():
        if op.type not in WAYS or op.name not in reach:
            continue
        for rows, number, there in WAYS[op.type](op):
            cold = number.op.name in given and number.op.name not in hot
            if rows.op.name not in hot or not cold or (op.type not in SUMS and not _lone(number, given)):
                continue
            if op.type not in ADDED or _large(number):
                found.setdefault(id(rows), []).append(there)
    return found


def _multiplied(op: Operation) -> Met:
    for rows, number in (op.inputs, reversed(op.inputs)):
        axes = _positions(rows, number)
        if axes:
            yield rows, number, partial(_one, number, axes)


def _added(op: Operation) -> Met:
    sign = -1.0 if op.type == "Sub" else 1.0
    for rows, number in (op.inputs, *([] if sign < 0 else [reversed(op.inputs)])):
        axes = _positions(rows, number)
        if axes:
            yield rows, number, lambda x=number, axes=axes: _along(tf.cast(sign, x.dtype) * x > NEVER, axes)


def _chosen(op: Operation) -> Met:
    which, *both = op.inputs
    for rows, kept in zip(both, (True, False), strict=True):
        axes = _positions(rows, which)
        if axes:
            yield rows, which, lambda axes=axes, kept=kept: _along(tf.equal(which, kept), axes)


def _product(op: Operation) -> Met:
    """A row of numbers, or a column, with matrices of rows."""
    summed = (1 if op.get_attr("adj_x") else 2), (2 if op.get_attr("adj_y") else 1)
    for place, number in enumerate(op.inputs):
        axes = [summed[place]]
        if number.shape.rank == 3 and number.shape[3 - axes[0]] == 1 and _many(number, axes):
            yield op.inputs[1 - place], number, partial(_one, number, axes)


def _einsum(op: Operation) -> Met:
    if len(op.inputs) != 2 or any(x.shape.rank is None for x in op.inputs):
        return
    for place, number in enumerate(op.inputs):
        ranks = op.inputs[0].shape.rank, op.inputs[1].shape.rank
        terms = einsum_terms(op.get_attr("equation").decode(), ranks, 1 - place)
        example, position = terms.x if len(terms.x) == 2 else ("", "")
        if example and terms.out[0] == terms.weight[0] == example and position in terms.weight and _many(number, [1]):
            yield op.inputs[1 - place], number, partial(_one, number, [1])


WAYS: dict[str, Callable[[Operation], Met]] = {
    "Add": _added,
    "AddV2": _added,
    "BatchMatMulV2": _product,
    "BatchMatMulV3": _product,
    "Einsum": _einsum,
    "Mul": _multiplied,
    "SelectV2": _chosen,
    "Sub": _added,
}
ADDED = ("Add", "AddV2", "Sub")
SUMS = ("BatchMatMulV2", "BatchMatMulV3", "Einsum")


def _positions(rows: Tensor, number: Tensor) -> list[int]:
    """Axes of positions, of rows (batch, *positions, d) and one number for each, or d; or of (batch, positions)."""
    rank = number.shape.rank
    if rank is None or rank < 2 or rows.shape.rank != rank:
        return []
    axes = [axis for axis in range(1, max(rank - 1, 2)) if number.shape[axis] != 1]
    return axes if _many(number, axes) and _many(rows, axes) else []


def _many(x: Tensor, axes: list[int]) -> bool:
    """Whether there may be one for each example and position."""
    return all(x.shape[axis] != 1 for axis in (0, *axes))


def _large(number: Tensor) -> bool:
    """Whether a constant goes into it that is as large as what masks are made with."""
    waiting = [number.op]
    seen = {number.op.name}
    while waiting:
        op = waiting.pop()
        constant = op.type == "Const" and op.outputs[0].dtype.is_floating
        if constant and np.any(np.abs(np.asarray(tf.get_static_value(op.outputs[0]), float)) >= -NEVER):
            return True
        new = [x.op for x in op.inputs if x.op.name not in seen]
        seen |= {one.name for one in new}
        waiting += new
    return False


def _lone(number: Tensor, given: Names) -> bool:
    """Whether there is one for each position, or one was repeated for all that it is multiplied with."""
    waiting = [number] if number.shape.rank > 2 and number.shape[-1] != 1 else []
    seen = {number.op.name}
    while waiting:
        made = [x for x in waiting.pop().op.inputs if x.op.name in given]
        if not made or any(x.shape.rank is None for x in made):  # the inputs themselves
            return False
        new = [x for x in made if x.op.name not in seen and x.shape.rank and x.shape[-1] != 1]
        seen |= {x.op.name for x in new}
        waiting += new
    return True


def _along(number: Tensor, axes: list[int]) -> Tensor:
    """(batch, *positions), of what is repeated the largest."""
    lone = [axis for axis in range(1, number.shape.rank) if axis not in axes]
    return (tf.reduce_any if number.dtype == tf.bool else tf.reduce_max)(number, lone)


def _one(number: Tensor, axes: list[int]) -> Tensor:
    """Where it is not 0; everywhere for numbers that differ otherwise within an example, which are data."""
    number = _along(tf.abs(number), axes)
    there = number > 0
    top = tf.reduce_max(number, list(range(1, number.shape.rank)), keepdims=True)
    return there | tf.reduce_any(there & tf.not_equal(number, top))
