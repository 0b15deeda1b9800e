"""How Kronecker a block is: the share of ||F||^2 in the first term of its best sum of Kronecker products.

Rearranged, F is R[(o, o'), (i, i')] = (1/n) sum over rows of J of J[o, i] J[o', i'], and its largest singular value s
says it: s^2 / ||F||^2, which is 1 for G (x) A. Without shared positions R = P^T Q / n with rows vec(g g^T) and
vec(a a^T) of the examples, and s^2 is the largest eigenvalue of (P P^T)(Q Q^T) / n^2, K by K. With them
A <- sum J^T G J, G <- sum J A J^T, as KPSVD has it, is iterated.
Source: Van Loan & Pitsianis 1993; Koroko et al. 2022 (2201.10285).
Cost: K^3; with positions 2 K d_in d_out (d_in + d_out) an iteration, and J is held.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import cholesky

from kfaccore.analysis.exact import ExactBlock
from kfaccore.record import Ids
from kfaccore.xp.arrays import to_host

_MOST = 1e10  # multiplications of all iterations
_FEWEST = 20  # iterations that there must be time for
_HELD = 1 << 22  # numbers of J
_STILL = 1e-12


def share_of_first_term(exact: ExactBlock) -> float:
    """s^2 / ||F||^2 over all blocks; NaN for a block of zeros, an embedding, or where it would take too long."""
    record = exact.record
    _, d_out, d_in = exact.shape
    size = d_out * d_in
    if isinstance(record.a, Ids) or not exact.exact or not exact.norm:
        return float("nan")
    if record.shared == 1:
        return sum(_of_rows(exact, block) for block in range(exact.shape[0])) / exact.norm**2
    iterations = int(min(500, _MOST / (2.0 * exact.rows * size * (d_in + d_out) * record.blocks)))
    if exact.rows * size * record.blocks > _HELD or iterations < _FEWEST:
        return float("nan")
    J = to_host(record.examples())
    largest = [_iterated(J[:, i].reshape(-1, d_out, d_in), iterations) for i in range(exact.shape[0])]
    return sum(s**2 for s in largest) / exact.norm**2 / record.n**2


def _of_rows(exact: ExactBlock, block: int) -> float:
    """s^2 of a block without shared positions."""
    record = exact.record
    a = np.tile(to_host(record.rows())[block, :, 0], (record.draws, 1))
    g = to_host(record.g)[:, block, :, 0].reshape(len(a), -1)
    P = (g @ g.T) ** 2
    Q = (a @ a.T) ** 2
    # P Q has the eigenvalues of L^T P L with Q = L L^T; a grain of identity keeps a singular Q factorisable
    L = cholesky(Q + 1e-14 * np.trace(Q) * np.eye(len(Q)) / len(Q), lower=True)
    return float(np.linalg.eigvalsh(L.T @ P @ L)[-1]) / record.n**2


def _iterated(J: np.ndarray, iterations: int) -> float:
    """n s for J (K, d_out, d_in)."""
    _, d_out, d_in = J.shape
    across = np.ascontiguousarray(J.transpose(0, 2, 1)).reshape(-1, d_out)
    along = J.reshape(-1, d_in)
    G = np.eye(d_out)
    s = 0.0
    for _ in range(iterations):
        A = along.T @ (G @ J).reshape(-1, d_in)
        size = np.linalg.norm(A)
        if not size:
            return 0.0
        G = across.T @ (J @ (A / size)).transpose(0, 2, 1).reshape(-1, d_out)
        new = float(np.linalg.norm(G))
        if abs(new - s) <= _STILL * new:
            return new
        s = new
        G /= new
    return s
