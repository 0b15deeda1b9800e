"""Moments of eigenvectors with one eigenvalue: any basis of their space will do, and rounding picks one."""

from __future__ import annotations

from kfaccore.linalg import equal, kron, side
from kfaccore.linalg.inverse import Eigenpairs
from kfaccore.xp.arrays import Array, is_numpy, namespace


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
    same = equal.same(values, Q)
    xp = namespace(values)
    if is_numpy(values) and xp.sum(same) == values.size:
        return None
    same = xp.astype(same, values.dtype)
    return same / xp.sum(same, axis=-1, keepdims=True)
