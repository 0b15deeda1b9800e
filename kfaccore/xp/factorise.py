"""Inverse of symmetric matrices that reports failure instead of raising it; thin QR."""

from __future__ import annotations

from typing import Any

import array_api_compat as aac
import numpy as np
from scipy.linalg import lapack
from scipy.linalg import qr as scipy_qr

from kfaccore.xp import halves, traced
from kfaccore.xp.arrays import (
    Array,
    all_finite,
    device_of,
    eps,
    is_numpy,
    is_tracer,
    largest,
    loop,
    namespace,
    on_gpu,
    select,
    to_host,
)
from kfaccore.xp.codes import Code, choose
from kfaccore.xp.gram import mirror

_ATTEMPTS = 5  # as it is, in float64, then float64 with a jitter of 10, 1e3, 1e5 times eps of the mean diagonal
_PIVOT = 8.0  # a pivot below this many eps of its diagonal entry is rounding noise


def spd_inverse(x: Array) -> tuple[Array, Array]:
    """Inverse of symmetric positive definite matrices and a code each: (blocks, d, d) -> (blocks, d, d), (blocks,).

    Codes: OK, FLOAT64 (redone in float64), JITTERED (eps-sized multiples of the mean diagonal added), INDEFINITE
    and NONFINITE (the returned matrix is the identity). Never an LU: Cholesky and its inverse throughout.
    """
    xp = namespace(x)
    if is_tracer(x) and widest(x) == x.dtype:  # as it is, then the jitters
        return traced.spd_inverse(x, _ATTEMPTS - 1, _PIVOT)
    inverse, ok, good = _attempt(x)
    if good:  # where it can be seen, the usual case costs nothing more
        return inverse, xp.zeros(x.shape[:1], dtype=xp.int32, device=device_of(x))
    if is_tracer(x):
        return _repaired(x, inverse, ok)
    return _rest_repaired(x, inverse, to_host(ok))


def _rest_repaired(x: Array, inverse: Array, ok: np.ndarray) -> tuple[Array, Array]:
    """`_repaired` of the blocks that failed alone, in their places: a stack has the matrices of many layers."""
    xp = namespace(x)
    bad = [i for i in range(x.shape[0]) if not ok[i]]
    failed = xp.stack([x[i, ...] for i in bad])
    never = xp.zeros(failed.shape[:1], dtype=xp.bool, device=device_of(x))
    repaired, codes = _repaired(failed, failed, never)
    place = {i: n for n, i in enumerate(bad)}
    fine = xp.zeros((1,), dtype=codes.dtype, device=device_of(x))
    blocks = range(x.shape[0])
    found = xp.stack([repaired[place[i], ...] if i in place else inverse[i, ...] for i in blocks])
    return found, xp.concat([codes[place[i] : place[i] + 1] if i in place else fine for i in blocks])


def _repaired(x: Array, inverse: Array, ok: Array) -> tuple[Array, Array]:
    """`spd_inverse` from its second attempt on, for the blocks that are not `ok`."""
    xp = namespace(x)
    finite = all_finite(x)
    eye = xp.eye(x.shape[-1], dtype=x.dtype, device=device_of(x))
    ok = ok & finite
    zero = xp.zeros(x.shape[:1], dtype=xp.int32, device=device_of(x))
    wide = widest(x)
    mean = xp.mean(xp.linalg.diagonal(x), axis=-1)

    def unfinished(carry):
        return ~xp.all(carry[2] | ~finite)

    def again(carry):
        inverse, code, ok, attempt = carry
        jitter = eps(x.dtype, xp) * 10.0 ** (2.0 * attempt - 3.0)
        shift = xp.where(attempt < 2, xp.zeros_like(jitter), jitter) * mean
        tried = xp.astype(select(ok, xp.zeros_like(x) + eye, x) + shift[:, None, None] * eye, wide)
        retry, good, _ = _attempt(tried)
        newly = good & ~ok & finite
        inverse = select(newly, xp.astype(retry, x.dtype), inverse)
        how = choose(attempt < 2, Code.FLOAT64, Code.JITTERED)
        return inverse, xp.where(newly, how, code), ok | newly, attempt + 1.0

    start = xp.asarray(1.0, dtype=x.dtype, device=device_of(x))
    inverse, code, ok, _ = loop(unfinished, again, (inverse, zero, ok, start), _ATTEMPTS - 1)
    failed = choose(finite, Code.INDEFINITE, Code.NONFINITE)
    return select(ok, inverse, xp.zeros_like(x) + eye), xp.where(ok, code, failed)


def qr(x: Array) -> tuple[Array, Array]:
    """Thin QR of (blocks, d, k): orthonormal Q (blocks, d, min(d, k)), whatever the rank, and R.

    On NumPy LAPACK is called without NumPy's copies, twice as fast.
    """
    if not is_numpy(x):
        return namespace(x).linalg.qr(x)
    pairs: list[Any] = [scipy_qr(block, mode="economic", check_finite=False) for block in x]
    Q = np.ascontiguousarray(np.stack([pair[0] for pair in pairs]))
    R = np.ascontiguousarray(np.stack([pair[1] for pair in pairs]))
    return Q, R


def widest(x: Array) -> object:
    """The dtype float64 where the namespace has it (JAX only with 64-bit mode on), float32 otherwise."""
    xp = namespace(x)
    if not aac.is_jax_array(x):
        return xp.float64
    import jax

    return xp.float64 if jax.config.jax_enable_x64 else xp.float32


