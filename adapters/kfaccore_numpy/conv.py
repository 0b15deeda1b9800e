"""Convolution and pooling on NHWC images, a cache-sized chunk of unfolded patches at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import array_api_compat as aac
import numpy as np

from kfaccore import Block, Patches, Window

Array = Any
_CHUNK = 1 << 18  # unfolded elements held at once


@dataclass(frozen=True)
class Conv2d:
    """C_out channels over a window; W (C_out, kernel positions x C_in + 1) in the core's column order."""

    channels: int
    window: Window

    def shape(self, inputs: tuple[int, ...]) -> tuple[int, ...]:
        _check(self, inputs, len(self.window.kernel))
        return (*self.window.outputs(inputs[:-1]), self.channels)

    def block(self, inputs: tuple[int, ...]) -> Block:
        """Sizes for the core: d_in is kernel, channels and the bias."""
        return Block(self.channels, prod(self.window.kernel) * inputs[-1] + 1)

    def init(self, rng: np.random.Generator, inputs: tuple[int, ...]) -> np.ndarray:
        """Uniform in +-1/sqrt(fan in), bias included."""
        d_in = prod(self.window.kernel) * inputs[-1]
        return rng.uniform(-1.0, 1.0, (self.channels, d_in + 1)) / np.sqrt(d_in)

    def forward(self, W: Array, x: Array) -> tuple[Array, Array]:
        """(outputs, inputs), images (batch, *spatial, channels)."""
        xp = aac.array_namespace(x)
        parts = [a[0, ...] @ W.T for a in self._rows(x)]
        return xp.reshape(xp.concat(parts), (x.shape[0], *self.shape(tuple(x.shape[1:])))), x

    def backward(self, W: Array, saved: Array, gy: Array) -> Array:
        """Each kernel position adds its share to a shifted view of the padded image."""
        xp = aac.array_namespace(gy)
        w = self.window
        spatial = saved.shape[1:-1]
        channels = saved.shape[-1]
        outputs = gy.shape[1:-1]
        size = [h + low + high for h, (low, high) in zip(spatial, w.padding, strict=True)]
        out = xp.zeros((gy.shape[0], *size, channels), dtype=gy.dtype, device=aac.device(gy))
        for i, offset in enumerate(product(*map(range, w.kernel))):
            spans = tuple(
                slice(d * r, d * r + (o - 1) * s + 1, s)
                for d, r, o, s in zip(offset, w.dilation, outputs, w.stride, strict=True)
            )
            out[:, *spans, :] = out[:, *spans, :] + gy @ W[:, i * channels : (i + 1) * channels]
        inner = tuple(slice(low, low + h) for h, (low, _) in zip(spatial, w.padding, strict=True))
        return xp.asarray(out[:, *inner, :], copy=True)

    def activations(self, saved: Array) -> Patches:
        """The inputs as `Patches`, with a last column of ones for the bias."""
        return Patches(saved, self.window, bias=True)

    def gradient(self, saved: Array, gy: Array, n: float, factored: bool) -> Array:
        total = 0.0
        start = 0
        for a in self._rows(saved):
            g = gy[start : start + a.shape[1], ...]
            start += a.shape[1]
            xp = aac.array_namespace(a)
            total = total + xp.reshape(g, (-1, self.channels)).T @ xp.reshape(a, (-1, a.shape[-1]))
        return total / n

    def _rows(self, x: Array) -> Iterator[Array]:
        patches = Patches(x, self.window, bias=True)
        return patches.rows(max(1, _CHUNK // prod(patches.shape[2:])))


@dataclass(frozen=True)
class AvgPool:
    """Mean over size x size squares that do not overlap."""

    size: int = 2

    def shape(self, inputs: tuple[int, ...]) -> tuple[int, ...]:
        _check(self, inputs, 2)
        if any(h % self.size for h in inputs[:-1]):
            raise ValueError(f"a pool of {self.size} does not divide images of {inputs[:-1]}")
        return (*(h // self.size for h in inputs[:-1]), inputs[-1])

    def forward(self, W: None, x: Array) -> tuple[Array, None]:
        """(means of the windows, nothing to keep)."""
        return aac.array_namespace(x).mean(_squares(x, self.size), axis=(2, 4)), None

    def backward(self, W: None, saved: None, gy: Array) -> Array:
        """Each window's gradient, spread evenly."""
        xp = aac.array_namespace(gy)
        return xp.repeat(xp.repeat(gy, self.size, axis=1), self.size, axis=2) / self.size**2


@dataclass(frozen=True)
class MaxPool(AvgPool):
    """Largest of size x size squares that do not overlap; ties share the gradient."""

    def forward(self, W: None, x: Array) -> tuple[Array, Array]:
        """(largest of each window, the share of it that each entry has)."""
        xp = aac.array_namespace(x)
        squares = _squares(x, self.size)
        top = xp.max(squares, axis=(2, 4), keepdims=True)
        hit = xp.astype(squares == top, x.dtype)
        share = xp.reshape(hit / xp.sum(hit, axis=(2, 4), keepdims=True), x.shape)
        return top[:, :, 0, :, 0, :], share

    def backward(self, W: None, saved: Array, gy: Array) -> Array:
        """Each window's gradient by those shares, for any number of draws folded into the batch."""
        xp = aac.array_namespace(gy)
        spread = xp.repeat(xp.repeat(gy, self.size, axis=1), self.size, axis=2)
        return xp.reshape(xp.reshape(spread, (-1, *saved.shape)) * saved, spread.shape)


def _squares(x: Array, size: int) -> Array:
    b, h, w, c = x.shape
    return aac.array_namespace(x).reshape(x, (b, h // size, size, w // size, size, c))


def _check(layer: object, inputs: tuple[int, ...], axes: int) -> None:
    """ValueError for examples that are no images of so many axes."""
    if len(inputs) != axes + 1:
        raise ValueError(
            f"{type(layer).__name__} got examples of shape {inputs}; need {axes} axes of positions and the channels"
        )
