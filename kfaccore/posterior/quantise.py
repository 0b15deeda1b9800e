"""Rounding a layer's weights column by column, the error of each spread over those that follow (GPTQ).

It is `given` with G = I: columns already rounded are fixed, the others move to their conditional mean. So it needs A
alone, from records of `forward_only`, and no backward pass.
Source: Frantar et al. 2023 (GPTQ). Cost: d_in^3 once, d_out d_in^2.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kfaccore import xp as kernels
from kfaccore.xp.arrays import Array, namespace, to_host, widen
from kfaccore.xp.codes import Code

Grid = Callable[[Array], Array]


def quantise(W: Array, A: Array, grid: Grid, order: Array | None = None, block: int = 128) -> Array:
    """W with every column rounded by `grid`, the later ones having moved to make up for it.

    W       (d_out, d_in), or (blocks, d_out, d_in) with A (blocks, d_in, d_in)
    A       the mean of a a^T, positive definite: add damping to its diagonal where it is not
    grid    a column (..., d_out) -> the same on the grid
    order   columns from first to last, (d_in,); by default as they stand
    block   columns after which the rest is moved, in one product

    ValueError where A has no inverse, or for an order that is no permutation. Half precision is widened.
    """
    W = widen(W, "W")
    A = widen(A, "A")
    xp = namespace(W)
    flat = W.ndim == 2
    W = W[None, ...] if flat else W
    A = A[None, ...] if A.ndim == 2 else A
    count = W.shape[-1]
    if tuple(A.shape) != (W.shape[0], count, count):
        raise ValueError(f"W has shape {tuple(W.shape)} and A {tuple(A.shape)}; need (blocks, d_out, d_in) and their A")
    places = np.arange(count) if order is None else to_host(order)
    if sorted(places.tolist()) != list(range(count)):
        raise ValueError(f"order must hold each of the {count} columns once, got {places.tolist()}")
    index = kernels.from_host(places, W)
    back = kernels.from_host(np.argsort(places), W)
    ordered = xp.take(xp.take(A, index, axis=1), index, axis=2)
    found = _swept(xp.take(W, index, axis=2), _factor(ordered), grid, block)
    found = xp.take(found, back, axis=2)
    return found[0, ...] if flat else found


def _factor(A: Array) -> Array:
    """The upper Cholesky factor of A^-1: row j, over its diagonal, is how columns from j on answer to column j."""
    inverse, code = kernels.spd_inverse(A)
    if bool(namespace(code).any(code >= int(Code.INDEFINITE))):
        raise ValueError("A has no inverse: add damping to its diagonal, such as 1e-2 of the mean eigenvalue")
    return namespace(A).linalg.cholesky((inverse + inverse.mT) / 2).mT


def _swept(W: Array, U: Array, grid: Grid, block: int) -> Array:
    """All columns in turn; inside a block only the block's own columns are moved."""
    xp = namespace(W)
    count = W.shape[-1]
    done = []
    for start in range(0, count, block):
        stop = min(start + block, count)
        rest = W[:, :, start:stop]
        errors = []
        for j in range(start, stop):
            column = rest[:, :, 0]
            rounded = grid(column)
            error = (column - rounded) / U[:, j, None, j]
            rest = rest[:, :, 1:] - error[:, :, None] * U[:, None, j, j + 1 : stop]
            done.append(rounded)
            errors.append(error)
        if stop < count:
            moved = xp.matmul(xp.stack(errors, axis=2), U[:, start:stop, stop:])
            W = xp.concat([W[:, :, :stop], W[:, :, stop:] - moved], axis=2)
    return xp.stack(done, axis=2)
