"""A factor kept as rows: sum_r share_r y_r y_r^T / sum_r mass_r, without a d x d matrix.

The moving average A <- decay A + (1 - decay) Y^T Y / count multiplies every old share by `decay` and puts the new rows
in front; what no longer fits, the last rows of the oldest batch first, is dropped with its mass (a truncated average,
still debiased), or merged into `rank` rows at the end: the best approximation of that rank.
Source: Tang et al. 2021 (CVPR, SKFAC) for factors as rows; the average and the compression are ours.
Cost: a copy of capacity d; a merge (rank + count)^2 d + (rank + count)^3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kfaccore import tree
from kfaccore import xp as kernels
from kfaccore.linalg import side
from kfaccore.xp.arrays import Array, device_of, eps, is_numpy, loop, namespace, place, select


@dataclass(frozen=True)
class Stack:
    """rows (blocks, capacity, d) as they came, newest first; share and mass (blocks, capacity), 0 where empty."""

    rows: Array
    share: Array
    mass: Array


def empty(blocks: int, capacity: int, d: int, like: Array) -> Stack:
    """No rows yet."""
    xp = namespace(like)
    where = place(like)
    rows = xp.zeros((blocks, capacity, d), **where)
    share = xp.zeros((blocks, capacity), **where)
    return Stack(rows, share, xp.zeros_like(share))


def filled(stack: Stack) -> Stack:
    """Without the slots at the end that nothing was put into yet, where the host can see how many they are."""
    if not is_numpy(stack.mass):
        return stack
    last = np.flatnonzero(stack.mass.any(axis=0)).max(initial=0)
    return _slots(stack, 0, int(last) + 1)


def push(stack: Stack, new: Array, share: Array, decay: float | Array, ok: Array, rank: int = 0) -> Stack:
    """`stack` decayed, with `new` (blocks, count, d) in front at `share` (blocks,) a row; the old one where not `ok`.

    More rows than fit are compressed first: the best approximation of the rank that fits.
    """
    xp = namespace(stack.rows)
    capacity = stack.rows.shape[1]
    recent = capacity - rank  # slots of rows as they came; the last `rank` hold the compressed past
    if new.shape[1] > recent:
        new = compressed(new, recent)
    count = new.shape[1]
    ones = xp.ones(new.shape[:2], dtype=share.dtype, device=device_of(share))
    fresh = Stack(new, ones * share[:, None], ones * ((1 - decay) / count))
    decayed = Stack(stack.rows, stack.share * decay, stack.mass * decay)
    stay = _slots(decayed, 0, recent - count)
    past = _merged(_slots(decayed, recent - count, capacity), rank)
    moved = tree.map(lambda *parts: xp.concat(list(parts), axis=1), fresh, stay, past)
    return tree.map(lambda now, before: select(ok, now, before), moved, stack)


def compressed(rows: Array, rank: int) -> Array:
    """(blocks, m, d) -> (blocks, rank, d) whose gram is the best approximation of that rank, largest last.

    From the eigenvectors of the smaller of Y Y^T and Y^T Y; rows of zeros in front where `rank` is more than Y's.
    """
    xp = namespace(rows)
    blocks, m, d = rows.shape
    kept = min(rank, m, d)
    if m <= d:
        _, vectors, _ = kernels.eigh(xp.matmul(rows, rows.mT))
        found = xp.matmul(vectors[:, :, m - kept :].mT, rows)  # Q^T Y: its rows are orthogonal, of length sqrt(l)
    else:
        values, vectors, _ = kernels.eigh(kernels.gram(rows))
        top = values[:, d - kept :]
        lengths = xp.sqrt(xp.where(top > 0, top, xp.zeros_like(top)))
        found = lengths[:, :, None] * vectors[:, :, d - kept :].mT
    if rank == kept:
        return found
    padding = xp.zeros((blocks, rank - kept, d), dtype=rows.dtype, device=device_of(rows))
    return xp.concat([padding, found], axis=1)


def debiased(share: Array, mass: Array) -> Array:
    """Each row's weight in a truncated average: its share of the mass that is left, (blocks, capacity)."""
    xp = namespace(share)
    total = xp.sum(mass, axis=-1, keepdims=True)
    return share / xp.where(total > 0, total, xp.ones_like(total))


def scales(stack: Stack) -> Array:
    """Square root of each row's weight in the factor, (blocks, capacity)."""
    return namespace(stack.share).sqrt(debiased(stack.share, stack.mass))


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
    """Mean and largest eigenvalue of A from its rows: those of D Y Y^T D are A's own."""
    xp = namespace(stack.rows)
    roots = scales(stack)
    squares = xp.sum(stack.rows * stack.rows, axis=-1) * roots**2
    rows = stack.rows * roots[:, :, None]
    mean = xp.sum(squares, axis=-1) / stack.rows.shape[-1]
    return side.Scale(mean, lambda: side.top_eigenvalue(xp.matmul(rows, rows.mT)))


def floored(shift: Array, mean: Array) -> tuple[Array, Array]:
    """A shift (blocks,) that can be divided by, at least float64's eps of the mean eigenvalue, and where lifted."""
    xp = namespace(shift)
    floor = eps(kernels.widest(shift), xp) * xp.where(mean > 0, mean, xp.ones_like(mean))
    return xp.where(shift > floor, shift, floor), shift <= floor


def _slots(stack: Stack, start: int, stop: int) -> Stack:
    return tree.map(lambda x: x[:, start:stop, ...], stack)


def _merged(past: Stack, rank: int) -> Stack:
    """The last `rank` slots of `past` once the slots before them, which left the recent part, are compressed into them.

    Computed only where a row that left counts.
    """
    leaving = past.share.shape[1] - rank
    gone = _slots(past, 0, leaving)
    tail = _slots(past, leaving, leaving + rank)
    if rank == 0 or leaving == 0:
        return tail
    xp = namespace(past.rows)

    def merge(_: tuple[Array, ...]) -> tuple[Array, ...]:
        weighted = [x.rows * xp.sqrt(x.share)[:, :, None] for x in (gone, tail)]
        rows = compressed(xp.concat(weighted, axis=1), rank)
        total = xp.sum(past.mass, axis=-1, keepdims=True)
        # the rows now carry their weight themselves: share 1; the mass of all is spread over them
        return rows, xp.ones_like(tail.share), xp.zeros_like(tail.mass) + total / rank

    return Stack(*loop(lambda _: xp.any(gone.share > 0), merge, (tail.rows, tail.share, tail.mass), 1))
