"""A symmetric factor as U diag(D) U^T + outside (I - U U^T), or its diagonal (blocks, d).

U (blocks, d, k) has orthonormal columns. Products and damped inverses cost k d a row and no (d, d) is formed:
(M + shift I)^-1 is of this form too, with 1 / (D + shift) and 1 / (outside + shift). A side with k = d has no outside;
with k < d columns of eigenvalue 0 are zero: rounding picked their directions, which are some of the others.
Source: Puiu 2022 (2206.15397), and its later code for the continued spectrum and the adaptive rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from kfaccore.linalg import equal, kron, side
from kfaccore.record import Factored
from kfaccore.xp.arrays import Array, device_of, eps, namespace, place, select
from kfaccore.xp.ranges import AT_LEAST_0, SOME, ranged


@dataclass(frozen=True)
class LowRank(side.Unformed):
    """Modes U (blocks, d, k), ascending D (blocks, k), the eigenvalue `outside` of all other directions (blocks,), the
    trace of the factor itself (blocks,), and how many modes count, `rank` (blocks,); for the others D is `outside`."""

    U: Array
    D: Array
    outside: Array
    trace: Array
    rank: Array

    @property
    def products(self) -> int:
        return 2 * self.U.shape[1] * self.U.shape[2]

    def times(self, rows: Array) -> Array:
        xp = namespace(rows)
        inner = xp.matmul(rows, self.U)
        if full(self):
            return xp.matmul(inner * self.D[:, None, :], self.U.mT)
        inner = inner * (self.D - self.outside[:, None])[:, None, :]
        return rows * self.outside[:, None, None] + xp.matmul(inner, self.U.mT)


Factor = LowRank | Array  # an array is the diagonal (blocks, d) of the factor
Outside = Callable[[LowRank], Array]
RANKS = "kf.Rank(cap, start, ...), kf.adaptive or kf.adaptive_brand"


@dataclass(frozen=True)
class Rank:
    """How many modes: at most `cap` (static: the cost), `start` at first.

    With up or down > 0, after each decomposition the count grows by `up` where lowest counted / largest eigenvalue is
    over `above`, and shrinks by `down` where it is under `below`, staying between `floor` and `cap`.
    """

    cap: int = 220
    start: int = 220
    floor: int = 10
    up: int = 0
    down: int = 0
    above: float = 0.053
    below: float = 0.026

    def __post_init__(self) -> None:
        ranged(self, cap=SOME, start=SOME, floor=SOME, up=SOME, down=SOME, above=AT_LEAST_0, below=AT_LEAST_0)

    def first(self, blocks: int, d: int, like: Array) -> Array:
        """The count at the start, int32 (blocks,)."""
        xp = namespace(like)
        return xp.full((blocks,), min(self.start, self.cap, d), dtype=xp.int32, device=device_of(like))

    def cuts(self, k: int) -> bool:
        """Whether of k modes some may not count."""
        return self.start < k or bool(self.down)

    def next(self, low: LowRank) -> Array:
        """The count for the next decomposition."""
        xp = namespace(low.D)
        d, k = low.U.shape[-2:]
        if k == 0 or not (self.up or self.down):
            return low.rank
        position = xp.arange(k, dtype=xp.int32, device=device_of(low.D))[None, :]
        lowest = xp.sum(xp.where(position == k - low.rank[:, None], low.D, xp.zeros_like(low.D)), axis=-1)
        top = low.D[:, -1]
        moved = xp.where(lowest > self.above * top, low.rank + self.up, low.rank)
        moved = xp.where(lowest < self.below * top, low.rank - self.down, moved)
        highest = xp.zeros_like(moved) + min(self.cap, d)
        return xp.maximum(xp.minimum(moved, highest), xp.minimum(highest, xp.zeros_like(moved) + self.floor))


fixed = Rank()
adaptive = Rank(cap=700, up=10, down=10)
adaptive_brand = Rank(cap=500, floor=70, up=10, down=5, above=0.048, below=0.013)


def nothing(low: LowRank) -> Array:
    """The other directions have eigenvalue 0."""
    return namespace(low.trace).zeros_like(low.trace)


def lowest(low: LowRank) -> Array:
    """The spectrum is continued: the other directions get the lowest eigenvalue that counts."""
    xp = namespace(low.D)
    if low.D.shape[-1] == 0:
        return nothing(low)
    return xp.min(xp.where(counted(low), low.D, low.D[:, -1:]), axis=-1)


def even(low: LowRank) -> Array:
    """The other directions share what the modes leave of the trace."""
    xp = namespace(low.D)
    left = low.trace - xp.sum(low.D, axis=-1)
    many = low.U.shape[1] - xp.sum(xp.astype(low.D > 0, low.D.dtype), axis=-1)
    return xp.where((left > 0) & (many > 0), left, xp.zeros_like(left)) / xp.where(many > 0, many, xp.ones_like(many))


def counted(low: LowRank) -> Array:
    """Which modes count, (blocks, k): the `rank` largest."""
    xp = namespace(low.D)
    k = low.D.shape[-1]
    return xp.arange(k, dtype=xp.int32, device=device_of(low.D))[None, :] >= k - low.rank[:, None]


def start(blocks: int, d: int, k: int, rank: Rank, like: Array) -> LowRank:
    """The last min(k, d) columns of the identity, all eigenvalues zero."""
    xp = namespace(like)
    k = min(k, d)
    where = place(like)
    U = xp.zeros((blocks, d, k), **where) + xp.eye(d, k, k=k - d, **where)
    D = xp.zeros((blocks, k), **where)
    outside = xp.zeros((blocks,), **where)
    return LowRank(U, D, outside, xp.zeros_like(outside), rank.first(blocks, d, like))


def with_modes(low: LowRank, U: Array, D: Array, trace: Array, outside: Outside) -> LowRank:
    """`low` with new modes U, ascending D, and its outside by `outside`; D is zero where it is negative, does not count
    or, with an outside to be in, is zero up to rounding: there U is zero as well."""
    xp = namespace(D)
    D = xp.where((D > 0) & counted(low), D, xp.zeros_like(D))
    if 0 < D.shape[-1] < U.shape[1]:
        D = xp.where(equal.null(D, D[:, -1:]), xp.zeros_like(D), D)
        U = U * xp.astype(D > 0, U.dtype)[:, None, :]
    new = replace(low, U=U, D=D, trace=trace)
    new = replace(new, outside=outside(new))
    # modes that do not count, zero so far, join the outside
    return replace(new, D=xp.maximum(new.D, xp.where(counted(new), new.D, new.outside[:, None])))


def scaled(x: Factor, by: Array) -> Factor:
    """x times numbers (blocks,)."""
    if not isinstance(x, LowRank):
        return x * by[:, None]
    return replace(x, D=x.D * by[:, None], outside=x.outside * by, trace=x.trace * by)


def scale(x: Factor) -> side.Scale:
    """Mean eigenvalue of the factor itself and the largest of its modes."""
    if not isinstance(x, LowRank):
        return side.Scale.of_factor(x)
    xp = namespace(x.D)
    return side.Scale(x.trace / x.U.shape[1], lambda: xp.max(xp.concat([x.D, x.outside[:, None]], axis=-1), axis=-1))


def size(x: Factor) -> int:
    """d."""
    return x.U.shape[1] if isinstance(x, LowRank) else x.shape[-1]


def full(x: LowRank) -> bool:
    """Whether the modes span everything."""
    return x.U.shape[1] == x.U.shape[2]


def times(rows: Array, x: Factor) -> Array:
    """rows (blocks, m, d) times the factor."""
    return x.times(rows) if isinstance(x, LowRank) else rows * x[:, None, :]


def inverse(x: Factor, shift: Array, unit: Array) -> tuple[Factor, Array]:
    """((x + shift I)^-1, whether a denominator had to be lifted); the identity for blocks where `unit`.

    Denominators stay above eps times the largest.
    """
    xp = namespace(shift)
    values = xp.concat([x.D, x.outside[:, None]], axis=-1) if isinstance(x, LowRank) else x
    values = values + shift[:, None]
    top = xp.max(values, axis=-1)
    floor = (eps(values.dtype, xp) * xp.where(top > 0, top, xp.ones_like(top)))[:, None]
    # the last value is that of all other directions, of which a full side has none
    used = values[:, :-1] if isinstance(x, LowRank) and full(x) else values
    lifted = xp.any(used < floor, axis=-1) & ~unit
    values = select(unit, xp.ones_like(values), 1 / xp.where(values < floor, floor * xp.ones_like(values), values))
    if not isinstance(x, LowRank):
        return values, lifted
    return replace(x, D=values[:, :-1], outside=values[:, -1]), lifted


def dense(x: Factor) -> Array:
    """The matrix itself, for tests and analysis."""
    if isinstance(x, LowRank):
        return times(side.identity(side.zeros(x.U.shape[0], x.U.shape[1], False, x.U)), x)
    return x


def between(G: Factor, grad: Array | Factored, A: Factor) -> Array:
    """G V A for V (blocks, d_out, d_in) or V = g^T a / n not multiplied out."""
    return kron.sandwich(lambda rows: times(rows, G), grad, lambda rows: times(rows, A))
