"""Factors for the directions of a step: one for all of them from sums over layers, or one a layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Protocol

from kfaccore.precondition.comm import Communicator
from kfaccore.record import Factored, Record
from kfaccore.step.height import Heights
from kfaccore.step.known import Known
from kfaccore.xp.arrays import Array, largest, namespace, scalar
from kfaccore.xp.numbers import Number
from kfaccore.xp.ranges import POSITIVE, ranged

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
        heights: Heights,
        comm: Communicator,
    ) -> tuple[dict[str, Number], Number, Heights]:
        """`scale` for all directions, and more to tell; and the unit of losses and the heights, given those before.
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
    """wanted / |d|; 0 where d is zero, or either is not finite."""
    xp = namespace(d)
    top = _top([d])
    some = (top > 0) & (top < float("inf"))
    one = xp.ones_like(top)
    size = xp.sqrt(xp.sum(_over(d, top) ** 2))
    factor = scalar(wanted, d) / xp.where(some, top, one) / xp.where(some, size, one)
    return xp.where(some & (abs(factor) < float("inf")), factor, xp.zeros_like(one))


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

    def __post_init__(self) -> None:
        ranged(self, kappa=POSITIVE)

    def __call__(self, directions: Directions, grads: Gradients, lr: float) -> Array:
        pairs = [(d, _beside(grads[name], d)) for name, d in directions.items()]
        tops = _top(d for d, _ in pairs), _top(g for _, g in pairs)
        total = _sum(namespace(d).sum(_over(d, tops[0]) * _over(g, tops[1])) for d, g in pairs)
        return _bounded(self.kappa**0.5, lr, abs(total) ** 0.5, *(top**0.5 for top in tops))


@dataclass(frozen=True)
class NormConstraint:
    """min(1, limit / (lr |directions|)) with the Euclidean norm over all layers."""

    limit: float = 1.0

    def __post_init__(self) -> None:
        ranged(self, limit=POSITIVE)

    def __call__(self, directions: Directions, grads: Gradients, lr: float) -> Array:
        top = _top(directions.values())
        total = _sum(namespace(d).sum(_over(d, top) ** 2) for d in directions.values())
        return _bounded(self.limit, lr, total**0.5, top)


def _bounded(allowed: float, lr: float, *sizes: Array) -> Array:
    """min(1, allowed / (lr * the product of sizes)), 1 where one is 0 and 0 where one is not finite: never a step whose
    size is not known. Divided one by one, as the product may overflow."""
    xp = namespace(*sizes)
    room = xp.full_like(sizes[0], allowed)
    none = xp.zeros_like(room)
    for size in (*sizes, none + lr):
        room = xp.where(size == 0, none + float("inf"), room / xp.where(size == 0, none + 1.0, size))
    return xp.where(room >= 0, xp.minimum(room, none + 1.0), none)


def _top(arrays: Iterable[Array]) -> Array:
    """The largest absolute entry of all, 0-d; NaN where there is one."""
    tops = [largest(namespace(x).reshape(x, (-1,))) for x in arrays]
    return reduce(namespace(*tops).maximum, tops)


def _over(x: Array, top: Array) -> Array:
    """x / top, so that no square overflows or is lost; as it is where top is 0."""
    xp = namespace(x)
    return x / xp.where(top > 0, top, xp.ones_like(top))


def _sum(terms: Iterable[Array]) -> Array:
    return reduce(add, terms)


def _beside(grad: Array | Factored, d: Array) -> Array:
    """The gradient, shaped like its direction; 0 where that is: of a gradient that is not finite it is zero."""
    v = grad.dense() if isinstance(grad, Factored) else grad
    xp = namespace(d)
    return xp.where(d == 0, xp.zeros_like(d), xp.reshape(v, d.shape))
