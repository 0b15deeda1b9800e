"""An embedding: row ids[b, s] of a table. Its A is diagonal (token counts); one-hot rows are never formed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kfaccore.method import Block
from kfaccore.record import Ids
from kfaccore.xp.arrays import Array, namespace


@dataclass(frozen=True)
class Embedding:
    """weight (size, d_out); the matrix of the equation is its transpose."""

    size: int
    d_out: int

    def block(self) -> Block:
        """Sizes, with a diagonal A."""
        return Block(self.d_out, self.size, diagonal_in=True)

    def activations(self, ids: Array) -> Ids:
        """ids (batch,) or (batch, *shared) integers below size."""
        return Ids(ids if ids.ndim <= 2 else namespace(ids).reshape(ids, (ids.shape[0], -1)), self.size)

    def gradients(self, gy: Array, draws: bool = False) -> Array:
        """gy (batch, *shared, d_out), draws first if `draws` -> g (batch, shared, d_out), or without shared axes as it
        is."""
        lead = gy.shape[: 1 + draws]
        return gy if gy.ndim == len(lead) + 1 else namespace(gy).reshape(gy, (*lead, -1, gy.shape[-1]))

    def matrix(self, parameters: Mapping[str, Array]) -> Array:
        """{"weight" (size, d_out)} -> (d_out, size)."""
        return parameters["weight"].mT

    def parameters(self, matrix: Array) -> dict[str, Array]:
        """(d_out, size), blocks axis of 1 allowed -> {"weight"}."""
        return {"weight": (matrix[0, ...] if matrix.ndim == 3 else matrix).mT}
