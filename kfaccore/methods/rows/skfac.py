"""SKFAC: K-FAC's x = (G + d_g I)^-1 V (A + d_a I)^-1 with each inverse taken by Woodbury where rows are fewer than d.

A side of fewer rows than its dimension is kept as rows: (Y^T Y / m + d I)^-1 = (I - Y^T (Y Y^T + m d I)^-1 Y) / d, a
system of m x m. The rows are a ring of the newest batches, weighted by the moving average (exact for
those that fit); `rank` rows of it may hold the best approximation of what left. V not multiplied out, whose rows are
the factor's own, is solved by push-through, without the difference.

Exact where K-FAC is, with the sharing that fits.
Source: Tang et al. 2021 (CVPR, SKFAC); the average, compression and push-through are ours.
Cost: update a copy of rows d; refresh rows^2 d + rows^3 a side; solve 2 rows d_in d_out a side, or rows^2 d on V not
multiplied out; memory rows (d + rows). A side with rows >= d costs what K-FAC's does, and so do refresh and solve of
one whose rows are more than about 0.4 d, where products with the inverse are cheaper (`explicit`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from kfaccore import xp as kernels
from kfaccore.damping import Split, equal, pi
from kfaccore.factors import unrefreshed
from kfaccore.linalg import side
from kfaccore.linalg.inverse import accepted
from kfaccore.method import Block, Hyper
from kfaccore.methods.rows import factors as stacked
from kfaccore.methods.rows import stack as stacks
from kfaccore.methods.rows import woodbury
from kfaccore.methods.rows.factors import Branch, Factor, Factors, Stats, always, cheaper_dense, fewer_rows, never
from kfaccore.methods.rows.stack import Stack
from kfaccore.methods.rows.woodbury import LowRank
from kfaccore.options import function, instance
from kfaccore.record import Factored, Record
from kfaccore.record.sharing import expand, mean_mean
from kfaccore.refreshing import InSteps
from kfaccore.solution import Solution, finish_later, gradient
from kfaccore.xp.arrays import Array, namespace
from kfaccore.xp.asking import Ask, Asks, lockstep
from kfaccore.xp.ranges import COUNT, SOME, ranged

Inverse = Array | LowRank


@dataclass(frozen=True)
class State:
    """A and G as rows or matrices; their inverses of the last refresh, LowRank or (blocks, d, d); code (blocks,)."""

    factors: Factors
    inverse_a: Inverse
    inverse_g: Inverse
    code: Array

    @property
    def weight(self) -> Array:
        return self.factors.weight


@dataclass(frozen=True)
class SKFAC(InSteps[State]):
    """K-FAC's x = (G + d_g I)^-1 V (A + d_a I)^-1, each side of fewer rows m than its width by Woodbury in m x m.

    (Y^T Y / m + d I)^-1 = (I - Y^T (Y Y^T + m d I)^-1 Y) / d for rows Y (m, d). V and x (blocks, d_out, d_in). Exact
    where K-FAC is. Tang et al. 2021, SKFAC (CVPR).

    sharing   expand | reduce | mean_mean | sum_sum | Subsample(...): convolutions have batch x positions rows under
              expand, so only the others keep them fewer than d
    split     pi | equal | per_factor | Relative(...): each factor's own damping, baked at refresh
    branch    fewer_rows | always: when a side of (rows, d) is kept as rows
    rows      capacity of a side kept as rows, where Block.rows is 0; a larger batch is compressed to it. Of the oldest
              batch only the first rows may fit, in their order: a multiple of a batch's rows cuts none
    rank      rows of the capacity that hold the compressed past; 0 drops it
    explicit  cheaper_dense | always | never: when a side of (rows, d) kept as rows is inverted as a matrix after all
    """

    sharing: Callable[[Record], Record] = expand
    split: Split = pi
    branch: Branch = fewer_rows
    rows: int = 512
    rank: int = 0
    explicit: Branch = cheaper_dense
    cycles: ClassVar[int] = 1
    linear_sides: ClassVar[bool] = True

    def __post_init__(self) -> None:
        function(self, "sharing", "expand, reduce, mean_mean, sum_sum or Subsample(...)")
        instance(self, "split", Split, "pi, equal, per_factor or Relative(...)")
        function(self, "branch", "fewer_rows or always, a function of (rows, d)")
        function(self, "explicit", "cheaper_dense, always or never, a function of (rows, d)")
        if not self.split.separable:
            raise ValueError(f"split={self.split} does not shift each factor, so Woodbury cannot use it: take pi")
        ranged(self, rows=COUNT, rank=SOME)
        if not 0 <= self.rank < self.rows:
            raise ValueError(f"rank is {self.rank} of {self.rows} rows; need 0 <= rank < rows")

    def init(self, block: Block, like: Array) -> State:
        if 0 < block.rows <= self.rank:
            raise ValueError(f"{block} leaves no row beside rank={self.rank}; need Block.rows above it")
        factors = stacked.init(block, like, self.rows, self.branch)
        code = unrefreshed(block, like)
        return State(factors, self._identity(factors.A), self._identity(factors.G), code)

    def measure(self, state: State, record: Record, hyper: Hyper) -> Stats:
        return stacked.measure(state.factors, self.sharing(record))

    def combine(self, first: Stats, second: Stats) -> Stats:
        return stacked.combine(first, second)

    def update(self, state: State, stats: Stats, hyper: Hyper, donate: bool = False) -> State:
        return replace(state, factors=stacked.update(state.factors, stats, hyper, self.rank, donate))

    def refreshing(self, state: State, hyper: Hyper) -> Asks[State]:
        A, G = stacked.debiased(state.factors)
        d_a, d_g = self.split.shifts(stacked.scale(A), stacked.scale(G), hyper.damping)
        (a, code_a), (g, code_g) = yield from lockstep([self._inverse(A, d_a), self._inverse(G, d_g)])
        worse = namespace(code_a).maximum(code_a, code_g)
        old = (state.inverse_a, state.inverse_g)
        (a, g), code = accepted((a, g), worse, old, state.code, state.weight)
        return replace(state, inverse_a=a, inverse_g=g, code=code)

    def solve(self, state: State, grad: Array | Factored, hyper: Hyper, record: Record | None = None) -> Solution:
        grad, squeeze = gradient(grad, (state.code.shape[0], _size(state.inverse_g), _size(state.inverse_a)))
        return finish_later(_apply(state.inverse_g, grad, state.inverse_a), state.code, state, squeeze)

    def matvec(self, state: State, v: Array, hyper: Hyper) -> Array:
        A, G = stacked.filled(state.factors)
        return stacked.product(G, v, A)

    def _dense(self, factor: Stack) -> bool:
        return self.explicit(factor.rows.shape[1], factor.rows.shape[2])

    def _identity(self, factor: Factor) -> Inverse:
        if not isinstance(factor, Stack):
            return side.identity(factor)
        blocks, _, d = factor.rows.shape
        if self._dense(factor):
            return side.identity(side.zeros(blocks, d, False, factor.rows))
        return woodbury.identity(factor)

    def _inverse(self, factor: Factor, shift: Array) -> Asks[tuple[Inverse, Array]]:
        if isinstance(factor, Stack) and not self._dense(factor):
            return (yield from woodbury.inverting(factor, shift))
        matrix = stacks.dense(factor) if isinstance(factor, Stack) else factor
        ((inverse, code),) = yield (Ask(side.inverse, (matrix, shift), side.grown),)
        return inverse, code


release = SKFAC(mean_mean, equal, always, explicit=never)
"""The authors' settings: means over positions, sqrt(damping) on each factor, the batch's own small system whatever its
size. They multiply the inverses out; here they stay products. Give Block.rows the batch size, so that a batch replaces
the last."""


def _size(inverse: Inverse) -> int:
    return (inverse.rows if isinstance(inverse, LowRank) else inverse).shape[-1]


def _apply(left: Inverse, grad: Array | Factored, right: Inverse) -> Array:
    """left V right; of V = g^T a / n each side alone goes into its rows iff they are fewer than the other dimension."""
    if not isinstance(grad, Factored):
        return namespace(grad).astype(_times(_times(grad, right).mT, left).mT, grad.dtype)
    xp = namespace(grad.a)
    a, g = (xp.reshape(x, (x.shape[0], -1, x.shape[-1])) for x in (grad.a, grad.g))
    dtype = a.dtype
    _, rows, d_in = a.shape
    into_g = rows < d_in
    into_a = rows < g.shape[-1]
    if into_g:
        g = _times_rows(g, left)
    if into_a:
        a = _times_rows(a, right)
    v = xp.matmul(g.mT / kernels.scalar(grad.n, g), a)
    v = v if into_g else _times(v.mT, left).mT
    return xp.astype(v if into_a else _times(v, right), dtype)


def _times(v: Array, inverse: Inverse) -> Array:
    if isinstance(inverse, LowRank):
        return woodbury.times(v, inverse)
    return side.times(namespace(v).astype(v, inverse.dtype), inverse)


def _times_rows(v: Array, inverse: Inverse) -> Array:
    """Rows of V times an inverse, back in their dtype: what follows is a plain product."""
    if not isinstance(inverse, LowRank):
        return side.times(v, inverse)
    return namespace(v).astype(woodbury.times_rows(v, inverse), v.dtype)
