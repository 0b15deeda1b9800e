"""First-order optimisers to compare with; they update parameters in place, without temporaries on NumPy.

l2 adds l2 W to the gradient (the shell does); weight_decay is decoupled, W <- (1 - lr weight_decay) W.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import array_api_compat as aac

Array = Any


@dataclass(frozen=True)
class SGD:
    """v <- momentum v + grad, W <- W - lr v. Gradients are overwritten."""

    lr: float
    momentum: float = 0.9
    l2: float = 0.0
    weight_decay: float = 0.0

    def init(self, params: dict[str, Array]) -> dict[str, Array]:
        return {name: aac.array_namespace(W).zeros_like(W) for name, W in params.items()}

    def step(self, params: dict[str, Array], grads: dict[str, Array], state: dict[str, Array], step: int) -> None:
        """In place: v <- momentum v + gradient, W <- (1 - lr weight_decay) W - lr v."""
        for name, W in params.items():
            g = grads[name]
            if self.weight_decay:
                W *= 1 - self.lr * self.weight_decay
            if self.momentum:
                v = state[name]
                v *= self.momentum
                v += g
                g[...] = v
            g *= self.lr
            W -= g


@dataclass(frozen=True)
class Adam:
    """Bias-corrected first and second moments (Kingma & Ba 2015). Gradients are overwritten."""

    lr: float
    decays: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    l2: float = 0.0
    weight_decay: float = 0.0

    def init(self, params: dict[str, Array]) -> dict[str, tuple[Array, Array]]:
        return {
            name: (aac.array_namespace(W).zeros_like(W), aac.array_namespace(W).zeros_like(W))
            for name, W in params.items()
        }

    def step(self, params: dict[str, Array], grads: dict[str, Array], state: dict[str, Any], step: int) -> None:
        """In place: Adam's step with corrected moments, weight decay decoupled."""
        first, second = self.decays
        rate = self.lr * (1 - second ** (step + 1)) ** 0.5 / (1 - first ** (step + 1))
        eps = self.eps * (1 - second ** (step + 1)) ** 0.5
        for name, W in params.items():
            m, v = state[name]
            g = grads[name]
            if self.weight_decay:
                W *= 1 - self.lr * self.weight_decay
            m *= first
            m += (1 - first) * g
            g *= g
            g *= 1 - second
            v *= second
            v += g
            g[...] = v**0.5
            g += eps
            W -= rate * m / g
