"""A linear layer: y = x W^T + b over the last axis, shared over any axes between batch and features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kfaccore.method import Block
from kfaccore.xp.arrays import Array, namespace
from kfaccore.xp.gpu import with_column


@dataclass(frozen=True)
class Linear:
    """weight (d_out, d_in), or (d_in, d_out) when `transposed` (the kernels of JAX and Keras); bias (d_out,)."""

    d_in: int
    d_out: int
    bias: bool = True
    transposed: bool = False

    def block(self) -> Block:
        """Sizes of the layer's matrix, the bias a column."""
        return Block(self.d_out, self.d_in + self.bias)

    def activations(self, x: Array) -> Array:
        """x (batch, *shared, d_in) -> a (batch, shared, d_in + 1), or (batch, d_in + 1) without shared axes."""
        if x.shape[-1] != self.d_in:
            raise ValueError(f"x has shape {tuple(x.shape)}; need {self.d_in} features on the last axis")
        return with_ones(_shared(x)) if self.bias else _shared(x)

    def gradients(self, gy: Array, draws: bool = False) -> Array:
        """gy (batch, *shared, d_out), draws first if `draws` -> g with the shared axes joined."""
        if gy.shape[-1] != self.d_out:
            raise ValueError(f"gy has shape {tuple(gy.shape)}; need {self.d_out} features on the last axis")
        return _shared(gy, 1 + draws)

    def matrix(self, parameters: Mapping[str, Array]) -> Array:
        """{"weight", "bias"} -> (d_out, d_in + 1); of several layers with an axis for them before all others."""
        w = parameters["weight"].mT if self.transposed else parameters["weight"]
        return with_column(w, parameters["bias"]) if self.bias else w

    def parameters(self, matrix: Array) -> dict[str, Array]:
        """(d_out, d_in + 1), blocks axis of 1 allowed -> {"weight", "bias"}."""
        matrix = matrix[0, ...] if matrix.ndim == 3 else matrix
        w = matrix[:, : self.d_in]
        named = {"weight": w.mT if self.transposed else w}
        return {**named, "bias": matrix[:, self.d_in]} if self.bias else named


def with_ones(x: Array) -> Array:
    """x with a last column of ones."""
    xp = namespace(x)
    return xp.concat([x, xp.ones_like(x[..., :1])], axis=-1)


def _shared(x: Array, lead: int = 1) -> Array:
    return x if x.ndim == lead + 1 else namespace(x).reshape(x, (*x.shape[:lead], -1, x.shape[-1]))
