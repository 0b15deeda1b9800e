"""The exact block of a layer, F = (1/n) J^T J, in float64 on the host and never formed.

||F||^2 = ||J J^T||^2 / n^2;  <F, X> = (1/n) sum_k J_k^T X J_k;  (F + d I)^-1 v = (v - J^T (n d I + J J^T)^-1 J v) / d.
Above `limit` rows of J norms come from probes and inverses from conjugate gradients.
Cost: that of `Rows`, and K^3 / 3; memory 2 K^2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from kfaccore.analysis.operator import exported
from kfaccore.analysis.rows import Rows
from kfaccore.convolution.patches import Patches
from kfaccore.record import Ids, Record
from kfaccore.record.squares import squares
from kfaccore.xp.arrays import Array, to_host
from kfaccore.xp.chunks import HELD

ROWS = 4096
ITERATIONS = 500
_LOST = 1e5  # trace of F over the damping from which a solve is refined


@dataclass(frozen=True)
class Solved:
    """x = (F + damping I)^-1 v, v.x, and by how much v.x may be too small: 0 where nothing was iterated."""

    x: np.ndarray
    product: float
    slack: float = 0.0


class ExactBlock:
    """F of one record; every block of the layer is a record of its own here, and norms sum over blocks."""

    def __init__(self, record: Record, limit: int = ROWS, wide: bool = True, held: int = HELD) -> None:
        """limit, wide, held   rows of J for which nothing is estimated; float64 inputs; numbers J may have"""
        self.record = hosted(record, wide)
        self.parts = [Rows(_block(self.record, i), held // record.blocks) for i in range(record.blocks)]
        self.rows = record.draws * record.batch
        self.exact = self.rows <= limit
        self.shape = (record.blocks, record.d_out, record.d_in)

    @cached_property
    def grams(self) -> list[np.ndarray]:
        """J J^T of each block, (K, K)."""
        return [part.gram() for part in self.parts]

    @cached_property
    def trace(self) -> float:
        if self.exact:
            return float(sum(np.trace(gram) for gram in self.grams)) / self.record.n
        return float(to_host(squares(self.record)).sum()) / self.record.n

    @cached_property
    def norm(self) -> float:
        """Frobenius norm, from the Gram matrices; only where `exact`."""
        return float(np.sqrt(sum((gram**2).sum() for gram in self.grams))) / self.record.n

    def matvec(self, v: np.ndarray) -> np.ndarray:
        """F v, (blocks, d_out, d_in)."""
        pairs = zip(self.parts, v, strict=True)
        return np.stack([part.pulled(part.image(x)) for part, x in pairs]) / self.record.n

    def curvature(self, v: np.ndarray) -> float:
        """v.F v, at the cost of one product."""
        pairs = zip(self.parts, v, strict=True)
        return float(sum((part.image(x) ** 2).sum() for part, x in pairs)) / self.record.n

    def solve(self, v: np.ndarray, damping: float) -> Solved:
        """(F + damping I)^-1 v for damping > 0."""
        if not self.exact:
            return self._iterated(v, damping)
        found = np.empty(v.shape)
        product = 0.0
        for i, (part, gram) in enumerate(zip(self.parts, self.grams, strict=True)):
            shifted = gram.copy()
            shifted.flat[:: self.rows + 1] += self.record.n * damping
            lower = cho_factor(shifted, lower=True, overwrite_a=True)
            found[i] = _woodbury(part, lower, v[i], damping)
            if np.trace(gram) > _LOST * self.record.n * damping:
                # once more on what is left: dividing by so small a damping has cost digits
                left = v[i] - part.pulled(part.image(found[i])) / self.record.n - damping * found[i]
                found[i] += _woodbury(part, lower, left, damping)
            product += float(np.vdot(v[i], found[i]))
        return Solved(found, product)

    def _iterated(self, v: np.ndarray, damping: float) -> Solved:
        """`solve` by conjugate gradients, which need F v alone. With r = v - (F + damping I) x the product is
        v.x + r.x + r.(F + damping I)^-1 r, and the last of these is at most |r|^2 / damping."""
        from scipy.sparse.linalg import cg

        shifted = exported(v.size, lambda x: self.matvec(x.reshape(v.shape)).ravel() + damping * x)
        found, _ = cg(shifted, v.ravel(), rtol=1e-10, maxiter=ITERATIONS)
        left = v.ravel() - shifted @ found
        product = float(v.ravel() @ found + left @ found)
        return Solved(found.reshape(v.shape), product, float(left @ left) / damping)


def _woodbury(part: Rows, lower: tuple[np.ndarray, bool], v: np.ndarray, damping: float) -> np.ndarray:
    w = part.image(v)
    weights = cho_solve(lower, w.ravel()).reshape(w.shape)
    return (v - part.pulled(weights)) / damping


def hosted(record: Record, wide: bool = True) -> Record:
    """The record on NumPy, in float64 if `wide`."""
    mask = None if record.mask is None else to_host(record.mask)
    inputs: Array | Ids | Patches = record.a
    if isinstance(record.a, Ids):
        inputs = Ids(to_host(record.a.index), record.a.size)
    elif isinstance(record.a, Patches):
        inputs = Patches(_float(record.a.image, wide), record.a.window, record.a.bias)
    else:
        inputs = _float(record.a, wide)
    return Record(inputs, _float(record.g, wide), float(record.n), mask)


def _float(x: Array, wide: bool) -> np.ndarray:
    host = to_host(x)
    return host.astype(np.float64, copy=False) if wide else host


def _block(record: Record, i: int) -> Record:
    a = record.a
    if isinstance(a, Patches):
        a = Patches(a.image[i], a.window, a.bias)
    elif not isinstance(a, Ids):
        a = a[i : i + 1]
    return Record(a, record.g[:, i : i + 1], record.n, record.mask)