def _attempt(x: Array) -> tuple[Array, Array, bool]:
    """One Cholesky inverse of each block, whether it can be trusted, and whether all are seen to be: one read on the
    host, none of a tracer. What failed may hold anything."""
    if on_gpu(x) and x.shape[-1] > 1:
        return _halved(x)
    if aac.is_torch_array(x) and x.shape[-1] > 1:
        return _torch_inverse(x)
    inverse, ok = _inverse(x)
    return inverse, ok, not is_tracer(x) and bool(namespace(x).all(ok))


def _inverse(x: Array) -> tuple[Array, Array]:
    """`_attempt` without its last."""
    xp = namespace(x)
    if is_numpy(x):
        pairs = [_lapack_inverse(block) for block in x]
        return np.stack([p[0] for p in pairs]), np.array([p[1] for p in pairs])
    if x.shape[-1] == 1:  # gains and lone biases have an A of one number
        ok = (x > 0) & (x < float("inf"))
        return 1.0 / xp.where(ok, x, xp.ones_like(x)), ok[:, 0, 0]
    if aac.is_jax_array(x):
        import jax

        lower = jax.lax.linalg.cholesky(x, symmetrize_input=False)
        eye = xp.zeros_like(x) + xp.eye(x.shape[-1], dtype=x.dtype)
        return jax.scipy.linalg.cho_solve((lower, True), eye), _trusted(lower, x)
    return _standard_inverse(x)


def _torch_inverse(x: Any) -> tuple[Array, Array, bool]:
    """`_attempt` of torch: the usual case copies nothing."""
    import torch

    lower, _ = torch.linalg.cholesky_ex(x)
    diagonal = x.diagonal(dim1=-2, dim2=-1)
    pivots = lower.diagonal(dim1=-2, dim2=-1)
    tiny = torch.finfo(x.dtype).eps
    # as `_trusted`, in the fewest operations
    rows = torch.linalg.vector_norm(lower, dim=-1)
    miss = largest(torch.addcmul(diagonal, rows, rows, value=-1))
    low = torch.addcmul(diagonal, pivots, pivots, value=-1 / (_PIVOT * tiny)).amax(-1)
    ok = (miss <= 50 * x.shape[-1] ** 0.5 * tiny * largest(diagonal)) & (low < 0)
    good = bool(ok.all())
    if not good:  # torch raises for a zero pivot, which is data here
        lower = torch.where(ok[:, None, None], lower, torch.eye(x.shape[-1], dtype=x.dtype, device=device_of(x)))
    return torch.cholesky_inverse(lower), ok, good


def _halved(x: Any) -> tuple[Array, Array, bool]:
    """`_attempt` on a GPU."""
    inverse, root, positive = halves.inverse(x)
    xp = namespace(x)
    diagonal = xp.linalg.diagonal(x)
    reciprocal = xp.linalg.diagonal(root)  # of the pivots
    ok = positive & xp.all(reciprocal * reciprocal * diagonal < 1 / (_PIVOT * eps(x.dtype, xp)), axis=-1)
    return inverse, ok, bool(xp.all(ok))


def _standard_inverse(x: Array) -> tuple[Array, Array]:
    """With nothing but the standard, whose Cholesky may raise: the only try in the package that stands for data."""
    xp = namespace(x)
    eye = xp.eye(x.shape[-1], dtype=x.dtype, device=device_of(x))
    inverses = []
    good = []
    for block in range(x.shape[0]):
        try:
            lower = xp.linalg.cholesky(x[block, ...])
        except Exception:
            inverses.append(eye)
            good.append(xp.zeros((1,), dtype=xp.bool))
            continue
        half = xp.linalg.solve(lower, eye)
        inverses.append(half.mT @ half)
        good.append(_trusted(lower[None, ...], x[block : block + 1, ...]))
    return xp.stack(inverses), xp.concat(good)


def _trusted(lower: Array, x: Array) -> Array:
    """diag(L L^T) = diag(x), and no pivot is rounding noise: catches failures that left finite numbers behind."""
    xp = namespace(x)
    diagonal = xp.linalg.diagonal(x)
    tiny = eps(x.dtype, xp)
    miss = largest(xp.sum(lower * lower, axis=-1) - diagonal)
    ok = miss <= 50 * x.shape[-1] ** 0.5 * tiny * largest(diagonal)
    pivots = xp.linalg.diagonal(lower)
    return ok & xp.all(pivots * pivots > _PIVOT * tiny * diagonal, axis=-1)


def _lapack_inverse(x: np.ndarray) -> tuple[np.ndarray, bool]:
    """potrf and potri on one Fortran-ordered copy; a symmetric C array is its own transpose."""
    potrf, potri = lapack.get_lapack_funcs(("potrf", "potri"), (x,))
    diagonal = np.diagonal(x).copy()
    # reads the lower triangle of x (upper of its transpose)
    upper, info = potrf(np.array(x, order="C").T, lower=0, clean=0, overwrite_a=1)
    pivots = np.diagonal(upper)
    if info != 0 or not np.all(pivots * pivots > _PIVOT * np.finfo(x.dtype).eps * diagonal):
        return x, False
    inverse, info = potri(upper, lower=0, overwrite_c=1)
    mirror(inverse.T)
    return inverse.T, info == 0
