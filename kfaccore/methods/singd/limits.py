"""How long one move of a root may be.

Source: Lin et al. 2024 (2312.05705).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from kfaccore.methods.singd import structured
from kfaccore.methods.singd.structured import Parts, Structure
from kfaccore.xp.arrays import Array, namespace


class Limit(Protocol):
    """How long a step along m may be."""

    def weight(self, momentum: float) -> float:
        """w, of the bracket in m."""
        ...

    def shrink(self, side: Structure, m: Parts) -> Array:
        """What the rate is multiplied by, (blocks,)."""
        ...


@dataclass(frozen=True)
class AtMost:
    """rate / max(1, size of m) and w = (1 - momentum) / 2."""

    size: Callable[[Structure, Parts], Array]

    def weight(self, momentum: float) -> float:
        return (1 - momentum) / 2

    def shrink(self, side: Structure, m: Parts) -> Array:
        size = self.size(side, m)
        one = namespace(size).ones_like(size)
        return one / namespace(size).maximum(size, one)


@dataclass(frozen=True)
class Unlimited:
    """The rate as it is, and w = 1/2."""

    def weight(self, momentum: float) -> float:
        return 0.5

    def shrink(self, side: Structure, m: Parts) -> Array:
        trace = side.trace(m)  # for its shape and dtype
        return namespace(trace).ones_like(trace)


def _norm(side: Structure, m: Parts) -> Array:
    unit, size = _scaled(m)
    return size * side.square(unit) ** 0.5


def _entry(side: Structure, m: Parts) -> Array:
    return structured.largest(m)


def _radius(side: Structure, m: Parts) -> Array:
    """|m^4|_F^(1/4), at least the spectral radius and at most d^(1/8) of it for a symmetric m."""
    unit, size = _scaled(m)
    square = side.product(unit, unit)
    fourth = side.product(square, square)
    return size * side.square(fourth) ** 0.125  # |m^4|_F^2 to the power 1/8


def _scaled(m: Parts) -> tuple[Parts, Array]:
    """m over its largest entry, whose eighth power is no number of float32 from 1e5 on, and that entry (blocks,)."""
    size = structured.largest(m)
    xp = namespace(size)
    size = xp.where((size > 0) & xp.isfinite(size), size, xp.ones_like(size))
    return structured.scaled(1 / size, m), size


by_radius = AtMost(_radius)
by_norm = AtMost(_norm)
by_entries = AtMost(_entry)
unlimited = Unlimited()
