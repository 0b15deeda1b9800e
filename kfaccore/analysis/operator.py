"""The Fisher operator of a fitted state, F~ + damping I, layer by layer and whole, in float64 on the host.

A sum of Kronecker products, a Kronecker basis or a dense block are used where a method declares them (`method`); any
other is multiplied out by its `matvec`, up to `limit` parameters a block. Layers are independent: the whole is
block-diagonal.
Cost: eigensystem or one term d_in^3 + d_out^3 once, then four products; otherwise (d_out d_in)^3 once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from kfaccore import tree
from kfaccore.analysis.spectrum import Spectrum
from kfaccore.linalg import kron, side
from kfaccore.method import Block, Eigensystem, Hyper, KroneckerTerms, Matrix, Method, State, declares
from kfaccore.xp.arrays import Array, to_host

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

S = TypeVar("S", bound=State)

_UNDAMPED = Hyper(0, 0.0, 0.0)


@dataclass(frozen=True)
class System:
    """Eigenvalues and the way into their basis and back: values (blocks, ...); v and result (blocks, d_out, d_in)."""

    values: np.ndarray
    left: np.ndarray
    right: np.ndarray | None

    def divide(self, v: np.ndarray, shift: float) -> np.ndarray:
        """(F~ + shift I)^-1 v."""
        below: np.ndarray = self.values + shift
        if not below.min() > 0:
            raise ValueError(f"F~ + {shift} I is singular (smallest eigenvalue {below.min():.3g}): give damping > 0")
        if self.right is not None:
            return to_host(kron.solve(self.left, v, self.right, below))
        flat = v.reshape(*below.shape, 1)
        return (self.left @ (self.left.mT @ flat / below[..., None])).reshape(v.shape)


@dataclass(frozen=True)
class LayerOperator:
    """F~ + damping I of one layer; vectors are (blocks, d_out, d_in), 2-D ones come back 2-D."""

    method: Method
    state: State
    block: Block
    damping: float = 0.0
    limit: int = 2048

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.block.blocks, self.block.d_out, self.block.d_in

    @property
    def size(self) -> int:
        """Number of parameters."""
        return int(np.prod(self.shape))

    @property
    def measurable(self) -> bool:
        """Whether trace and Frobenius norm can be had exactly."""
        return self.solvable or bool(self.terms)

    @property
    def solvable(self) -> bool:
        """Whether logdet and eigenvalues can be had too."""
        known = len(self.terms) == 1 or self.diagonal is not None or declares(self.method, Matrix)
        return known or self.block.d_out * self.block.d_in <= self.limit

    @cached_property
    def terms(self) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """Pairs (A, G) of F~ = sum of G (x) A; none where the method does not say."""
        if not declares(self.method, KroneckerTerms):
            return ()
        found = self.method.kronecker_terms(self.state, self.block)
        return tuple((to_host(A), to_host(G)) for A, G in found)

    @cached_property
    def diagonal(self) -> System | None:
        """F~ in the basis that diagonalises it; None where the method does not say, or says it with its one term."""
        if self.terms or not declares(self.method, Eigensystem):
            return None
        found = self.method.eigensystem(self.state, _UNDAMPED)
        if found is None:
            return None
        Qa, Qg, values = found
        return System(to_host(values), to_host(Qg), to_host(Qa))

    @cached_property
    def system(self) -> System:
        """Eigenvalues and eigenvectors of F~, without the damping."""
        if self.diagonal is not None:
            return self.diagonal
        if len(self.terms) == 1:
            A, G = self.terms[0]
            a, Qa = eigenpairs(A)
            g, Qg = eigenpairs(G)
            return System(g[:, :, None] * a[:, None, :], Qg, Qa)
        values, vectors = np.linalg.eigh(self.undamped)
        return System(values, vectors, None)

    def matvec(self, v: np.ndarray) -> np.ndarray:
        """(F~ + damping I) v."""
        full = v.reshape(self.shape)
        return (self._undamped_times(full) + self.damping * full).reshape(v.shape)

    def solve(self, v: np.ndarray) -> np.ndarray:
        """(F~ + damping I)^-1 v; conjugate gradients to 1e-12 where eigenvectors cannot be had."""
        full = v.reshape(self.shape)
        if self.solvable:
            return self.system.divide(full, self.damping).reshape(v.shape)
        from scipy.sparse.linalg import cg

        found, info = cg(self.linear_operator(), full.ravel(), rtol=1e-12)
        if info:
            raise ValueError(f"conjugate gradients stopped after {info} iterations: give a larger damping")
        return found.reshape(v.shape)

    @cached_property
    def undamped(self) -> np.ndarray:
        """F~ itself, (blocks, D, D) with row-major vec; ValueError above `limit` unless the method holds it."""
        if declares(self.method, Matrix):
            return to_host(self.method.matrix(self.state, self.block))
        size = self.block.d_out * self.block.d_in
        if size > self.limit:
            raise ValueError(
                f"{type(self.method).__name__} has no eigensystem and {size} parameters a block; multiplying it out "
                f"stops at limit={self.limit}"
            )
        columns = np.empty((self.block.blocks, size, size))
        for i in range(size):
            unit = np.zeros(self.shape)
            unit[:, i // self.block.d_in, i % self.block.d_in] = 1.0
            columns[:, :, i] = self._undamped_times(unit).reshape(self.block.blocks, size)
        return (columns + columns.mT) / 2

    def _undamped_times(self, v: np.ndarray) -> np.ndarray:
        """F~ v, (blocks, d_out, d_in)."""
        return to_host(self.method.matvec(self.state, v, _UNDAMPED))

    def dense(self) -> np.ndarray:
        """F~ + damping I itself."""
        return self.undamped + self.damping * np.eye(self.block.d_out * self.block.d_in)

    def trace(self) -> float:
        """Sum of the eigenvalues."""
        if self.diagonal is not None:
            total = self.diagonal.values.sum()
        elif self.terms:
            total = sum((_trace(A) * _trace(G)).sum() for A, G in self.terms)
        else:
            total = np.trace(self.undamped, axis1=-2, axis2=-1).sum()
        return float(total + self.damping * self.size)

    def square(self) -> float:
        """||F~||^2 in Frobenius norm, without the damping."""
        if self.diagonal is not None:
            return float((self.diagonal.values**2).sum())
        if self.terms:
            pairs = product(self.terms, repeat=2)
            return float(sum((_inner(A, B) * _inner(G, H)).sum() for (A, G), (B, H) in pairs))
        return float((self.undamped**2).sum())

    def logdet(self) -> float:
        """log of the determinant; -inf for a singular operator, ValueError for an indefinite one."""
        values = self.eigvalsh()
        if values[0] < -1e-10 * values[-1]:
            raise ValueError(f"F~ + damping I is indefinite (smallest eigenvalue {values[0]:.3g}): give more damping")
        with np.errstate(divide="ignore"):
            return float(np.log(np.maximum(values, 0.0)).sum())

    def eigvalsh(self) -> np.ndarray:
        """All eigenvalues, ascending."""
        return np.sort(self.system.values.ravel()) + self.damping

    def effective_rank(self) -> float:
        """exp(entropy of the spectrum of F~, without damping); see `Spectrum`."""
        return Spectrum(np.maximum(np.sort(self.system.values.ravel()), 0.0)).effective_rank

    def effective_dimension(self) -> float:
        """tr F~ (F~ + damping I)^-1: the number of parameters the curvature, not the damping, decides."""
        values = np.maximum(self.system.values, 0.0)
        return float((values / (values + self.damping)).sum()) if self.damping else float((values > 0).sum())

    def linear_operator(self) -> LinearOperator:
        """For SciPy, on vectors of `size` entries."""
        return exported(self.size, self.matvec)


def on_host(state: S) -> S:
    """A state on NumPy with floating leaves in float64."""

    def moved(leaf: Array) -> np.ndarray:
        host = to_host(leaf)
        return host.astype(np.float64) if np.issubdtype(host.dtype, np.floating) else host

    return tree.map(moved, state)


def eigenpairs(factor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues (blocks, d) and eigenvectors of a factor; a diagonal one has the standard basis, ones (blocks, d)."""
    values, vectors, _ = side.eigh(factor)
    return to_host(values), to_host(vectors)


def exported(size: int, matvec: Callable[[np.ndarray], np.ndarray]) -> LinearOperator:
    """A symmetric operator for SciPy, whose sparse module is loaded only here and where it iterates."""
    from scipy.sparse.linalg import LinearOperator

    def flat(v: np.ndarray) -> np.ndarray:
        return matvec(np.asarray(v, np.float64).reshape(size))

    # SciPy's stubs have the signature of a subclass here
    return LinearOperator((size, size), matvec=flat, rmatvec=flat, dtype=np.float64)  # pyright: ignore[reportCallIssue]


def _trace(factor: np.ndarray) -> np.ndarray:
    """tr of each block, (blocks,)."""
    return to_host(side.diagonal(factor)).sum(-1)


def _inner(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """<x, y> of each block, (blocks,)."""
    return (x * y).reshape(len(x), -1).sum(-1)
