"""Inverses of symmetric positive definite matrices by halves: Cholesky of narrow blocks, products for the rest.

With X = [[X11, C^T], [C, X22]], P the inverse of the Cholesky factor of X11 and L = C P^T, the Schur complement
X22 - L L^T has the inverse factor Q; the whole factor's inverse is [[P, 0], [S, Q]], S = -Q L P, and the inverse of X
its Gram. 2 n^3 operations in all, six products of half the width a level, where a library's triangular solves run far
below the rate of a product. The error is that of Cholesky.
"""

from __future__ import annotations

from typing import Any

from kfaccore.xp.arrays import Array, device_of
from kfaccore.xp.gpu import padded_rows

LEAF = 256  # widest block that the library inverts, in a batch; twice as wide alone
_FEW = 6  # a library's batched kernels pay from here on
_TILE = 64  # halves are cut at multiples of it, where they are wide


def inverse(x: Array, leaf: int | None = None) -> tuple[Array, Array, Array]:
    """(inverses, inverses of the lower Cholesky factors, whether none of their pivots failed) of torch's x (k, n, n).

    Only the lower triangle of x is read. Products are as the process has them: TF32 is no precision for this.
    """
    known: Any = x
    return _halves(known, leaf or LEAF * (1 + (len(known) == 1)))


def _halves(x: Any, leaf: int) -> tuple[Any, Any, Any]:
    import torch

    n = x.shape[-1]
    if n <= leaf:
        return _alone(x)
    m = -(-n // 2 // _TILE) * _TILE if n > 2 * _TILE else n // 2
    first, P, good = _halves(x[:, :m, :m], leaf)
    C = x[:, m:, :m]
    L = torch.bmm(C, P.mT)
    rest, Q, fine = _halves(torch.baddbmm(x[:, m:, m:], L, L.mT, alpha=-1), leaf)
    S = torch.bmm(Q, torch.bmm(L, P)).neg_()
    root = torch.zeros_like(x, memory_format=torch.contiguous_format)
    root[:, :m, :m] = P
    root[:, m:, :m] = S
    root[:, m:, m:] = Q
    found = padded_rows(x, x.shape)
    low = torch.bmm(Q.mT, S)
    found[:, :m, :m] = torch.baddbmm(first, S.mT, S)
    found[:, m:, :m] = low
    found[:, :m, m:] = low.mT
    found[:, m:, m:] = rest
    return found, root, good & fine


def _alone(x: Any) -> tuple[Any, Any, Any]:
    """By the library; a few matrices one after the other."""
    import torch

    if 1 < len(x) < _FEW:
        parts = [_alone(one) for one in x.split(1)]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts])
    lower, failed = torch.linalg.cholesky_ex(x)
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=device_of(x)).expand_as(x)
    root = torch.linalg.solve_triangular(lower, eye, upper=False)
    return torch.bmm(root.mT, root, out=padded_rows(x, x.shape)), root, failed == 0
