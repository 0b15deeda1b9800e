"""Solves in the space of the rows: no iteration, no d x d matrix.

A = Y_a^T Y_a and G = Y_g^T Y_g have eigenvectors Y^T Q / sqrt(l) from Y Y^T = Q diag(l) Q^T, of the size of the rows,
so (G (x) A + c I)^-1 V = V / c + U_g [(U_g^T V U_a) (1 / (l_g l_a + c) - 1 / c)] U_a^T for any V. For V = Y_g^T M Y_a
with known M no difference is left: coefficients.
Source: the text of conjugate gradients' Krylov space (iterates are Y_g^T M Y_a); derived here.
Cost: rows^3 and 2 d_in d_out rows.
"""

from __future__ import annotations

from kfaccore import xp as kernels
from kfaccore.xp.arrays import Array, eps, namespace


def spectrum(rows: Array) -> tuple[Array, Array]:
    """Eigenvalues l >= 0 (blocks, m) of Y Y^T and vectors Q, of rows Y (blocks, m, d); rounding noise set to 0."""
    xp = namespace(rows)
    values, vectors, _ = kernels.eigh(xp.matmul(rows, rows.mT))
    noise = values.shape[-1] * eps(values.dtype, xp) * xp.max(values, axis=-1, keepdims=True)
    return xp.where(values > noise, values, xp.zeros_like(values)), vectors


def coefficients(g: Array, a: Array, M: Array, shift: Array) -> Array:
    """N (blocks, m_g, m_a) with g^T N a = (G (x) A + shift I)^-1 g^T M a, shift (blocks,)."""
    xp = namespace(a)
    l_a, Qa = spectrum(a)
    l_g, Qg = spectrum(g)
    rotated = xp.matmul(xp.matmul(Qg.mT, M), Qa)
    rotated = rotated / (l_g[:, :, None] * l_a[:, None, :] + shift[:, None, None])
    return xp.matmul(xp.matmul(Qg, rotated), Qa.mT)


def solve(g: Array, a: Array, v: Array, shift: Array) -> Array:
    """(G (x) A + shift I)^-1 v for any v (blocks, d_out, d_in)."""
    xp = namespace(a)
    l_a, Ua = _vectors(a)
    l_g, Ug = _vectors(g)
    c = shift[:, None, None]
    product = l_g[:, :, None] * l_a[:, None, :]
    # c (1 / (l_g l_a + c) - 1 / c), without its difference
    inner = xp.matmul(xp.matmul(Ug, v), Ua.mT) * (-product / (product + c))
    return (v + xp.matmul(xp.matmul(Ug.mT, inner), Ua)) / c


def _vectors(rows: Array) -> tuple[Array, Array]:
    """Eigenvalues and eigenvectors as rows (blocks, m, d), zero where the eigenvalue is."""
    xp = namespace(rows)
    values, Q = spectrum(rows)
    root = xp.sqrt(xp.where(values > 0, values, xp.ones_like(values)))
    scale = xp.where(values > 0, 1 / root, xp.zeros_like(values))
    return values, scale[:, :, None] * xp.matmul(Q.mT, rows)
