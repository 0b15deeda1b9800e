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
    rows = []
    for i, (p, q) in enumerate(sides):
        row = []
        for j, (s, t) in enumerate(sides):
            small = common(grids[i], grids[j])
            left = pooled(p, grids[i], small, "mean")
            A = left @ pooled(s, grids[j], small, "mean").mT / left.shape[-1]
            G = pooled(q, grids[i], small, "sum") @ pooled(t, grids[j], small, "sum").mT
            row.append(xp.sum(A * G) / level.n)
        rows.append(xp.stack(row))
    return xp.stack(rows)


def _sides(record: Record, r: Vector) -> tuple[Array, Array]:
    """(right . a) (blocks, batch shared) and (left . g) (blocks, draws batch shared)."""
    if not isinstance(r, Outer):
        raise ValueError("matrix=kronecker needs vectors that are products: use exact")
    xp = namespace(record.g)
    p, q = dots(record, r)
    q = xp.permute_dims(q, (1, 0, 2, 3))
    return xp.reshape(p, (record.blocks, -1)), xp.reshape(q, (record.blocks, -1))
