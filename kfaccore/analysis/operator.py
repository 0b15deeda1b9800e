"""The Fisher operator of a fitted state, F~ + damping I, layer by layer and whole, in float64 on the host.

A sum of Kronecker products, a Kronecker basis or a dense block are used where a method declares them (`method`); any
other is multiplied out by its `matvec`, up to `limit` parameters a block. Layers are independent: the whole is
block-diagonal. Eigenvectors are found once: `replace(op, damping=...)`, or `damped` of the whole, keeps them. Inside
jit, states and damping may be traced: figures are then 0-d arrays, and what would be refused is not finite instead.
Cost: eigensystem or one term d_in^3 + d_out^3 once, then four products; otherwise (d_out d_in)^3 once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kfaccore import tree
from kfaccore.analysis.fitted import Fitted
from kfaccore.linalg.basis import Basis, alike
from kfaccore.method import Block, Method, State
from kfaccore.xp.arrays import Array, is_numpy, is_tracer, namespace, to_host

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

Figure = float | Array  # a number, or a 0-d array that is traced


@dataclass(frozen=True)
class LayerOperator:
    """F~ + damping I of one layer; vectors are (blocks, d_out, d_in), 2-D ones come back 2-D.

    fitted   what was found of the state so far; made here, and handed on by `dataclasses.replace`
    """

    method: Method
    state: State
    block: Block
    damping: float | Array = 0.0
    limit: int = 2048
    fitted: Fitted | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        given = (self.method, self.state, self.block, self.limit)
        if self.fitted is None or not self.fitted.of(*given):
            object.__setattr__(self, "fitted", Fitted(*given))

    @property
    def found(self) -> Fitted:
        """What the state says whatever the damping."""
        assert self.fitted is not None
        return self.fitted

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
        return self.found.solvable

    @property
    def terms(self) -> tuple[tuple[Array, Array], ...]:
        """Pairs (A, G) of F~ = sum of G (x) A; none where the method does not say."""
        return self.found.terms

    @property
    def diagonal(self) -> Basis | None:
        """F~ in the basis that diagonalises it; None where the method does not say, or says it with its one term."""
        return self.found.diagonal

    @property
    def basis(self) -> Basis:
        """Eigenvalues and eigenvectors of F~, without the damping."""
        return tree.map(self._beside, self.found.basis) if is_tracer(self.damping) else self.found.basis

    @property
    def undamped(self) -> Array:
        """F~ itself, (blocks, D, D) with row-major vec; ValueError above `limit` unless the method holds it."""
        return self.found.matrix

    def matvec(self, v: Array) -> Array:
        """(F~ + damping I) v."""
        return alike(lambda x: self._beside(self.found.times(x)) + self.damping * x, v, self.shape)

    def solve(self, v: Array) -> Array:
        """(F~ + damping I)^-1 v; conjugate gradients to 1e-12 where eigenvectors cannot be had."""
        if self.solvable:
            basis = self.basis
            below = basis.values + self.damping
            if not is_tracer(below) and not below.min() > 0:  # pyright: ignore[reportAttributeAccessIssue] on the host
                low = float(namespace(below).min(below))
                raise ValueError(f"F~ + {self.damping} I is singular (smallest eigenvalue {low:.3g}): give damping > 0")
            return alike(lambda x: basis.times(1.0 / below, self._beside(x)), v, self.shape)
        from scipy.sparse.linalg import cg

        found, info = cg(self.linear_operator(), to_host(v).ravel(), rtol=1e-12)
        if info:
            raise ValueError(f"conjugate gradients stopped after {info} iterations: give a larger damping")
        return found.reshape(v.shape)

    def dense(self) -> Array:
        """F~ + damping I itself."""
        return self.undamped + self.damping * np.eye(self.block.d_out * self.block.d_in)

    def trace(self) -> Figure:
        """Sum of the eigenvalues."""
        return figure(self.found.trace + self.damping * self.size)

    def square(self) -> Figure:
        """||F~||^2 in Frobenius norm, without the damping."""
        return figure(self.found.square)

    def logdet(self) -> Figure:
        """log of the determinant; -inf for a singular operator, whose zeros are below the rounding of the largest;
        ValueError for an indefinite one."""
        values = self.basis.cleaned() + self.damping
        xp = namespace(values)
        if not is_tracer(values):
            low = float(xp.min(values))
            if low < 0:
                raise ValueError(f"F~ + damping I is indefinite (smallest eigenvalue {low:.3g}): give more damping")
        with np.errstate(divide="ignore"):
            return figure(xp.sum(xp.log(values)))

    def eigvalsh(self) -> Array:
        """All eigenvalues, ascending."""
        values = self.basis.values
        return namespace(values).sort(namespace(values).reshape(values, (-1,))) + self.damping

    def effective_rank(self) -> Figure:
        """exp(entropy of the spectrum of F~, without damping); see `Spectrum`."""
        return effective_rank(self.found.basis.values)

    def effective_dimension(self) -> Figure:
        """tr F~ (F~ + damping I)^-1: the number of parameters the curvature, not the damping, decides."""
        values = self.basis.values
        xp = namespace(values)
        values = xp.where(values > 0, values, xp.zeros_like(values))
        below = xp.where(values > 0, values + self.damping, xp.ones_like(values))
        return figure(xp.sum(values / below))

    def linear_operator(self) -> LinearOperator:
        """For SciPy, on vectors of `size` entries."""
        return exported(self.size, self.matvec)

    def _beside(self, x: Array) -> Array:
        """`x` where the damping is traced: in its namespace."""
        return namespace(self.damping).asarray(x) if is_tracer(self.damping) and is_numpy(x) else x


def figure(x: Figure) -> Figure:
    """A number, unless it is being traced."""
    return x if is_tracer(x) else float(x)


def effective_rank(values: Array) -> Figure:
    """exp(entropy) of eigenvalues of any shape, those below zero left out; 0 where there are none."""
    xp = namespace(values)
    values = xp.where(values > 0, values, xp.zeros_like(values))
    total = xp.sum(values)
    share = values / xp.where(total > 0, total, xp.ones_like(total))
    entropy = -xp.sum(share * xp.log(xp.where(share > 0, share, xp.ones_like(share))))
    return figure(xp.where(total > 0, xp.exp(entropy), xp.zeros_like(total)))


def exported(size: int, matvec: Callable[[np.ndarray], Array | np.ndarray]) -> LinearOperator:
    """A symmetric operator for SciPy, whose sparse module is loaded only here and where it iterates."""
    from scipy.sparse.linalg import LinearOperator

    def flat(v: np.ndarray) -> Array | np.ndarray:
        return matvec(np.asarray(v, np.float64).reshape(size))

    # SciPy's stubs have the signature of a subclass here
    return LinearOperator((size, size), matvec=flat, rmatvec=flat, dtype=np.float64)  # pyright: ignore[reportCallIssue]
