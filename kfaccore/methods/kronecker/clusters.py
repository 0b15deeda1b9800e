"""Eigenvalues that are equal up to rounding: any basis of their space will do, and rounding picks one."""

from __future__ import annotations

from kfaccore.linalg import kron, side
from kfaccore.linalg.inverse import Eigenpairs
from kfaccore.xp.arrays import Array, device_of, eps, is_numpy, namespace

_SINGLE = 2.0**-23  # eps of the narrowest dtype that eigenvectors are sought in
_NULL = 16.0  # times eps of the largest eigenvalue is 0; eigh of a singular gram leaves up to 1.5
_GAP = 0.75  # neighbours nearer than eps^.75 of the largest are equal; rounding put equal ones up to 19 eps apart
_WIDTH = 0.01  # of an eigenvalue, the distance to the furthest that is equal; rounding made 120 eps of 1,000 equal ones


def levelled(S: Array, basis: Eigenpairs) -> Array:
    """S (blocks, d_out, d_in) with the mean over each set of eigenvectors with one eigenvalue, on either side.

    So S is the same operator whichever basis of their space was picked. A diagonal side's basis is the standard one.
    """
    means_g = _means(basis.g, basis.Qg)
    means_a = _means(basis.a, basis.Qa)
    if means_g is not None:
        S = kron.apply(means_g, S, namespace(S).ones_like(basis.a))
    return S if means_a is None else side.times(S, means_a)


def _means(values: Array, Q: Array) -> Array | None:
    """What takes the mean over each set, (blocks, d, d); None where there is nothing to change."""
    if side.is_diagonal(Q):
        return None
    same = _same(values, Q)
    xp = namespace(values)
    if is_numpy(values) and xp.sum(same) == values.size:
        return None
    same = xp.astype(same, values.dtype)
    return same / xp.sum(same, axis=-1, keepdims=True)


def _same(values: Array, Q: Array) -> Array:
    """Which pairs of eigenvectors have one eigenvalue, (blocks, d, d).

    Neighbours without a gap do, where no two of them are further apart than rounding puts equal ones: a dense tail of
    a spectrum has no gaps either. An eigenvector on a single coordinate was not picked by rounding and stays.
    """
    xp = namespace(values)
    rounding = min(eps(values.dtype, xp), _SINGLE)
    largest = xp.max(values, axis=-1, keepdims=True)
    null = values <= _NULL * rounding * largest
    gap = values[:, 1:] - values[:, :-1] > rounding**_GAP * largest
    gap = gap | (null[:, :-1] & ~null[:, 1:])
    run = xp.cumulative_sum(xp.astype(gap, values.dtype), axis=-1, include_initial=True)
    joined = run[:, :, None] == run[:, None, :]
    distance = xp.abs(values[:, :, None] - values[:, None, :])
    far = xp.any(joined & (distance > _WIDTH * values[:, None, :]), axis=-1)
    wide = xp.any(joined & far[:, None, :], axis=-1)
    single = xp.max(xp.abs(Q), axis=-2) >= 1.0 - _NULL * rounding
    stays = (wide | single) & ~null
    itself = xp.astype(xp.eye(values.shape[-1], device=device_of(values)), xp.bool)
    return itself | (joined & ~stays[:, :, None] & ~stays[:, None, :])
