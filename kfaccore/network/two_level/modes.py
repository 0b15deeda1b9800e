"""Which of a layer's Kronecker eigenvectors q_g q_a^T span the coarse space: no choice is left to rounding."""

from __future__ import annotations

from kfaccore.linalg import equal, side
from kfaccore.network.two_level.vectors import Outer
from kfaccore.xp.arrays import Array, device_of, namespace


def lowest(S: Array, Qg: Array, Qa: Array) -> Outer:
    """The mode of the lowest eigenvalue of S (blocks, d_out, d_in); of equal ones that on the first coordinates."""
    xp = namespace(S)
    low = xp.min(S, axis=(-2, -1), keepdims=True)
    equal_ones = equal.near(S, low, xp.max(S, axis=(-2, -1), keepdims=True))
    # the irrational factor: coordinates of outputs and of inputs never make up for each other
    where = _place(Qg)[:, :, None] + 2.0**0.5 * _place(Qa)[:, None, :]
    first = xp.where(equal_ones, where, xp.full_like(where, float("inf")))
    return _pair(xp.argmin(xp.reshape(first, (S.shape[0], -1)), axis=-1), Qg, Qa)


def leading(rotated: Array, count: int, Qg: Array, Qa: Array) -> list[Outer]:
    """The `count` modes with the largest entries of `rotated` (blocks, d_out, d_in), the gradient's projections.

    Zero in place of one whose projection is no larger than that of a mode that is left out.
    """
    xp = namespace(rotated)
    size = xp.abs(xp.reshape(rotated, (rotated.shape[0], -1)))
    order = xp.argsort(size, axis=-1, descending=True)
    modes = [_pair(order[:, i], Qg, Qa) for i in range(count)]
    if count == size.shape[-1]:
        return modes
    ranked = xp.sort(size, axis=-1, descending=True)
    more = ranked[:, :count] > ranked[:, count, None] + equal.tolerance(size) * ranked[:, :1]
    kept = xp.astype(more, size.dtype)
    return [Outer(kept[:, i, None] * mode.left, mode.right) for i, mode in enumerate(modes)]


def _place(Q: Array) -> Array:
    """The mean coordinate of each eigenvector, weighted by its squares, (blocks, d)."""
    xp = namespace(Q)
    index = xp.astype(xp.arange(Q.shape[-1], device=device_of(Q)), Q.dtype)
    return index + 0 * Q if side.is_diagonal(Q) else xp.matmul(index, Q * Q)


def _pair(index: Array, Qg: Array, Qa: Array) -> Outer:
    """Eigenvector number `index` (blocks,) of the d_out d_in Kronecker ones, row-major."""
    d_in = Qa.shape[-1]
    row = index // d_in
    return Outer(_column(Qg, row), _column(Qa, index - row * d_in))


def _column(Q: Array, index: Array) -> Array:
    """Column index[b] of block b, (blocks, d); a diagonal side has unit vectors."""
    xp = namespace(Q)
    hit = xp.astype(xp.arange(Q.shape[-1], device=device_of(Q))[None, :] == index[:, None], Q.dtype)
    return hit if side.is_diagonal(Q) else xp.sum(Q * hit[:, None, :], axis=-1)
