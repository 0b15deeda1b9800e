"""Uses of a variable, on NumPy: the arrays of one operation to rows `a` and `g`, which have all their row axes still.

a is (blocks, *rows, d_in), a g (draws, blocks, *rows, d_out). Instead of an array `a` may be kfaccore's Ids or Patches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Protocol

import numpy as np

from kfaccore import Patches, Window
from kfaccore_tensorflow.terms import Terms


@dataclass(frozen=True)
class Seen:
    """What one use gives: `a`, an array, Ids' index (*rows,) or Patches, and g."""

    a: np.ndarray | Patches
    g: np.ndarray

    @property
    def rows(self) -> tuple[int, ...]:
        """Sizes of the row axes."""
        return self.g.shape[2:-1]

    def of(self, draws: slice) -> Seen:
        """Some of the draws."""
        return replace(self, g=self.g[draws])


class Kind(Protocol):
    """How one operation uses a weight."""

    def rows(self, x: np.ndarray | None, gy: np.ndarray, ones: bool) -> Seen:
        """From the operation's other operand and its output's gradients, draws first; `ones`: with a bias column."""
        ...


@dataclass(frozen=True)
class Product:
    """A matrix product of any kind."""

    terms: Terms

    def rows(self, x: np.ndarray | None, gy: np.ndarray, ones: bool) -> Seen:
        assert x is not None
        a, g = self.terms.arrays(x, gy)
        return Seen(np.concatenate([a, np.ones_like(a[..., :1])], axis=-1) if ones else a, g)


@dataclass(frozen=True)
class Lookup:
    """Rows of a table (size, d): x are ids."""

    size: int

    def rows(self, x: np.ndarray | None, gy: np.ndarray, ones: bool) -> Seen:
        assert x is not None
        d = prod(gy.shape[1 + x.ndim :])
        return Seen(x, gy.reshape(len(gy), 1, *x.shape, d))


@dataclass(frozen=True)
class Elementwise:
    """Added to or multiplied with a tensor, along `features` of its axes; the first `blocks` of them are blocks.

    g is the output's gradient times x, the other factor; a is 1.
    """

    rank: int
    features: tuple[int, ...]
    blocks: int = 0
    sign: int = 1

    def rows(self, x: np.ndarray | None, gy: np.ndarray, ones: bool) -> Seen:
        g = gy if x is None else gy * x
        g = -g if self.sign < 0 else g
        over = [axis for axis in range(self.rank) if axis not in self.features]
        heads = self.features[: self.blocks]
        tails = self.features[self.blocks :]
        g = np.transpose(g, [0, *(1 + axis for axis in (*heads, *over, *tails))])
        many = len(heads)
        rows = g.shape[1 + many : 1 + many + len(over)]
        g = g.reshape(len(g), prod(g.shape[1 : 1 + many]), *rows, prod(g.shape[1 + many + len(over) :]))
        return Seen(np.ones_like(g[0, ..., :1]), g)


@dataclass(frozen=True)
class Convolution:
    """A convolution, or a transposed one: that is one over the image with zeros between its points.

    window     kernel and dilation; stride of the convolution
    padding    "VALID", "SAME", or (low, high) of each spatial axis
    lone       an axis of size 1 that image and output have inside, and not outside
    spread     a transposed one's stride: points of the image stand so far apart; `window` is that of the other way
    """

    window: Window
    padding: str | tuple[tuple[int, int], ...]
    groups: int
    channels_first: bool = False
    spread: tuple[int, ...] | None = None
    lone: int | None = None

    def rows(self, x: np.ndarray | None, gy: np.ndarray, ones: bool) -> Seen:
        assert x is not None
        if self.lone is not None:
            x, gy = np.expand_dims(x, self.lone), np.expand_dims(gy, self.lone + 1)
        x = self._last(x, 1)
        gy = self._last(gy, 2)
        outputs = gy.shape[2:-1]
        x, window = self._spread(x, outputs) if self.spread else (x, self._padded(x.shape[1:-1]))
        x = np.moveaxis(x.reshape(*x.shape[:-1], self.groups, -1), -2, 0)
        g = np.moveaxis(gy.reshape(*gy.shape[:-1], self.groups, gy.shape[-1] // self.groups), -2, 1)
        flat = [i for i, k in enumerate(window.kernel) if k > 1 or x.shape[2 + i] > 1] or [0]  # 1-d ones run as 2-d
        if len(flat) < len(window.kernel):
            x = x.reshape(*x.shape[:2], *(x.shape[2 + i] for i in flat), x.shape[-1])
            values = (window.kernel, window.stride, window.padding, window.dilation)
            window = Window(*(tuple(value[i] for i in flat) for value in values))
        if window.outputs(x.shape[2:-1]) != tuple(outputs[i] for i in flat):
            raise ValueError(f"a convolution of windows {window} gave {outputs} positions: it is not what it seems")
        return Seen(Patches(x, window, ones), g)

    def _last(self, x: np.ndarray, axis: int) -> np.ndarray:
        return np.moveaxis(x, axis, -1) if self.channels_first else x

    def _padded(self, spatial: tuple[int, ...]) -> Window:
        if isinstance(self.padding, tuple):
            return replace(self.window, padding=self.padding)
        return replace(self.window, padding=tuple(same(self.window, spatial)) if self.padding == "SAME" else 0)

    def _spread(self, x: np.ndarray, outputs: tuple[int, ...]) -> tuple[np.ndarray, Window]:
        """Zeros between the points of the image, cropped where the other way's padding says so."""
        assert self.spread
        forward = self._padded(outputs).padding
        sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[1:-1], self.spread, strict=True)]
        wide = np.zeros((len(x), *sizes, x.shape[-1]), x.dtype)
        wide[(slice(None), *(slice(None, None, step) for step in self.spread))] = x
        padding = []
        for axis, (size, out) in enumerate(zip(sizes, outputs, strict=True)):
            reach = (self.window.kernel[axis] - 1) * self.window.dilation[axis]
            low = reach - forward[axis][0]
            high = out + reach - size - low
            keep = slice(max(-low, 0), size - max(-high, 0))
            wide = wide[(slice(None),) * (1 + axis) + (keep,)]
            padding.append((max(low, 0), max(high, 0)))
        return wide, Window(self.window.kernel, 1, tuple(padding), self.window.dilation)


def same(window: Window, spatial: tuple[int, ...]) -> list[tuple[int, int]]:
    """TensorFlow's padding "SAME": as many outputs as strides, the odd one at the high end."""
    found = []
    for size, k, step, rate in zip(spatial, window.kernel, window.stride, window.dilation, strict=True):
        rest = max((-(-size // step) - 1) * step + (k - 1) * rate + 1 - size, 0)
        found.append((rest // 2, rest - rest // 2))
    return found
