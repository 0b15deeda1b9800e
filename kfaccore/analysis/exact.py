"""The exact block of a layer, F = (1/n) J^T J, in float64 on the host and never formed.

||F||^2 = ||J J^T||^2 / n^2;  <F, X> = (1/n) sum_k J_k^T X J_k;  (F + d I)^-1 v = (v - J^T (n d I + J J^T)^-1 J v) / d.
Above `limit` rows of J norms come from probes and inverses from conjugate gradients.
Cost: K^2 (d_in + d_out) for K = draws batch rows without shared positions, K^2 d_in d_out with them; memory K^2.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from kfaccore.analysis.fitted import eigenpairs
from kfaccore.analysis.operator import LayerOperator, exported
from kfaccore.convolution.patches import Patches
from kfaccore.record import Ids, Record
from kfaccore.record.jacobian import adjoint, products
from kfaccore.record.squares import squares
from kfaccore.xp.arrays import Array, to_host
from kfaccore.xp.chunks import at_once, spans

ROWS = 4096


class ExactBlock:
    """F of one record; every block of the layer is a record of its own here, and norms sum over blocks."""

    def __init__(self, record: Record, limit: int = ROWS) -> None:
        self.record = hosted(record)
        self.parts = [_block(self.record, i) for i in range(record.blocks)]
        self.rows = record.draws * record.batch
        self.exact = self.rows <= limit
        self.shape = (record.blocks, record.d_out, record.d_in)

    @cached_property
    def grams(self) -> list[np.ndarray]:
        """J J^T of each block, (K, K)."""
        return [_gram(part) for part in self.parts]

    @cached_property
    def trace(self) -> float:
        return float(to_host(squares(self.record)).sum()) / self.record.n

    @cached_property
    def norm(self) -> float:
        """Frobenius norm, from the Gram matrices; only where `exact`."""
        return float(np.sqrt(sum((gram**2).sum() for gram in self.grams))) / self.record.n

    def matvec(self, v: np.ndarray) -> np.ndarray:
        """F v, (blocks, d_out, d_in)."""
        parts = [_pulled(part, _image(part, v[i])) for i, part in enumerate(self.parts)]
        return np.stack(parts) / self.record.n

    def solve(self, v: np.ndarray, damping: float) -> np.ndarray:
        """(F + damping I)^-1 v for damping > 0."""
        if not self.exact:
            return self._iterated(v, damping)
        found = np.empty(v.shape)
        for i, (part, gram) in enumerate(zip(self.parts, self.grams, strict=True)):
            w = _image(part, v[i])
            lower = cho_factor(gram + self.record.n * damping * np.eye(self.rows), lower=True)
            weights = cho_solve(lower, w.ravel()).reshape(w.shape)
            found[i] = (v[i] - _pulled(part, weights)) / damping
        return found

    def _iterated(self, v: np.ndarray, damping: float) -> np.ndarray:
        """`solve` by conjugate gradients, which need F v alone."""
        from scipy.sparse.linalg import cg

        shifted = exported(v.size, lambda x: self.matvec(x.reshape(v.shape)).ravel() + damping * x)
        found, info = cg(shifted, v.ravel(), rtol=1e-10, maxiter=10 * self.rows)
        if info:
            raise ValueError(f"conjugate gradients stopped after {info} iterations: give a larger damping")
        return found.reshape(v.shape)

    def overlap(self, op: LayerOperator) -> float:
        """<F, F~> for the undamped matrix of `op`; in an eigenbasis it is a sum over squared per-example gradients."""
        if op.diagonal is not None:
            basis = op.diagonal
            right = None if isinstance(basis.Qa, tuple) else to_host(basis.Qa)
            return self._in_basis(to_host(basis.values), to_host(basis.Qg), right)
        if op.terms:
            return sum(self._with_term(to_host(A), to_host(G)) for A, G in op.terms)
        matrix = to_host(op.undamped)
        chunks = ((J, matrix[i]) for i, part in enumerate(self.parts) for J in _chunks(part))
        return sum(float(((J @ F) * J).sum()) for J, F in chunks) / self.record.n

    def _with_term(self, A: np.ndarray, G: np.ndarray) -> float:
        """<F, G (x) A>."""
        a, Qa = eigenpairs(A)
        g, Qg = eigenpairs(G)
        return self._in_basis(g[:, :, None] * a[:, None, :], Qg, Qa)

    def _in_basis(self, values: np.ndarray, Qg: np.ndarray, Qa: np.ndarray | None) -> float:
        """<F, Q diag(values) Q^T>; a basis (blocks, d) is the standard one, which `squares` takes as None."""
        right = None if Qa is None or Qa.ndim == 2 else Qa
        left = None if Qg.ndim == 2 else Qg
        return float((values * to_host(squares(self.record, right, left))).sum()) / self.record.n


def distance(exact: ExactBlock, op: LayerOperator) -> float:
    """||F - F~|| / ||F|| with nothing estimated."""
    squared = exact.norm**2 - 2 * exact.overlap(op) + float(op.square())
    return float(np.sqrt(max(squared, 0.0))) / exact.norm


def probed(
    exact: ExactBlock, op: LayerOperator, probes: list[np.ndarray], images: list[np.ndarray]
) -> tuple[float, float]:
    """(estimate, standard error) of ||F - F~|| / ||F|| from Rademacher probes and their images F z."""
    over = np.array([((image - op.matvec(z)) ** 2).sum() for z, image in zip(probes, images, strict=True)])
    below = np.array([(image**2).sum() for image in images])
    ratio = over.mean() / below.mean()
    spread = np.std(over - ratio * below, ddof=1) / np.sqrt(len(over)) / below.mean()
    error = float(np.sqrt(ratio))
    return error, float(spread / (2 * error)) if error else 0.0


def hosted(record: Record) -> Record:
    """The record on NumPy in float64."""
    mask = None if record.mask is None else to_host(record.mask)
    return Record(_hosted_inputs(record.a), to_host(record.g).astype(float), float(record.n), mask)


def _hosted_inputs(a: Array | Ids | Patches) -> Array | Ids | Patches:
    if isinstance(a, Ids):
        return Ids(to_host(a.index), a.size)
    if isinstance(a, Patches):
        return Patches(to_host(a.image).astype(float), a.window, a.bias)
    return to_host(a).astype(float)


def _block(record: Record, i: int) -> Record:
    a = record.a
    if isinstance(a, Patches):
        a = Patches(a.image[i], a.window, a.bias)
    elif not isinstance(a, Ids):
        a = a[i : i + 1]
    return Record(a, record.g[:, i : i + 1], record.n, record.mask)


def _image(record: Record, v: np.ndarray) -> np.ndarray:
    """J v, (draws, batch), of a record of one block, v (d_out, d_in)."""
    return to_host(products(record, v[None])[0])


def _pulled(record: Record, w: np.ndarray) -> np.ndarray:
    """J^T w, (d_out, d_in), of a record of one block."""
    return to_host(adjoint(record, w))[0]


def _gram(record: Record) -> np.ndarray:
    """J J^T, (K, K), of a record of one block, rows ordered by draw, then example."""
    if isinstance(record.a, Ids):
        return _gram_of_ids(record, to_host(record.a.index))
    K = record.draws * record.batch
    if record.shared == 1:
        a = to_host(record.rows()).reshape(record.batch, -1)
        g = to_host(record.g).reshape(K, -1)
        return np.tile(a @ a.T, (record.draws, record.draws)) * (g @ g.T)
    gram = np.empty((K, K))
    at = 0
    for J in _chunks(record):
        to = 0
        for other in _chunks(record):
            gram[at : at + len(J), to : to + len(other)] = J @ other.T
            to += len(other)
        at += len(J)
    return gram


def _gram_of_ids(record: Record, index: np.ndarray) -> np.ndarray:
    """J J^T of an embedding, index (batch, shared): two positions meet where their rows of the table are one."""
    K = record.draws * record.batch
    g = to_host(record.g).reshape(K, record.shared, -1)
    by_draw = g.reshape(record.draws, record.batch, record.shared, -1)
    gram = np.empty((K, K))
    for k in range(K):
        same = index[k % record.batch][:, None, None] == index[None]  # (s, batch, t)
        z = np.einsum("sbt,so->bto", same.astype(float), g[k])
        gram[k] = np.einsum("bto,vbto->vb", z, by_draw).ravel()
    return gram


def _chunks(record: Record) -> Iterator[np.ndarray]:
    """Rows of J, some at a time, (rows, d_out d_in)."""
    size = record.d_out * record.d_in
    step = at_once(size)
    a = to_host(record.rows())[0]
    g = to_host(record.g)
    for draw in range(record.draws):
        for part in spans(record.batch, step):
            yield (g[draw, 0, part].mT @ a[part]).reshape(-1, size)
