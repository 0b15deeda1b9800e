"""Layer kinds that only observed operations have: stacked products, a table that is the head too, and what is left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import array_api_compat as aac

from kfaccore import Block

Array = Any


@dataclass(frozen=True)
class Stack:
    """Products of several matrices side by side, one a block: weight (blocks, d_out, d_in)."""

    blocks: int
    d_in: int
    d_out: int

    def block(self) -> Block:
        """One block a matrix."""
        return Block(self.d_out, self.d_in, self.blocks)

    def matrix(self, parameters: Mapping[str, Array]) -> Array:
        """{"weight"} as it is."""
        return parameters["weight"]

    def parameters(self, matrix: Array) -> dict[str, Array]:
        """The inverse of `matrix`."""
        return {"weight": matrix}


@dataclass(frozen=True)
class Tied:
    """A table (size, d) that rows are taken from and that rows are multiplied with: an embedding tied to the output.

    The block of an example's J = sum_s g_s x_s^T + sum_t e_t h_t^T, g and x of the output layer, e_t the one-hot row of
    token t and h_t the gradient of its embedding, has two Kronecker terms. The record holds both sums as positions, so
    `dense` is exact; factors of K-FAC are averages over both, with the traces of both made equal (see `tied`).
    """

    size: int
    d: int

    def block(self) -> Block:
        """Sizes of the output layer."""
        return Block(self.size, self.d)

    def matrix(self, parameters: Mapping[str, Array]) -> Array:
        """{"weight" (size, d)} as it is."""
        return parameters["weight"]

    def parameters(self, matrix: Array) -> dict[str, Array]:
        """(size, d), blocks axis of 1 allowed -> {"weight"}."""
        return {"weight": matrix[0, ...] if matrix.ndim == 3 else matrix}


@dataclass(frozen=True)
class Rest:
    """A parameter of any shape as one row that all examples share: its own gradient, with a diagonal curvature."""

    d: int

    def block(self) -> Block:
        """(d, 1); G would be a matrix of d squared numbers, so it is a diagonal for methods that form it."""
        return Block(self.d, 1, diagonal_out=True)

    def matrix(self, parameters: Mapping[str, Array]) -> Array:
        """{"parameter"} -> (d, 1)."""
        p = parameters["parameter"]
        return aac.array_namespace(p).reshape(p, (-1, 1))

    def parameters(self, matrix: Array) -> dict[str, Array]:
        """(d, 1), blocks axis of 1 allowed -> {"parameter"} (d,)."""
        return {"parameter": aac.array_namespace(matrix).reshape(matrix, (-1,))}
