"""Curvature from a network function alone, by complex steps in float64; uses neither Record nor fisher code.

A `Chain` is a tiny net of dense layers over (batch, shared, d) whose shared axis may be reduced after one layer. Its
forward is the function; its backward is what a framework would give kfaccore.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

STEP = 1e-30

ACTIVATIONS: dict[str, tuple[Callable, Callable]] = {
    "linear": (lambda z: z, lambda z: np.ones_like(z)),
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
    "sigmoid": (lambda z: 1 / (1 + np.exp(-z)), lambda z: np.exp(-z) / (1 + np.exp(-z)) ** 2),
    "relu": (lambda z: z * (z.real > 0), lambda z: (z > 0) * 1.0),
}


@dataclass(frozen=True)
class Chain:
    """sizes of the layers, one activation for all, and (layer, "sum" | "mean") after which shared is reduced."""

    sizes: tuple[int, ...]
    activation: str = "linear"
    reduced: tuple[int, str] | None = None
    bias: bool = False

    def init(self, rng: np.random.Generator) -> list[np.ndarray]:
        return [rng.normal(size=(o, i + self.bias)) for i, o in zip(self.sizes, self.sizes[1:], strict=False)]

    def run(self, weights: list[np.ndarray], x: np.ndarray) -> tuple[np.ndarray, list, list]:
        """Prediction, layer inputs (bias column included), pre-activations."""
        inputs, outputs = [], []
        for layer, W in enumerate(weights):
            inputs.append(np.concatenate([x, np.ones_like(x[..., :1])], -1) if self.bias else x)
            outputs.append(inputs[-1] @ W.T)
            x = ACTIVATIONS[self.activation][0](outputs[-1])
            if self.reduced and self.reduced[0] == layer:
                x = getattr(x, self.reduced[1])(1, keepdims=True)
        return x, inputs, outputs

    def backward(self, weights: list[np.ndarray], x: np.ndarray, gf: np.ndarray) -> list[np.ndarray]:
        """Gradients of every pre-activation for draws gf (draws, batch, shared, outputs)."""
        _, _, outputs = self.run(weights, x)
        found = []
        for layer in reversed(range(len(weights))):
            shape = outputs[layer].shape
            if self.reduced and self.reduced[0] == layer:
                share = 1 / shape[1] if self.reduced[1] == "mean" else 1.0
                gf = np.broadcast_to(gf * share, (len(gf), *shape))
            gf = gf * ACTIVATIONS[self.activation][1](outputs[layer])
            found.append(gf)
            gf = gf @ weights[layer][:, : weights[layer].shape[1] - self.bias]
        return found[::-1]


def jacobian(function: Callable[[np.ndarray], np.ndarray], W: np.ndarray) -> np.ndarray:
    """d f / d vec(W) with row-major vec, (*f.shape, W.size), by complex steps."""
    columns = []
    for i in range(W.size):
        bumped = W.astype(complex)
        bumped.flat[i] += 1j * STEP
        columns.append(function(bumped).imag / STEP)
    return np.stack(columns, -1)


def block(net: Chain, weights: list, x: np.ndarray, layer: int, curvature: np.ndarray, R: float) -> np.ndarray:
    """R sum_n J_n^T H_n J_n of one layer; curvature (batch, F, F) for the flattened prediction of each example."""

    def f(W: np.ndarray) -> np.ndarray:
        return net.run([*weights[:layer], W, *weights[layer + 1 :]], x)[0]

    J = jacobian(f, weights[layer]).reshape(len(x), -1, weights[layer].size)
    return R * np.einsum("nfd,nfg,nge->de", J, curvature, J)


def softmax(f: np.ndarray) -> np.ndarray:
    e = np.exp(f - f.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def hessians(loss: str, f: np.ndarray) -> np.ndarray:
    """Hessian of each example's loss in its flattened prediction, (batch, F, F); classes last, a block a position."""
    batch, F = len(f), f[0].size
    if loss == "mse":
        return np.broadcast_to(np.eye(F), (batch, F, F))
    found = np.zeros((batch, F, F))
    C = f.shape[-1]
    for n, p in enumerate(softmax(f).reshape(batch, -1, C)):
        for t, q in enumerate(p):
            found[n, t * C : (t + 1) * C, t * C : (t + 1) * C] = np.diag(q) - np.outer(q, q)
    return found


def column_major(matrix: np.ndarray, d_out: int, d_in: int) -> np.ndarray:
    """A block in row-major vec reordered to column-major vec."""
    order = np.arange(d_out * d_in).reshape(d_out, d_in).T.ravel()
    return matrix[np.ix_(order, order)]


def rearranged(F: np.ndarray, d_out: int, d_in: int) -> np.ndarray:
    """Z (d_out^2, d_in^2): Z of G (x) A is vec(G) vec(A)^T."""
    return F.reshape(d_out, d_in, d_out, d_in).swapaxes(1, 2).reshape(d_out**2, d_in**2)


def matrix(method: Any, state: Any, hyper: Any, shape: tuple[int, int, int]) -> np.ndarray:
    """A method's own F~ (blocks, D, D), column by column; `shape` is (blocks, d_out, d_in)."""
    blocks, d_out, d_in = shape
    columns = [np.broadcast_to(e.reshape(d_out, d_in), shape) for e in np.eye(d_out * d_in)]
    return np.stack([np.asarray(method.matvec(state, c, hyper)).reshape(blocks, -1) for c in columns], axis=2)
