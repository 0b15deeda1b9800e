"""Gain and bias of a normalisation layer, y = gain * xhat + bias: two lone vectors, each a record with a = 1.

J of an example is sum_s gy_s * xhat_s for the gain and sum_s gy_s for the bias, so A = 1 under reduce and K-FAC's block
is exact there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kfaccore.method import Block
from kfaccore.xp.arrays import Array, namespace


@dataclass(frozen=True)
class Bias:
    """A lone bias (d,)."""

    d: int

    def block(self) -> Block:
        """(d, 1)."""
        return Block(self.d, 1)

    def activations(self, x: Array) -> Array:
        """Ones (batch, shared, 1) for x (batch, *shared, d)."""
        xp = namespace(x)
        return xp.ones_like(xp.reshape(x, (x.shape[0], -1, x.shape[-1]))[..., :1])

    def gradients(self, gy: Array, draws: bool = False) -> Array:
        """gy (batch, *shared, d), draws first if `draws` -> (batch, shared, d)."""
        return namespace(gy).reshape(gy, (*gy.shape[: 1 + draws], -1, gy.shape[-1]))

    def matrix(self, parameters: Mapping[str, Array]) -> Array:
        """{"bias" (d,)} -> (d, 1)."""
        return parameters["bias"][:, None]

    def parameters(self, matrix: Array) -> dict[str, Array]:
        """(d, 1), blocks axis of 1 allowed -> {"bias"}."""
        return {"bias": matrix[..., 0] if matrix.ndim == 2 else matrix[0, :, 0]}


@dataclass(frozen=True)
class Gain(Bias):
    """A lone gain (d,); its gradients need the normalised input."""

    def scaled(self, gy: Array, xhat: Array, draws: bool = False) -> Array:
        """gy * xhat as g: gradients of the gain, (batch, shared, d)."""
        return self.gradients(gy * xhat, draws)

    def matrix(self, parameters: Mapping[str, Array]) -> Array:
        """{"gain" (d,)} -> (d, 1)."""
        return parameters["gain"][:, None]

    def parameters(self, matrix: Array) -> dict[str, Array]:
        """(d, 1), blocks axis of 1 allowed -> {"gain"}."""
        return {"gain": super().parameters(matrix)["bias"]}
