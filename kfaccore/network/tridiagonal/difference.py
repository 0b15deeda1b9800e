"""G (x) A - C_g (x) C_a, with 0 <= C < A on both sides, diagonalised by one pair of whitening matrices.

K^T A K = I and K^T C K = diag(s) on each side, so the inverse is (K_g (x) K_a) diag(1 / (1 - s_g s_a)) (K_g (x) K_a)^T.
Source: Martens & Grosse 2015 (1503.05671), appendix B. Cost: two eigendecompositions a side.
"""

from __future__ import annotations

from kfaccore import xp as kernels
from kfaccore.xp.arrays import Array, eps, namespace
from kfaccore.xp.codes import Code, choose


def whitened(A: Array, C: Array) -> tuple[Array, Array, Array]:
    """(K, s, code): (blocks, d, d), (blocks, d) clipped at 0, (blocks,); INDEFINITE where A is not positive."""
    xp = namespace(A)
    values, Q, code = kernels.eigh(A)
    positive = xp.all(values > 0, axis=-1)
    safe = xp.where(values > 0, values, xp.ones_like(values))
    root = xp.matmul(Q / xp.sqrt(safe)[:, None, :], Q.mT)
    s, E, other = kernels.eigh(xp.matmul(root, xp.matmul(C, root)))
    s = xp.where(s > 0, s, xp.zeros_like(s))
    code = xp.maximum(xp.maximum(code, other), choose(positive, Code.OK, Code.INDEFINITE))
    return xp.matmul(root, E), s, code


def denominators(s_g: Array, s_a: Array) -> tuple[Array, Array]:
    """1 - s_g s_a, (blocks, d_out, d_in), and a code: INDEFINITE where one is not positive beyond rounding."""
    xp = namespace(s_a)
    below = 1.0 - s_g[:, :, None] * s_a[:, None, :]
    ok = xp.all(below > 10 * eps(below.dtype, xp), axis=(-2, -1))
    return below, choose(ok, Code.OK, Code.INDEFINITE)
