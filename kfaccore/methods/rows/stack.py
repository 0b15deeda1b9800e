"""A factor kept as rows: sum_r share_r y_r y_r^T / sum_r mass_r, without a d x d matrix.

The moving average A <- decay A + (1 - decay) Y^T Y / count multiplies every old share by `decay` and puts the new rows
in front; what no longer fits is dropped with its mass (a truncated average, still debiased), or merged into `rank`
rows at the end: the best approximation of that rank.
Source: Tang et al. 2021 (CVPR, SKFAC) for factors as rows; the average and the compression are ours.
Cost: a copy of capacity d; a merge (rank + count)^2 d + (rank + count)^3.
"""

from __future__ import annotations

from dataclasses import dataclass

import array_api_compat as aac

from kfaccore import xp as kernels
from kfaccore.linalg import side
from kfaccore.xp.arrays import Array, eps, loop, namespace, select


@dataclass(frozen=True)
class Stack:
    """rows (blocks, capacity, d) as they came, newest first; share and mass (blocks, capacity), 0 where empty."""

    rows: Array
    share: Array
    mass: Array


def empty(blocks: int, capacity: int, d: int, like: Array) -> Stack:
    """No rows yet."""
    xp, device = namespace(like), aac.device(like)
    rows = xp.zeros((blocks, capacity, d), dtype=like.dtype, device=device)
    share = xp.zeros((blocks, capacity), dtype=like.dtype, device=device)
    return Stack(rows, share, xp.zeros_like(share))


def push(stack: Stack, new: Array, share: Array, decay: float | Array, ok: Array, rank: int = 0) -> Stack:
    """`stack` decayed, with `new` (blocks, count, d) in front at `share` (blocks,) a row; the old one where not `ok`.

    More rows than fit are compressed first: the best approximation of the rank that fits.
    """
    xp = namespace(stack.rows)
    recent = stack.rows.shape[1] - rank
    if new.shape[1] > recent:
        new = compressed(new, recent)
    count = new.shape[1]
    ones = xp.ones(new.shape[:2], dtype=share.dtype, device=aac.device(share))
    fresh = (new, ones * share[:, None], ones * ((1 - decay) / count))
    old = (stack.rows, stack.share * decay, stack.mass * decay)
    parts = [
        [f, o[:, : recent - count, ...], t]
        for f, o, t in zip(fresh, old, _merged(old, recent - count, recent), strict=True)
    ]
    leaves = (xp.concat(part, axis=1) for part in parts)
    return Stack(*(select(ok, n, o) for n, o in zip(leaves, (stack.rows, stack.share, stack.mass), strict=True)))


def compressed(rows: Array, rank: int) -> Array:
    """(blocks, m, d) -> (blocks, rank, d) whose gram is the best approximation of that rank, largest last."""
    xp = namespace(rows)
    blocks, m, d = rows.shape
    kept = min(rank, m, d)
    if m <= d:
        _, vectors, _ = kernels.eigh(xp.matmul(rows, rows.mT))
        found = xp.matmul(vectors[:, :, m - kept :].mT, rows)
    else:
        values, vectors, _ = kernels.eigh(kernels.gram(rows))
        top = values[:, d - kept :]
        found = xp.sqrt(xp.where(top > 0, top, xp.zeros_like(top)))[:, :, None] * vectors[:, :, d - kept :].mT
    padding = xp.zeros((blocks, rank - kept, d), dtype=rows.dtype, device=aac.device(rows))
    return xp.concat([padding, found], axis=1) if rank > kept else found


def scales(stack: Stack) -> Array:
    """Square root of each row's weight in the factor, (blocks, capacity)."""
    xp = namespace(stack.share)
    total = xp.sum(stack.mass, axis=-1, keepdims=True)
    return xp.sqrt(stack.share / xp.where(total > 0, total, xp.ones_like(total)))


def times(v: Array, stack: Stack) -> Array:
    """v A for v (blocks, m, d): two products with the rows."""
    xp = namespace(v)
    weights = scales(stack) ** 2
    return xp.matmul(xp.matmul(v, stack.rows.mT) * weights[:, None, :], stack.rows)


def dense(stack: Stack) -> Array:
    """A itself, (blocks, d, d)."""
    return kernels.gram(stack.rows * scales(stack)[:, :, None])


def diagonal(stack: Stack) -> Array:
    """diag(A), (blocks, d)."""
    xp = namespace(stack.rows)
    return xp.matmul((scales(stack) ** 2)[:, None, :], stack.rows * stack.rows)[:, 0, :]


def scale(stack: Stack) -> side.Scale:
    """Mean and largest eigenvalue of A from its rows."""
    xp = namespace(stack.rows)
    squares = xp.sum(stack.rows * stack.rows, axis=-1) * scales(stack) ** 2
    rows = stack.rows * scales(stack)[:, :, None]
    return side.Scale(
        xp.sum(squares, axis=-1) / stack.rows.shape[-1], lambda: side.top_eigenvalue(xp.matmul(rows, rows.mT))
    )


def floored(shift: Array, mean: Array) -> tuple[Array, Array]:
    """A shift (blocks,) that can be divided by, at least float64's eps of the mean eigenvalue, and where lifted."""
    xp = namespace(shift)
    floor = eps(kernels.widest(shift), xp) * xp.where(mean > 0, mean, xp.ones_like(mean))
    return xp.where(shift > floor, shift, floor), shift <= floor


def _merged(old: tuple[Array, Array, Array], start: int, stop: int) -> list[Array]:
    """The compressed tail after the rows start .. stop left the recent part; computed only where any of them counts."""
    xp = namespace(old[0])
    (gone, share, _), (tail, tail_share, mass) = (
        [x[:, start:stop, ...] for x in old],
        [x[:, stop:, ...] for x in old],
    )
    rank = tail.shape[1]
    if rank == 0 or stop == start:
        return [tail, tail_share, mass]

    def merge(carry):
        rows = xp.concat([gone * xp.sqrt(share)[:, :, None], tail * xp.sqrt(tail_share)[:, :, None]], axis=1)
        total = xp.sum(old[2][:, start:, ...], axis=-1, keepdims=True)
        return compressed(rows, rank), xp.ones_like(tail_share), xp.zeros_like(mass) + total / rank

    return list(loop(lambda carry: xp.any(share > 0), merge, (tail, tail_share, mass), 1))
