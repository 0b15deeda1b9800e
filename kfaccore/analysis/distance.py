"""||F - F~|| / ||F|| of a fitted method: exact where rows and parameters allow it, else from random probes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from kfaccore.analysis.exact import ExactBlock
from kfaccore.analysis.fitted import eigenpairs
from kfaccore.analysis.operator import LayerOperator
from kfaccore.record import Ids
from kfaccore.record.chunks import input_chunks
from kfaccore.record.squares import squares
from kfaccore.xp.arrays import to_host
from kfaccore.xp.chunks import at_once


def distance(exact: ExactBlock, op: LayerOperator) -> float:
    """||F - F~|| / ||F|| with nothing estimated; NaN for F = 0, from which everything is infinitely far."""
    if not exact.norm:
        return float("nan")
    squared = exact.norm**2 - 2 * overlap(exact, op) + float(op.square())
    return float(np.sqrt(max(squared, 0.0))) / exact.norm


def probed(over: Sequence[float], below: Sequence[float]) -> tuple[float, float]:
    """(estimate, standard error) of ||F - F~|| / ||F|| from ||F z - F~ z||^2 and ||F z||^2 of random signs z, whose
    means are unbiased for the squared norms."""
    mean = float(np.mean(below))
    if not mean:
        return float("nan"), 0.0
    ratio = float(np.mean(over)) / mean
    spread = float(np.std(np.array(over) - ratio * np.array(below), ddof=1)) / len(over) ** 0.5 / mean
    error = ratio**0.5
    return error, spread / (2 * error) if error else 0.0


def overlap(exact: ExactBlock, op: LayerOperator) -> float:
    """<F, F~> for the undamped matrix of `op`; in an eigenbasis it is a sum over squared per-example gradients."""
    if op.diagonal is not None:
        basis = op.diagonal
        right = None if isinstance(basis.Qa, tuple) else to_host(basis.Qa)
        return _in_basis(exact, to_host(basis.values), to_host(basis.Qg), right)
    if op.terms:
        return sum(_with_term(exact, to_host(A), to_host(G)) for A, G in op.terms)
    undamped = to_host(op.undamped)
    found = 0.0
    for block in range(exact.shape[0]):
        for a, g in _examples(exact, block):
            J = (g.mT @ a).reshape(-1, undamped.shape[-1])
            found += float(((J @ undamped[block]) * J).sum())
    return found / exact.record.n


def _with_term(exact: ExactBlock, A: np.ndarray, G: np.ndarray) -> float:
    """<F, G (x) A>: the sum over an example's positions s, t of (g_s.G g_t)(a_s.A a_t), or of J * (G J A) where that
    is cheaper."""
    if isinstance(exact.record.a, Ids):
        a, Qa = eigenpairs(A)
        g, Qg = eigenpairs(G)
        return _in_basis(exact, g[:, :, None] * a[:, None, :], Qg, Qa)
    _, d_out, d_in = exact.shape
    shared = exact.record.shared
    paired = shared * (d_in + d_out) <= 2 * d_in * d_out
    found = 0.0
    for block in range(exact.shape[0]):
        for a, g in _examples(exact, block):
            if paired:
                found += float(((_times(g, G[block]) @ g.mT) * (_times(a, A[block]) @ a.mT)).sum())
            else:
                J = g.mT @ a
                found += float((_times(_times(J, A[block]).mT, G[block]).mT * J).sum())
    return found / exact.record.n


def _times(x: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Rows of x times a factor, which may be a diagonal."""
    return x * factor if factor.ndim == 1 else x @ factor


def _examples(exact: ExactBlock, block: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(a, g) of some examples and one draw of a block, (examples, shared, d)."""
    record = exact.record
    each = max(record.d_out * record.d_in, record.shared * (record.d_in + record.shared))
    for start, a in input_chunks(record, at_once(each)):
        inputs = to_host(a)[block].astype(np.float64, copy=False)
        for draw in to_host(record.g)[:, block]:
            yield inputs, draw[start : start + len(inputs)].astype(np.float64, copy=False)


def _in_basis(exact: ExactBlock, values: np.ndarray, Qg: np.ndarray, Qa: np.ndarray | None) -> float:
    """<F, Q diag(values) Q^T>; a basis (blocks, d) is the standard one, which `squares` takes as None."""
    right = None if Qa is None or Qa.ndim == 2 else Qa
    left = None if Qg.ndim == 2 else Qg
    return float((values * to_host(squares(exact.record, right, left))).sum()) / exact.record.n
