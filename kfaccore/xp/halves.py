"""Inverses of symmetric positive definite matrices by halves: Cholesky of narrow blocks, products for the rest.

With X = [[X11, C^T], [C, X22]], P the inverse of the Cholesky factor of X11 and L = C P^T, the Schur complement
X22 - L L^T has the inverse factor Q; the whole factor's inverse is [[P, 0], [S, Q]], S = -Q L P, and the inverse of X
its Gram. 2 n^3 operations in all, six products of half the width a level, where a library's triangular solves run far
below the rate of a product. The error is that of Cholesky.
"""

from __future__ import annotations

from typing import Any

import array_api_compat as aac

from kfaccore.xp.arrays import Array, device_of, namespace

LEAF = 256  # widest block that the library inverts, in a batch; twice as wide alone
_FEW = 6  # a library's batched kernels pay from here on
_TILE = 64  # halves are cut at multiples of it, where they are wide


def inverse(x: Array, leaf: int | None = None) -> tuple[Array, Array, Array]:
    """(inverses, inverses of the lower Cholesky factors, whether none of their pivots failed) of x (k, n, n), of torch
    or CuPy.

    Only the lower triangle of x is read. Products are as the process has them: TF32 is no precision for this.
    """
    return _halves(x, leaf or LEAF * (1 + (x.shape[0] == 1)))


def _halves(x: Any, leaf: int) -> tuple[Any, Any, Any]:
    xp = namespace(x)
    n = x.shape[-1]
    if n <= leaf:
        return _torch_leaf(x) if aac.is_torch_array(x) else _cupy_leaf(x)
    m = -(-n // 2 // _TILE) * _TILE if n > 2 * _TILE else n // 2
    first, P, good = _halves(x[:, :m, :m], leaf)
    L = xp.matmul(x[:, m:, :m], P.mT)
    rest, Q, fine = _halves(_plus(x[:, m:, m:], L, L.mT, -1), leaf)
    S = -xp.matmul(Q, xp.matmul(L, P))
    low = xp.matmul(Q.mT, S)
    root = xp.zeros(x.shape, dtype=x.dtype, device=device_of(x))
    root[:, :m, :m] = P
    root[:, m:, :m] = S
    root[:, m:, m:] = Q
    found = xp.empty(x.shape, dtype=x.dtype, device=device_of(x))
    found[:, :m, :m] = _plus(first, S.mT, S, 1)
    found[:, m:, :m] = low
    found[:, :m, m:] = low.mT
    found[:, m:, m:] = rest
    return found, root, good & fine


def _plus(x: Any, a: Any, b: Any, sign: int) -> Any:
    """x + sign a b."""
    if not aac.is_torch_array(x):
        return x + sign * namespace(x).matmul(a, b)
    import torch

    return torch.baddbmm(x, a, b, alpha=sign)


def _torch_leaf(x: Any) -> tuple[Any, Any, Any]:
    """By the library; a few matrices one after the other."""
    import torch

    if 1 < len(x) < _FEW:
        parts = [_torch_leaf(one) for one in x.split(1)]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts])
    lower, failed = torch.linalg.cholesky_ex(x)
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=device_of(x)).expand_as(x)
    root = torch.linalg.solve_triangular(lower, eye, upper=False)
    return torch.bmm(root.mT, root), root, failed == 0


def _cupy_leaf(x: Any) -> tuple[Any, Any, Any]:
    from cupyx.scipy.linalg import solve_triangular

    xp = namespace(x)
    lower = xp.linalg.cholesky(x)
    eye = xp.eye(x.shape[-1], dtype=x.dtype)
    root = xp.stack([solve_triangular(block, eye, lower=True) for block in lower])
    pivots = xp.linalg.diagonal(lower)
    return xp.matmul(root.mT, root), root, xp.min(pivots, axis=-1) > 0  # NaN is not
