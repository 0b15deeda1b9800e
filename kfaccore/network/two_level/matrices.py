"""Coarse matrices R F R^T: of the exact Fisher, or of one that is a Kronecker product between any two layers.

Source: Koroko et al. 2023 (2303.18083) exact; Tselepidis et al. 2020 (2011.00573) Kronecker.
"""

from __future__ import annotations

from kfaccore.network.two_level.level import Level
from kfaccore.network.two_level.pooling import common, grid, pooled
from kfaccore.network.two_level.vectors import Outer, Vector, dots
from kfaccore.record import Record
from kfaccore.xp.arrays import Array, namespace


def exact(level: Level) -> Array:
    """R F R^T from the records, without damping."""
    return level.Y.mT @ level.Y / level.n


def kronecker(level: Level) -> Array:
    """R F~ R^T with F~_ij = G_ij (x) A_ij also between layers, from the inner products of inputs and of gradients.

    Shared positions are rows; of two layers the larger grid is pooled to the smaller, inputs by mean and gradients by
    sum over the cells.
    """
    xp = namespace(level.Y)
    sides = [_sides(level.records[name], r) for name, r in zip(level.layers, level.vectors, strict=True)]
    grids = [grid(level.records[name]) for name in level.layers]
    there = [_there(level.records[name]) for name in level.layers]
    rows = []
    for i, (p, q) in enumerate(sides):
        row = []
        for j, (s, t) in enumerate(sides):
            small = common(grids[i], grids[j])
            left, some = _mean(p, there[i], grids[i], small)
            right, others = _mean(s, there[j], grids[j], small)
            A = left @ right.mT / _count(left, some, others)
            G = pooled(q, grids[i], small, "sum") @ pooled(t, grids[j], small, "sum").mT
            row.append(xp.sum(A * G) / level.n)
        rows.append(xp.stack(row))
    return xp.stack(rows)


def _there(record: Record) -> Array | None:
    """1 for positions that exist, (1, batch shared); None where all do."""
    if record.mask is None:
        return None
    xp = namespace(record.g)
    return xp.reshape(xp.astype(record.mask, record.g.dtype), (1, -1))


def _mean(x: Array, there: Array | None, large: tuple[int, ...], small: tuple[int, ...]) -> tuple[Array, Array | None]:
    """Inputs pooled by the mean over what exists of a cell, and the cells that have any; None: all."""
    x = pooled(x, large, small, "mean")
    if there is None:
        return x, None
    xp = namespace(x)
    share = pooled(there, large, small, "mean")
    some = share > 0
    return x / xp.where(some, share, xp.ones_like(share)), some


def _count(x: Array, some: Array | None, others: Array | None) -> float | Array:
    """Cells that exist in both."""
    if some is None and others is None:
        return float(x.shape[-1])
    xp = namespace(x)
    both = some if others is None else others if some is None else some & others
    count = xp.sum(xp.astype(both, x.dtype))
    return xp.where(count > 0, count, xp.ones_like(count))


def _sides(record: Record, r: Vector) -> tuple[Array, Array]:
    """(right . a) (blocks, batch shared) and (left . g) (blocks, draws batch shared)."""
    if not isinstance(r, Outer):
        raise ValueError("matrix=kronecker needs vectors that are products: use exact")
    xp = namespace(record.g)
    p, q = dots(record, r)
    q = xp.permute_dims(q, (1, 0, 2, 3))
    return xp.reshape(p, (record.blocks, -1)), xp.reshape(q, (record.blocks, -1))
