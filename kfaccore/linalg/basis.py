"""A symmetric matrix of one layer as eigenvalues in a basis: F~ = (Qg (x) Qa) diag(values) (Qg (x) Qa)^T.

The way into the basis and back are two products; a side that is diagonal stands in the standard basis and costs none.
A dense block has one matrix of eigenvectors for row-major vec instead of two sides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from kfaccore import tree
from kfaccore import xp as kernels
from kfaccore.linalg import side
from kfaccore.xp.arrays import Array, eps, namespace, widen


@tree.kept
@dataclass(frozen=True)
class Basis:
    """values (blocks, d_out, d_in); Qg (blocks, d_out, d_out), Qa (blocks, d_in, d_in), columns the eigenvectors, or
    diagonals (blocks, d). Qa = () says that Qg (blocks, D, D), D = d_out d_in, is of a dense block.

    Vectors V are (..., blocks, d_out, d_in) throughout.
    """

    values: Array
    Qg: Array
    Qa: Array | tuple[()] = ()

    @classmethod
    def of_term(cls, A: Array, G: Array) -> Basis:
        """G (x) A of two factors (blocks, d, d), or (blocks, d) where diagonal. Cost: d_in^3 + d_out^3."""
        a, Qa, _ = side.eigh(A)
        g, Qg, _ = side.eigh(G)
        return cls(g[:, :, None] * a[:, None, :], Qg, Qa)

    @classmethod
    def of_matrix(cls, F: Array, d_out: int) -> Basis:
        """A dense block (blocks, D, D) of row-major vec. Cost: D^3."""
        values, vectors, _ = kernels.eigh(F)
        return cls(namespace(F).reshape(values, (values.shape[0], d_out, -1)), vectors)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(blocks, d_out, d_in)."""
        blocks, d_out, d_in = self.values.shape
        return blocks, d_out, d_in

    def into(self, V: Array) -> Array:
        """Qg^T V Qa."""
        if isinstance(self.Qa, tuple):
            return _dense(V, self.Qg.mT)
        return right(left(side.transposed(self.Qg), V), self.Qa)

    def back(self, V: Array) -> Array:
        """Qg V Qa^T."""
        if isinstance(self.Qa, tuple):
            return _dense(V, self.Qg)
        return right(left(self.Qg, V), side.transposed(self.Qa))

    def times(self, weights: Array, V: Array) -> Array:
        """The matrix with eigenvalues `weights` instead of its own, times V."""
        return self.back(weights * self.into(V))

    def diagonal(self, weights: Array) -> Array:
        """The diagonal of the matrix with eigenvalues `weights`, (blocks, d_out, d_in): (Qg * Qg) W (Qa * Qa)^T."""
        if isinstance(self.Qa, tuple):
            return _dense(weights, self.Qg * self.Qg)
        return right(left(self.Qg * self.Qg, weights), side.transposed(self.Qa * self.Qa))

    def cleaned(self, signed: bool = False) -> Array:
        """The eigenvalues with those that are rounding of zero as zeros; `signed`: only those below it.

        Rounding is eps times the layer's largest, times the width of the widest side that was decomposed.
        """
        xp = namespace(self.values)
        size = xp.abs(self.values)
        small = size <= eps(self.values.dtype, xp) * self._decomposed * xp.max(size)
        if signed:
            small = small & (self.values < 0)
        return xp.where(small, xp.zeros_like(self.values), self.values)

    @property
    def _decomposed(self) -> int:
        """The widest matrix whose eigenvectors these are; 1 where both sides are diagonal."""
        sides = [self.Qg] if isinstance(self.Qa, tuple) else [self.Qg, self.Qa]
        return max(1 if side.is_diagonal(Q) else Q.shape[-1] for Q in sides)


def left(Q: Array, V: Array) -> Array:
    """Q V, for Q (blocks, d, d) or diagonal (blocks, d)."""
    return Q[:, :, None] * V if side.is_diagonal(Q) else namespace(V).matmul(Q, V)


def right(V: Array, Q: Array) -> Array:
    """V Q, for Q (blocks, d, d) or diagonal (blocks, d)."""
    return V * Q[:, None, :] if side.is_diagonal(Q) else namespace(V).matmul(V, Q)


def alike(function: Callable[[Array], Array], v: Array, shape: tuple[int, int, int]) -> Array:
    """function(v) with v as (..., *shape), in the shape of v: a plain layer's matrix may come without its blocks, and
    any vector flat. ValueError for other shapes; half precision is widened."""
    v = widen(v, "a vector")
    if v.ndim >= 3 and v.shape[-3:] == shape:
        return function(v)
    plain = shape[0] == 1 and tuple(v.shape) == shape[1:]
    if not plain and tuple(v.shape) != (prod(shape),):
        raise ValueError(
            f"a vector has shape {tuple(v.shape)}; need (blocks, d_out, d_in) = {shape}, or that of one block"
        )
    xp = namespace(v)
    return xp.reshape(function(xp.reshape(v, shape)), v.shape)


def _dense(V: Array, Q: Array) -> Array:
    """Q vec(V), for Q (blocks, D, D)."""
    xp = namespace(V)
    flat = xp.reshape(V, (*V.shape[:-2], -1, 1))
    return xp.reshape(xp.matmul(Q, flat), V.shape)
