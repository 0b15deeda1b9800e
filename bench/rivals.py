"""Optimisers to compare with that kfaccore does not ship."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

import kfaccore_numpy as kn


@dataclass(frozen=True)
class Muon:
    """Nesterov momentum orthogonalised by five Newton-Schulz steps, times sqrt(max(1, d_out/d_in)); biases by Adam.

    Source: Jordan et al. 2024 (the quintic's coefficients and the scale are the published ones).
    """

    lr: float
    momentum: float = 0.95
    bias: Any = field(default=kn.Adam(3e-3))
    l2: float = 0.0

    def init(self, params: dict[str, np.ndarray]) -> dict[str, Any]:
        biases = {name: W[:, -1:].copy() for name, W in params.items()}
        return {"v": {name: np.zeros_like(W[:, :-1]) for name, W in params.items()}, "adam": self.bias.init(biases)}

    def step(self, params: dict[str, np.ndarray], grads: dict[str, np.ndarray], state: dict, step: int) -> None:
        columns = {name: W[:, -1:] for name, W in params.items()}
        self.bias.step(columns, {name: g[:, -1:].copy() for name, g in grads.items()}, state["adam"], step)
        for name, W in params.items():
            g, v = grads[name][:, :-1], state["v"][name]
            v *= self.momentum
            v += (1 - self.momentum) * g
            ahead = (1 - self.momentum) * g + self.momentum * v
            W[:, :-1] -= self.lr * max(1.0, W.shape[0] / (W.shape[1] - 1)) ** 0.5 * orthogonalised(ahead)


def orthogonalised(x: np.ndarray) -> np.ndarray:
    """About U V^T of x = U S V^T."""
    flip = x.shape[0] > x.shape[1]
    x = x.T if flip else x
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(5):
        y = x @ x.T
        x = 3.4445 * x + (-4.7750 * y + 2.0315 * (y @ y)) @ x
    return x.T if flip else x
