"""The two factors of a layer for a report: A = mean over rows of a a^T and G = (1/n) sum over rows of g g^T, those of
`expand`; of a side too wide to be decomposed only the diagonal, so that nothing of its square is held."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kfaccore import factors
from kfaccore.analysis.spectrum import Spectrum, spectrum
from kfaccore.record import Ids, Record
from kfaccore.record.chunks import input_chunks
from kfaccore.xp.arrays import Array, to_host

WIDEST = 2560  # of a dense side whose eigenvalues are found
_ALIKE = 1e-10  # how far from 1 the squared cosine of two columns may be that are one feature twice


@dataclass(frozen=True)
class Side:
    """One factor: `matrix` (blocks, d, d), None where only the `diagonal` (blocks, d) was made; `plain` says that there
    is no more to it, an embedding's."""

    diagonal: np.ndarray
    matrix: np.ndarray | None = None
    plain: bool = False

    @property
    def finite(self) -> bool:
        """Whether all of it is finite."""
        return bool(np.isfinite(self.diagonal if self.matrix is None else self.matrix).all())

    @property
    def dead(self) -> int:
        """Columns that are zero in every row."""
        return int((self.diagonal == 0).sum())

    @property
    def spectra(self) -> list[Spectrum]:
        """One a block; none where the matrix was not made."""
        if self.plain:
            return spectrum(self.diagonal)
        return [] if self.matrix is None else spectrum(self.matrix)

    @property
    def duplicated(self) -> float:
        """Columns that are a multiple of an earlier one; NaN where the matrix was not made."""
        if self.plain:
            return 0
        return float("nan") if self.matrix is None else sum(_duplicates(block) for block in self.matrix)


def side_of_inputs(host: Record) -> Side:
    """A of a record on the host."""
    rows = np.maximum(to_host(factors.valid_rows(host)), 1.0)
    if isinstance(host.a, Ids):
        return Side(to_host(factors.gram_of_inputs(host)) / rows[:, None], plain=True)
    if host.d_in > WIDEST:
        sums = sum((_squares(a) for _, a in input_chunks(host)), np.zeros(()))
        return Side(sums / rows[:, None])
    return _dense(to_host(factors.gram_of_inputs(host)) / rows[:, None, None])


def side_of_gradients(host: Record) -> Side:
    """G of a record on the host."""
    if host.d_out > WIDEST:
        return Side(sum((_squares(g) for g in host.g), np.zeros(())) / host.n)
    return _dense(to_host(factors.gram_of_gradients(host)) / host.n)


def _dense(matrix: np.ndarray) -> Side:
    return Side(np.diagonal(matrix, axis1=1, axis2=2), matrix)


def _squares(rows: Array) -> np.ndarray:
    """Sums of squares of (blocks, examples, positions, d), (blocks, d)."""
    host = to_host(rows)
    return np.einsum("bnsd,bnsd->bd", host, host)


def _duplicates(A: np.ndarray) -> int:
    """Columns whose squared cosine with an earlier one is 1."""
    sizes = np.diagonal(A)
    alike = (1 - _ALIKE) * np.outer(sizes, sizes) <= A**2
    alike &= (sizes > 0)[:, None] & (sizes > 0)[None, :]
    return int(np.tril(alike, -1).any(axis=1).sum())
