"""Layers in sequence: forward with a tape, backward for any draws, and what kfaccore asks of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import array_api_compat as aac
import numpy as np

from kfaccore import Block, Factored, Record
from kfaccore_numpy.activations import Activation, features
from kfaccore_numpy.dense import with_ones

Array = Any
Params = dict[str, Array]


@dataclass(frozen=True)
class Residual:
    """x + layers(x); the layers must keep the shape."""

    layers: tuple

    def shape(self, inputs: tuple[int, ...]) -> tuple[int, ...]:
        outputs = inputs
        for layer in self.layers:
            outputs = layer.shape(outputs)
        if outputs != inputs:
            raise ValueError(f"Residual turns examples of {inputs} into {outputs}; it must keep the shape")
        return outputs


@dataclass(frozen=True)
class Tape:
    """What forward kept of each layer, by name, and the shape of its prediction."""

    saved: dict[str, Any]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Sequential:
    """A network for examples of shape `inputs`: (d,) or (height, width, channels)."""

    inputs: tuple[int, ...]
    layers: tuple

    def __post_init__(self) -> None:
        for _ in self._walk(self.layers, self.inputs, ""):
            pass

    def init(self, rng: np.random.Generator, place: Callable[[np.ndarray], Array] = np.float32) -> Params:
        """One matrix a weight layer; `place` sets dtype, namespace and device (default NumPy float32)."""
        return {name: place(layer.init(rng, shape)) for name, layer, shape in self._weights()}

    def blocks(self) -> dict[str, Block]:
        """Sizes of the weight layers."""
        return {name: layer.block(shape) for name, layer, shape in self._weights()}

    def forward(self, params: Params, x: Array) -> tuple[Array, Tape]:
        """Prediction (batch, *outputs) and the tape; x is copied, not kept, half precision as float32."""
        if tuple(x.shape[1:]) != self.inputs:
            raise ValueError(f"x has shape {tuple(x.shape)}; need (batch, *{self.inputs})")
        xp = aac.array_namespace(x)
        if not xp.isdtype(x.dtype, "real floating"):
            raise TypeError(f"x has dtype {x.dtype}; need a real floating dtype, that of the parameters: cast it first")
        x = xp.astype(x, xp.result_type(x.dtype, xp.float32), copy=False)
        if x.ndim == 2:
            rows = with_ones(x.shape[0], x.shape[1], x)
            rows[:, : x.shape[1]] = x
            x = rows
        else:
            x = xp.asarray(x, copy=True)
        saved: dict[str, Any] = {}
        y = self._forward(params, self.layers, x, saved, "")
        return features(y), Tape(saved, tuple(features(y).shape))

    def backward(self, params: Params, tape: Tape, gf: Array) -> dict[str, Array]:
        """Output gradients of every weight layer for gf (batch, *outputs) or (draws, batch, *outputs).

        Positions of a convolution are joined: (batch, positions, C). Draws stay first. No weight gradient is formed.
        """
        xp = aac.array_namespace(gf)
        folded = gf.ndim == len(tape.outputs) + 1
        gy = xp.asarray(gf, copy=True)
        gy = xp.reshape(gy, (-1, *gf.shape[2:])) if folded else gy
        grads: dict[str, Array] = {}
        self._backward(params, self.layers, gy, tape.saved, grads, "")
        return {name: self._laid_out(g, tape, folded) for name, g in grads.items()}

    def gradients(
        self, tape: Tape, g: dict[str, Array], n: float, factored: bool = True
    ) -> dict[str, Array | Factored]:
        """Mean gradients g^T a / n of the weight layers, from output gradients without draws."""
        layers = {name: layer for name, layer, _ in self._weights()}
        return {name: layers[name].gradient(tape.saved[name], gy, n, factored) for name, gy in g.items()}

    def records(self, tape: Tape, g: dict[str, Array], n: float, ids: Array | None = None) -> dict[str, Record]:
        """One record a weight layer."""
        layers = {name: layer for name, layer, _ in self._weights()}
        return {name: Record(layers[name].activations(tape.saved[name]), gy, n, ids=ids) for name, gy in g.items()}

    def _laid_out(self, g: Array, tape: Tape, folded: bool) -> Array:
        xp = aac.array_namespace(g)
        g = xp.reshape(g, (g.shape[0], -1, g.shape[-1])) if g.ndim > 2 else g
        return xp.reshape(g, (-1, tape.outputs[0], *g.shape[1:])) if folded else g

    def _forward(self, params: Params, layers: tuple, x: Array, saved: dict, path: str) -> Array:
        owned = False
        for name, layer in _named(layers, path):
            if isinstance(layer, Residual):
                y = self._forward(params, layer.layers, x, saved, name + ".")
                out = features(y) + features(x)
                if y.ndim == 2:
                    x = with_ones(y.shape[0], out.shape[1], y)
                    x[:, : out.shape[1]] = out
                else:
                    x = out
            elif isinstance(layer, Activation):
                x, saved[name] = layer.forward(None, x, owned)
            else:
                x, saved[name] = layer.forward(params.get(name), x)
            owned = not isinstance(layer, Activation)
        return x

    def _backward(self, params: Params, layers: tuple, gy: Array, saved: dict, grads: dict, path: str) -> Array:
        xp = aac.array_namespace(gy)
        first, _ = next(_named(self.layers, ""))
        for name, layer in reversed(list(_named(layers, path))):
            if isinstance(layer, Residual):
                inner = self._backward(params, layer.layers, xp.asarray(gy, copy=True), saved, grads, name + ".")
                gy = gy + inner
                continue
            if hasattr(layer, "block"):
                grads[name] = gy
                if name == first:  # nothing before it asks for more
                    break
            gy = layer.backward(params.get(name), saved[name], gy)
        return gy

    def _weights(self) -> Iterator[tuple[str, Any, tuple[int, ...]]]:
        return (
            (name, layer, shape)
            for name, layer, shape in self._walk(self.layers, self.inputs, "")
            if hasattr(layer, "block")
        )

    def _walk(self, layers: tuple, shape: tuple[int, ...], path: str) -> Iterator[tuple[str, Any, tuple[int, ...]]]:
        """(name, layer, input shape) of every layer, inner ones of a Residual included."""
        for name, layer in _named(layers, path):
            if isinstance(layer, Residual):
                yield from self._walk(layer.layers, shape, name + ".")
            else:
                yield name, layer, shape
            shape = layer.shape(shape)


def _named(layers: tuple, path: str) -> Iterator[tuple[str, Any]]:
    for i, layer in enumerate(layers):
        yield f"{path}{type(layer).__name__.lower()}{i}", layer
