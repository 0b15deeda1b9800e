"""Factors for the directions of a step: one for all of them from sums over layers, or one a layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Protocol

from kfaccore.precondition.comm import Communicator
from kfaccore.record import Factored, Record
from kfaccore.step.known import Known
from kfaccore.xp.arrays import Array, namespace, scalar
from kfaccore.xp.numbers import Number

Directions = Mapping[str, Array]
Gradients = Mapping[str, Array | Factored]


class Rescale(Protocol):
    """A rule that sets the length of directions."""

    def __call__(self, directions: Directions, grads: Gradients, lr: float) -> Array | float:
        """The factor, 0-d, that multiplies every direction."""
        ...


class ByLayer(Protocol):
    """A rescale that has a factor a layer."""

    def by_layer(self, directions: Directions, known: Known) -> dict[str, Array]:
        """{layer: factor}, 0-d each."""
        ...

    def check(self, names: Iterable[str], lengths: Mapping[str, Number] | None) -> None:
        """ValueError where the lengths that a step is told are not those of its layers."""
        ...


class Modelled(Protocol):
    """A rescale that models the loss, and so needs records at every step."""

    def modelled(
        self,
        directions: Directions,
        grads: Gradients,
        records: Mapping[str, Record],
        known: Known,
        first: Number,
        comm: Communicator,
    ) -> dict[str, Number]:
        """`scale` for all directions, and more to tell; `first` is the loss before the first step, 0 if not known.
        Records and own gradients are those of this rank of `comm`, all else is of the whole batch."""
        ...


@dataclass(frozen=True)
class Graft:
    """The direction of the method, in each layer as long as another rule's update: lengths= of a step.

    factor = length / |direction|, 0 where there is no direction. Source: Agarwal et al. 2020 (2002.11803), as Shampoo
    and SOAP users know it.
    """

    def __call__(self, directions: Directions, grads: Gradients, lr: float) -> float:
        return 1.0  # see by_layer

    def by_layer(self, directions: Directions, known: Known) -> dict[str, Array]:
        """length / |direction| of each layer."""
        self.check(directions, known.lengths)
        return {name: _length(d, (known.lengths or {})[name]) for name, d in directions.items()}

    def check(self, names: Iterable[str], lengths: Mapping[str, Number] | None) -> None:
        """ValueError without a length of every layer, or for one that is none."""
        given = lengths or {}
        wrong = {name: x for name, x in given.items() if isinstance(x, int | float) and not 0 <= x < float("inf")}
        if wrong:
            raise ValueError(f"Graft got lengths {wrong}; need norms, numbers of at least 0")
        missing = sorted(set(names) - set(given))
        if missing:
            raise ValueError(
                f"Graft got no lengths for layers {missing}: pass pre.step(..., lengths={{layer: norm}}), the norms of "
                f"the updates that the other rule would take"
            )


def _length(d: Array, wanted: Number) -> Array:
    """wanted / |d|, 0 where d is."""
    xp = namespace(d)
    size = xp.sqrt(xp.sum(d * d))
    some = size > 0
    return xp.where(some, scalar(wanted, d) / xp.where(some, size, xp.ones_like(size)), xp.zeros_like(size))


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
