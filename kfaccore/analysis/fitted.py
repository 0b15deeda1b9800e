"""What a fitted state says of one layer's F~, whatever the damping: found once, kept for every operator made of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import product
from operator import add
from typing import Any, TypeVar

import numpy as np

from kfaccore import tree
from kfaccore.linalg import side
from kfaccore.linalg.basis import Basis
from kfaccore.method import Block, Eigensystem, Hyper, KroneckerTerms, Matrix, Method, State, declares
from kfaccore.xp.arrays import Array, is_tracer, namespace, to_host

S = TypeVar("S", bound=State)
UNDAMPED = Hyper(0, 0.0, 0.0)


@dataclass(frozen=True, eq=False)
class Fitted:
    """F~ of one state, in the namespace of its leaves; multiplied out up to `limit` parameters a block where the method
    says neither terms nor an eigensystem nor a matrix."""

    method: Method
    state: State
    block: Block
    limit: int

    def of(self, method: Method, state: State, block: Block, limit: int) -> bool:
        """Whether these are what this was made of."""
        return self.method is method and self.state is state and self.block == block and self.limit == limit

    @property
    def size(self) -> int:
        """Parameters of one block."""
        return self.block.d_out * self.block.d_in

    @property
    def solvable(self) -> bool:
        """Whether `basis` can be had."""
        known = len(self.terms) == 1 or self.diagonal is not None or declares(self.method, Matrix)
        return known or self.size <= self.limit

    @cached_property
    def terms(self) -> tuple[tuple[Array, Array], ...]:
        """Pairs (A, G) of F~ = sum of G (x) A; none where the method does not say."""
        if not declares(self.method, KroneckerTerms):
            return ()
        return tuple(self.method.kronecker_terms(self.state, self.block))

    @cached_property
    def diagonal(self) -> Basis | None:
        """F~ in the basis that diagonalises it; None where the method does not say, or says it with its one term."""
        if self.terms or not declares(self.method, Eigensystem):
            return None
        found = self.method.eigensystem(self.state, UNDAMPED)
        if found is None:
            return None
        Qa, Qg, values = found
        return Basis(values, Qg, Qa)

    @cached_property
    def basis(self) -> Basis:
        """Eigenvalues and eigenvectors of F~."""
        if self.diagonal is not None:
            return self.diagonal
        if len(self.terms) == 1:
            return Basis.of_term(*self.terms[0])
        return Basis.of_matrix(self.matrix, self.block.d_out)

    @cached_property
    def matrix(self) -> Array:
        """F~ itself, (blocks, D, D) with row-major vec; ValueError above `limit` unless the method holds it."""
        if declares(self.method, Matrix):
            return self.method.matrix(self.state, self.block)
        if self.size > self.limit:
            raise ValueError(
                f"{type(self.method).__name__} has no eigensystem and {self.size} parameters a block; multiplying it "
                f"out stops at limit={self.limit}"
            )
        shape = (self.block.blocks, self.block.d_out, self.block.d_in)
        columns = []
        for i in range(self.size):
            unit: Any = np.zeros(shape)
            unit[:, i // self.block.d_in, i % self.block.d_in] = 1.0
            column = self.method.matvec(self.state, unit, UNDAMPED)
            columns.append(namespace(column).reshape(column, (self.block.blocks, self.size)))
        found = namespace(columns[0]).stack(columns, axis=-1)
        return (found + found.mT) / 2

    def times(self, v: Array) -> Array:
        """F~ v, (blocks, d_out, d_in)."""
        return self.method.matvec(self.state, v, UNDAMPED)

    @cached_property
    def trace(self) -> Array:
        """tr F~ of all blocks, 0-d."""
        if self.diagonal is not None:
            return namespace(self.diagonal.values).sum(self.diagonal.values)
        if self.terms:
            xp = namespace(self.terms[0][0])
            return reduce(add, [xp.sum(_trace(A) * _trace(G)) for A, G in self.terms])
        return namespace(self.matrix).sum(namespace(self.matrix).linalg.diagonal(self.matrix))

    @cached_property
    def square(self) -> Array:
        """||F~||^2 in Frobenius norm, 0-d."""
        if self.diagonal is not None:
            return namespace(self.diagonal.values).sum(self.diagonal.values**2)
        if self.terms:
            xp = namespace(self.terms[0][0])
            pairs = product(self.terms, repeat=2)
            return reduce(add, [xp.sum(_inner(A, B) * _inner(G, H)) for (A, G), (B, H) in pairs])
        return namespace(self.matrix).sum(self.matrix**2)


def on_host(state: S) -> S:
    """A state on NumPy with floating leaves in float64; leaves that are being traced stay what they are."""

    def moved(leaf: Any) -> Any:
        if is_tracer(leaf):
            return leaf
        host = to_host(leaf)
        return host.astype(np.float64) if np.issubdtype(host.dtype, np.floating) else host

    return tree.map(moved, state)


def eigenpairs(factor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues (blocks, d) and eigenvectors of a factor; a diagonal one has the standard basis, ones (blocks, d)."""
    values, vectors, _ = side.eigh(factor)
    return to_host(values), to_host(vectors)


def _trace(factor: Array) -> Array:
    """tr of each block, (blocks,)."""
    diagonal = side.diagonal(factor)
    return namespace(diagonal).sum(diagonal, axis=-1)


def _inner(x: Array, y: Array) -> Array:
    """<x, y> of each block, (blocks,)."""
    xp = namespace(x)
    return xp.sum(xp.reshape(x * y, (x.shape[0], -1)), axis=-1)
