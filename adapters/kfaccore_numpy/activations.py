"""Elementwise nonlinearities; they overwrite a fresh input and keep the ones column."""

from __future__ import annotations

from dataclasses import dataclass
from math import pi, sqrt
from typing import Any, ClassVar

import array_api_compat as aac

Array = Any


@dataclass(frozen=True)
class Activation:
    """y = value(x); the slope is computed from y where it can be, from x (`needs_input`) otherwise."""

    keeps_output: ClassVar[bool] = True
    needs_input: ClassVar[bool] = False

    def shape(self, inputs: tuple[int, ...]) -> tuple[int, ...]:
        return inputs

    def value(self, x: Array) -> Array:
        raise NotImplementedError

    def slope(self, kept: Array) -> Array:
        """dy/dx from y, or from x if `needs_input`."""
        raise NotImplementedError

    def forward(self, W: None, x: Array, owned: bool = False) -> tuple[Array, Array]:
        """(outputs, what `backward` needs)."""
        y = x if owned and not self.needs_input else aac.array_namespace(x).asarray(x, copy=True)
        inner = features(y)
        inner[...] = self.value(features(x))
        return y, features(x) if self.needs_input else inner

    def backward(self, W: None, saved: Array, gy: Array) -> Array:
        """gy times the slope, for any number of draws folded into the batch; overwrites gy."""
        xp = aac.array_namespace(gy)
        draws = xp.reshape(gy, (-1, *saved.shape))
        draws *= self.slope(saved)
        return gy


def features(x: Array) -> Array:
    """The values of a layer: without the ones column for rows, all of an image."""
    return x[:, : x.shape[1] - 1] if x.ndim == 2 else x


@dataclass(frozen=True)
class Tanh(Activation):
    """tanh z, entry by entry."""

    def value(self, x: Array) -> Array:
        return aac.array_namespace(x).tanh(x)

    def slope(self, kept: Array) -> Array:
        return 1.0 - kept * kept


@dataclass(frozen=True)
class ReLU(Activation):
    """max(z, 0), entry by entry."""

    def value(self, x: Array) -> Array:
        xp = aac.array_namespace(x)
        return xp.maximum(x, xp.zeros_like(x))  # which keeps NaN

    def slope(self, kept: Array) -> Array:
        return aac.array_namespace(kept).astype(kept > 0, kept.dtype)


@dataclass(frozen=True)
class Sigmoid(Activation):
    """1 / (1 + exp(-z)), entry by entry."""

    def value(self, x: Array) -> Array:
        return 0.5 * (1.0 + aac.array_namespace(x).tanh(0.5 * x))

    def slope(self, kept: Array) -> Array:
        return kept * (1.0 - kept)


@dataclass(frozen=True)
class GELU(Activation):
    """The tanh form, x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""

    needs_input: ClassVar[bool] = True

    def value(self, x: Array) -> Array:
        return 0.5 * x * (1.0 + aac.array_namespace(x).tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))

    def slope(self, kept: Array) -> Array:
        t = aac.array_namespace(kept).tanh(sqrt(2 / pi) * (kept + 0.044715 * kept**3))
        return 0.5 * (1.0 + t) + 0.5 * kept * (1.0 - t * t) * sqrt(2 / pi) * (1.0 + 0.134145 * kept * kept)
