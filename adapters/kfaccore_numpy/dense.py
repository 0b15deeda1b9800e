"""Dense layers. Between layers, 2-D values carry a last column of ones, so the bias costs nothing to append."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import array_api_compat as aac
import numpy as np

from kfaccore import Block, Factored

Array = Any


def with_ones(batch: int, d: int, like: Array) -> Array:
    """An empty (batch, d + 1) buffer whose last column is ones."""
    xp = aac.array_namespace(like)
    out = xp.empty((batch, d + 1), dtype=like.dtype, device=aac.device(like))
    out[:, d] = 1.0
    return out


@dataclass(frozen=True)
class Dense:
    """y = W [x; 1] with W (d_out, d_in + 1)."""

    d_out: int

    def shape(self, inputs: tuple[int, ...]) -> tuple[int, ...]:
        if len(inputs) != 1:
            raise ValueError(f"Dense got examples of shape {inputs}; put Flatten() before it")
        return (self.d_out,)

    def block(self, inputs: tuple[int, ...]) -> Block:
        """Sizes for the core: d_in counts the bias."""
        return Block(self.d_out, inputs[0] + 1)

    def init(self, rng: np.random.Generator, inputs: tuple[int, ...]) -> np.ndarray:
        """Uniform in +-1/sqrt(d_in), bias included."""
        return rng.uniform(-1.0, 1.0, (self.d_out, inputs[0] + 1)) / np.sqrt(inputs[0])

    def forward(self, W: Array, x: Array) -> tuple[Array, Array]:
        """(x W^T with a last column of ones, inputs), the bias being the last column of W."""
        y = with_ones(x.shape[0], self.d_out, x)
        if isinstance(x, np.ndarray):
            np.matmul(x, W.T, out=y[:, :-1])
        else:
            y[:, : self.d_out] = x @ W.T
        return y, x

    def backward(self, W: Array, saved: Array, gy: Array) -> Array:
        """Output gradients times W without the bias."""
        return gy @ W[:, : W.shape[1] - 1]

    def activations(self, saved: Array) -> Array:
        """The inputs, whose last column is the ones of the bias."""
        return saved

    def gradient(self, saved: Array, gy: Array, n: float, factored: bool) -> Array | Factored:
        """Mean gradient, left unmultiplied where applying a preconditioner to the rows is cheaper."""
        if factored and saved.shape[0] < max(saved.shape[1], gy.shape[1]):
            return Factored(saved, gy, n)
        return (gy * (1.0 / n)).T @ saved


@dataclass(frozen=True)
class Flatten:
    """Images (batch, *spatial, C) to rows; what is rows already stays."""

    def shape(self, inputs: tuple[int, ...]) -> tuple[int, ...]:
        return (prod(inputs),)

    def forward(self, W: None, x: Array) -> tuple[Array, tuple[int, ...]]:
        """(a row an example with a last column of ones, the shape that came)."""
        if x.ndim == 2:  # with its ones; a copy, as the next layer may overwrite what it is given
            return aac.array_namespace(x).asarray(x, copy=True), (x.shape[1] - 1,)
        d = prod(x.shape[1:])
        y = with_ones(x.shape[0], d, x)
        y[:, :d] = aac.array_namespace(x).reshape(x, (x.shape[0], d))
        return y, tuple(x.shape[1:])

    def backward(self, W: None, saved: tuple[int, ...], gy: Array) -> Array:
        """Gradients in the shape that came."""
        return aac.array_namespace(gy).reshape(gy, (gy.shape[0], *saved))
