"""One factor for all directions of a step, from inner products summed over layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Protocol

from kfaccore.record import Factored
from kfaccore.xp.arrays import Array, namespace

Directions = Mapping[str, Array]
Gradients = Mapping[str, Array | Factored]


class Rescale(Protocol):
    """A rule that shortens directions."""

    def __call__(self, directions: Directions, grads: Gradients, lr: float) -> Array | float:
        """The factor, 0-d, that multiplies every direction."""
        ...


@dataclass(frozen=True)
class Unchanged:
    """Factor 1."""

    def __call__(self, directions: Directions, grads: Gradients, lr: float) -> float:
        return 1.0


@dataclass(frozen=True)
class KLClip:
    """min(1, sqrt(kappa / (lr^2 sum <direction, gradient>))): bounds the quadratic model of the KL divergence.

    Forms the gradient of `Factored` layers (one product). Source: Ba et al. 2017; Osawa et al. 2019 (1811.12019).
    """

    kappa: float = 1e-3

    def __call__(self, directions: Directions, grads: Gradients, lr: float) -> Array:
        total = _sum(namespace(d).sum(d * _dense(grads[name], d)) for name, d in directions.items())
        return _shrink(self.kappa, lr * lr * abs(total), directions)


@dataclass(frozen=True)
class NormConstraint:
    """min(1, limit / (lr |directions|)) with the Euclidean norm over all layers."""

    limit: float = 1.0

    def __call__(self, directions: Directions, grads: Gradients, lr: float) -> Array:
        total = _sum(namespace(d).sum(d * d) for d in directions.values())
        return _shrink(self.limit * self.limit, lr * lr * total, directions)


def _shrink(allowed: float, size: Array, directions: Directions) -> Array:
    """sqrt(min(1, allowed / size)), 1 where size is 0."""
    xp = namespace(*directions.values())
    one = xp.ones_like(size)
    return xp.sqrt(xp.where(size > allowed, allowed / xp.where(size > 0, size, one), one))


def _sum(terms: Iterable[Array]) -> Array:
    return reduce(add, terms)


def _dense(grad: Array | Factored, like: Array) -> Array:
    v = grad.dense() if isinstance(grad, Factored) else grad
    return namespace(like).reshape(v, like.shape)
