"""How Kronecker a block is: the share of ||F||^2 in the first term of its best sum of Kronecker products.

Rearranged, F is R[(o, o'), (i, i')] = (1/n) sum over rows of J of J[o, i] J[o', i'], and its largest singular value s
says it: s^2 / ||F||^2, which is 1 for G (x) A. Power iteration A <- sum J^T G J, G <- sum J A J^T, as KPSVD has it.
Source: Van Loan & Pitsianis 1993; Koroko et al. 2022 (2201.10285).
Cost: 4 K d_in d_out (d_in + d_out) an iteration.
"""

from __future__ import annotations

import numpy as np

from kfaccore.analysis.exact import ExactBlock
from kfaccore.record import Ids
from kfaccore.record.chunks import input_chunks
from kfaccore.xp.arrays import to_host
from kfaccore.xp.chunks import at_once

ITERATIONS = 200
_MOST = 3e10  # multiplications of all iterations beyond which it is left out
_STILL = 1e-12


def share_of_first_term(exact: ExactBlock) -> float:
    """s^2 / ||F||^2 over all blocks; NaN for a block of zeros, an embedding, or where it would take too long."""
    record = exact.record
    _, d_out, d_in = exact.shape
    work = 4.0 * exact.rows * (d_in + d_out + record.shared) * d_in * d_out * 20
    if isinstance(record.a, Ids) or not exact.exact or work > _MOST or not exact.norm:
        return float("nan")
    largest = [_first(exact, block) for block in range(exact.shape[0])]
    return float(sum(s**2 for s in largest)) / exact.norm**2


def _first(exact: ExactBlock, block: int) -> float:
    """The largest singular value of a block, rearranged."""
    _, d_out, d_in = exact.shape
    G = np.eye(d_out)
    s = 0.0
    for _ in range(ITERATIONS):
        A = np.zeros((d_in, d_in))
        for J in _rows(exact, block):
            A += np.einsum("koi,koj->ij", G @ J, J, optimize=True)
        size = np.linalg.norm(A)
        if not size:
            return 0.0
        A /= size
        G = np.zeros((d_out, d_out))
        for J in _rows(exact, block):
            G += np.einsum("koi,kpi->op", J @ A, J, optimize=True)
        G /= exact.record.n
        new = float(np.linalg.norm(G))
        if abs(new - s) <= _STILL * new or not new:
            return new
        s = new
        G /= new
    return s


def _rows(exact: ExactBlock, block: int) -> list[np.ndarray]:
    """Chunks of J, (rows, d_out, d_in)."""
    record = exact.record
    g = to_host(record.g)[:, block]
    found = []
    for start, a in input_chunks(record, at_once(record.d_out * record.d_in)):
        inputs = to_host(a)[block]
        found += [draw[start : start + len(inputs)].mT @ inputs for draw in g]
    return found
