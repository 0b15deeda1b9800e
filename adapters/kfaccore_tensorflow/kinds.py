"""Layer kinds as Keras lays them out, on NumPy: inputs to `a`, output gradients to `g`, variables to the matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kfaccore import Block, Patches, Window
from kfaccore.layers import Bias, Conv, Embedding, Gain, Linear

Named = dict[str, np.ndarray]


def own(x: Any) -> np.ndarray:
    """An array that the core made of NumPy's, which is NumPy's."""
    return x


@dataclass(frozen=True)
class Plain:
    """Dense and Embedding: the core's layer as it is."""

    layer: Linear | Embedding

    def block(self) -> Block:
        return self.layer.block()

    def rows(self, x: np.ndarray, gy: np.ndarray) -> tuple[Any, np.ndarray]:
        if isinstance(self.layer, Embedding) and x.dtype.kind == "f":
            x = x.astype(np.int64)
        return self.layer.activations(x), own(self.layer.gradients(gy, draws=True))

    def matrix(self, named: Named) -> np.ndarray:
        return own(self.layer.matrix(named))

    def parameters(self, matrix: np.ndarray) -> Named:
        return {role: own(x) for role, x in self.layer.parameters(matrix).items()}


@dataclass(frozen=True)
class Convolution:
    """A convolution whose padding, "valid", "same" or "causal", meets its image's size at each call.

    geometry         kernel, stride and dilation; its padding is not used
    channels         (in, out) over all groups; a depthwise one has as many groups as inputs
    """

    geometry: Window
    padding: str
    channels: tuple[int, int]
    groups: int
    bias: bool
    channels_first: bool

    def block(self) -> Block:
        return self._conv(self.geometry).block()

    def rows(self, x: np.ndarray, gy: np.ndarray) -> tuple[Patches, np.ndarray]:
        x = self._last(x, 1)
        gy = self._last(gy, 2)
        conv = self._conv(self._window(x.shape[1:-1]))
        return conv.activations(x), own(conv.gradients(gy, draws=True))

    def matrix(self, named: Named) -> np.ndarray:
        shape = (*self.geometry.kernel, self.channels[0] // self.groups, self.channels[1])
        return own(self._conv(self.geometry).matrix({**named, "weight": named["weight"].reshape(shape)}))

    def parameters(self, matrix: np.ndarray) -> Named:
        return {role: own(x) for role, x in self._conv(self.geometry).parameters(matrix).items()}

    def _conv(self, window: Window) -> Conv:
        return Conv(window, self.channels, self.groups, self.bias)

    def _last(self, x: np.ndarray, lead: int) -> np.ndarray:
        return np.moveaxis(x, lead, -1) if self.channels_first else x

    def _window(self, spatial: tuple[int, ...]) -> Window:
        w = self.geometry
        reach = [(k - 1) * r for k, r in zip(w.kernel, w.dilation, strict=True)]
        pads = [(0, 0)] * len(reach)
        if self.padding == "causal":
            pads = [(r, 0) for r in reach]
        elif self.padding == "same":
            rest = [max((-(-h // s) - 1) * s + r + 1 - h, 0) for h, s, r in zip(spatial, w.stride, reach, strict=True)]
            pads = [(p // 2, p - p // 2) for p in rest]
        return Window(w.kernel, w.stride, tuple(pads), w.dilation)


@dataclass(frozen=True)
class Shift:
    """A lone bias (d,) along `axes` of the layer's output, negative ones counted from the last."""

    axes: tuple[int, ...]
    d: int

    def block(self) -> Block:
        return Bias(self.d).block()

    def rows(self, x: np.ndarray, gy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        g = self._last(gy, 1)
        return np.ones_like(g[0, ..., :1]), g

    def matrix(self, named: Named) -> np.ndarray:
        return own(Bias(self.d).matrix({"bias": named["weight"].reshape(-1)}))

    def parameters(self, matrix: np.ndarray) -> Named:
        return {"weight": own(Bias(self.d).parameters(matrix)["bias"])}

    def _last(self, y: np.ndarray, lead: int) -> np.ndarray:
        """(*lead, batch, positions, d): `axes` of the array behind `lead` axes joined at the end."""
        places = [axis if axis < 0 else axis + lead for axis in self.axes]
        y = np.moveaxis(y, places, range(-len(self.axes), 0))
        return y.reshape(*y.shape[: lead + 1], -1, self.d)


@dataclass(frozen=True)
class Scale(Shift):
    """The gain (d,) of a layer normalisation over `axes`."""

    epsilon: float

    def rows(self, x: np.ndarray, gy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x = self._last(x, 0)
        gy = self._last(gy, 1)
        centred = x - np.mean(x, axis=-1, keepdims=True)
        hat = centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + self.epsilon)
        return np.ones_like(x[..., :1]), own(Gain(self.d).scaled(gy, hat, draws=True))
