"""Masks that operations of a model's own lay on rows: what is made of weights is multiplied, or chosen, by a number for
each position that is made of the inputs alone, as in a mean over the positions of `h * mask[..., None]`."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from typing import Any

import tensorflow as tf

from kfaccore_tensorflow.uses import Operation, Tensor

Names = AbstractSet[str]


def laid(
    graph: Any, reach: AbstractSet[str], given: AbstractSet[str], hot: AbstractSet[str]
) -> dict[int, list[Tensor]]:
    """{id of a tensor that is made of weights: masks (batch, *positions) laid on it}.

    reach, given, hot    names of the operations that gradients of the prediction reach, that are made of the inputs or
                         are one, and that are made of weights
    """
    found: dict[int, list[Tensor]] = {}
    for op in graph.get_operations():
        if op.name not in reach:
            continue
        for rows, number, kept in _pairs(op):
            axes = _positions(rows, number) if rows.op.name in hot else ()
            if not axes or number.op.name not in given or number.op.name in hot:
                continue
            there = tf.not_equal(number, tf.zeros((), number.dtype)) if kept else tf.logical_not(number)
            lone = [axis for axis in range(1, number.shape.rank) if axis not in axes]
            found.setdefault(id(rows), []).append(tf.squeeze(there, lone))
    return found


def _pairs(op: Operation) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Of an operation rows, what decides whether they go on, and whether they do where that is not 0."""
    if op.type == "Mul":
        a, b = op.inputs
        yield a, b, True
        yield b, a, True
    elif op.type == "SelectV2":
        which, a, b = op.inputs
        yield a, which, True
        yield b, which, False


def _positions(rows: Tensor, number: Tensor) -> list[int]:
    """Axes of positions, of rows (batch, *positions, d) and a number for each."""
    rank = number.shape.rank
    if rank is None or rank < 3 or rows.shape.rank != rank or number.shape[-1] != 1 or number.shape[0] == 1:
        return []
    return [axis for axis in range(1, rank - 1) if number.shape[axis] != 1]
