"""One inverse-free move of a factor K, and the choices it takes: coupling of the sides, step limit, storage.

m <- momentum m + w [c H + e Pi(K^T K) - I],  K <- K (I - rate m),  H = Pi(K^T A K).
Source: Lin et al. 2024 (2312.05705).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kfaccore import tree
from kfaccore import xp as kernels
from kfaccore.methods.singd import structured
from kfaccore.methods.singd.limits import Limit, by_entries, by_norm, by_radius, unlimited
from kfaccore.methods.singd.structured import Parts, Structure
from kfaccore.options import instance
from kfaccore.xp.arrays import Array, namespace, scalar
from kfaccore.xp.ranges import POSITIVE, SHARE, UNIT, ranged

__all__ = [
    "Limit",
    "Rule",
    "Storage",
    "bfloat16",
    "by_entries",
    "by_norm",
    "by_radius",
    "coupled",
    "full",
    "independent",
    "master",
    "rooted",
    "unlimited",
]


def coupled(trace: Array, square: Array, damping: float | Array) -> tuple[Array, Array]:
    """INGD: (c, e) of one side from tr(H) / d and |K|_F^2 / d of the other and the damping."""
    return trace, square * scalar(damping, square)


def independent(trace: Array, square: Array, damping: float | Array) -> tuple[Array, Array]:
    """IKFAC as published: c = 1 and e = damping, on each side."""
    one = namespace(trace).ones_like(trace)
    return one, one * scalar(damping, one)


def rooted(trace: Array, square: Array, damping: float | Array) -> tuple[Array, Array]:
    """IKFAC whose sides get sqrt(damping) each, so that both together give `damping`: K-FAC's split=equal."""
    c, e = independent(trace, square, damping)
    return c, namespace(e).sqrt(e)


@dataclass(frozen=True)
class Storage:
    """How arrays are rounded: K and products with it, momenta, and the rows that K multiplies."""

    main: Callable[[Array], Array]
    momentum: Callable[[Array], Array]
    rows: Callable[[Array], Array]


def _same(x: Array) -> Array:
    return x


full = Storage(_same, _same, _same)
bfloat16 = Storage(kernels.to_bfloat16, kernels.to_bfloat16, kernels.to_bfloat16)
master = Storage(_same, kernels.to_bfloat16, _same)


def inner(side: Structure, storage: Storage, K: Parts, x: Array) -> Parts:
    """Pi(K^T x^T x K) in the dtype of x, for rows x (blocks, rows, d)."""
    return wide(side.gram(_times(side, storage, K, x)), x)


def both(side: Structure, storage: Storage, K: Parts, x: Array) -> Array:
    """x K K^T in the dtype of x."""
    once = _times(side, storage, K, x)
    return namespace(x).astype(side.times_transposed(once, K), x.dtype)


def _times(side: Structure, storage: Storage, K: Parts, x: Array) -> Array:
    """x K, rounded as rows are before and after."""
    return storage.rows(side.times(like(storage.rows(x), K), K))


def like(x: Array, K: Parts) -> Array:
    """`x` in the dtype of K."""
    return namespace(x).astype(x, any_part(K).dtype)


def any_part(K: Parts) -> Array:
    """One of its arrays: they share a dtype."""
    return next(iter(K.values()))


@dataclass(frozen=True)
class Rule:
    """The numbers and choices of a move.

    momentum   of m; at 0 no m is kept
    rate       of the step along m: about 1 - decay of K-FAC's averages
    warm       the rate of move i is warm / (i + 1) while that is more: K starts far from where it belongs
    limit      by_radius: rate / max(1, |m^4|_F^(1/4)), so that I - rate m keeps its definiteness for rate < 1 |
               by_norm: |m|_F instead, sqrt(d) stricter | by_entries: largest |entry|, no such promise |
               unlimited, as first published: ramp the rate up
    storage    full | bfloat16 | master (K and C in the working dtype, bfloat16 momenta)
    """

    momentum: float = 0.5
    rate: float = 0.2
    warm: float = 0.9
    limit: Limit = by_radius
    storage: Storage = full

    def __post_init__(self) -> None:
        instance(self, "limit", Limit, "by_radius, by_norm, by_entries or unlimited")
        instance(self, "storage", Storage, "full, bfloat16 or master")
        ranged(self, momentum=SHARE, rate=POSITIVE, warm=UNIT)

    def moved(
        self,
        side: Structure,
        K: Parts,
        m: Parts,
        H: Parts,
        scales: tuple[Array, Array],
        moves: Array,
    ) -> tuple[Parts, Parts]:
        """(K, m) after one move; an empty m (no momentum) stays empty. H in the working dtype."""
        c, e = scales
        working = any_part(H)
        eye = side.eye(c.shape[0], side.size(K), working)
        bracket = structured.combine(c, H, e, wide(side.inner(K), working))
        bracket = structured.combine(1.0, bracket, -1.0, eye)
        w = self.limit.weight(self.momentum)
        if m:
            direction = structured.combine(self.momentum, wide(m, working), w, bracket)
        else:
            direction = structured.scaled(w, bracket)
        direction = tree.map(self.storage.momentum, direction)
        rate = self.now(moves) * self.limit.shrink(side, wide(direction, working))
        step = tree.map(self.storage.main, side.product(K, wide(direction, any_part(K))))
        moved = structured.combine(1.0, wide(K, working), -rate, wide(step, working))
        return wide(tree.map(self.storage.main, moved), any_part(K)), direction if m else m

    def now(self, moves: Array) -> Array:
        """The rate after so many moves (blocks,): warm / (moves + 1) as long as that is more than `rate`."""
        xp = namespace(moves)
        return xp.maximum(self.rate + xp.zeros_like(moves), self.warm / (moves + 1))


def wide(K: Parts, to: Array) -> Parts:
    """K in the dtype of `to`."""
    return tree.map(lambda x: namespace(x).astype(x, to.dtype), K)
