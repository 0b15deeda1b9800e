"""Positions of one layer pooled to those of another, so that two layers of unequal maps can be compared."""

from __future__ import annotations

from math import prod

import numpy as np

from kfaccore.convolution.patches import Patches
from kfaccore.record import Record
from kfaccore.xp.arrays import Array, from_host, namespace


def grid(record: Record) -> tuple[int, ...]:
    """Axes of the shared positions: the output map of a convolution, else one axis."""
    if isinstance(record.a, Patches):
        return tuple(record.a.window.outputs(record.a.spatial))
    return (record.shared,)


def common(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    """The smaller size of every axis; grids of different rank are taken as one axis."""
    if len(one) != len(other):
        return (min(prod(one), prod(other)),)
    return tuple(min(pair) for pair in zip(one, other, strict=True))


def pooled(x: Array, large: tuple[int, ...], small: tuple[int, ...], how: str) -> Array:
    """(blocks, examples * prod(large)) pooled to prod(small) cells an example: "mean" or "sum" over a cell.

    Cell j of m covers positions floor(j n / m) up to ceil((j + 1) n / m).
    """
    if large == small:
        return x
    large = large if len(large) == len(small) else (prod(large),)
    xp = namespace(x)
    matrix = np.ones((1, 1))
    for n, m in zip(large, small, strict=True):
        matrix = np.kron(matrix, _cells(n, m, how))
    full = xp.reshape(x, (x.shape[0], -1, prod(large)))
    moved = xp.astype(from_host(matrix.T, x), x.dtype)
    return xp.reshape(xp.matmul(full, moved), (x.shape[0], -1))


def _cells(n: int, m: int, how: str) -> np.ndarray:
    """(m, n): which positions belong to a cell."""
    found = np.zeros((m, n))
    for j in range(m):
        found[j, j * n // m : -(-(j + 1) * n // m)] = 1.0
    if how == "mean":
        return found / found.sum(1, keepdims=True)
    return found / found.sum(0, keepdims=True)
