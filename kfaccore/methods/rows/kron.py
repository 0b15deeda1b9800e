"""Kronecker blocks as operators: G v A through the rows of A and G, in the cheaper order.

Source: Chen 2021 (2101.00218) for never forming A and G.
Cost: 2 rows d_in d_out + rows^2 (d_in + d_out), or 4 rows d_in d_out, a product.
"""

from __future__ import annotations

from dataclasses import dataclass

from kfaccore.damping import Split, pi
from kfaccore.factors import per_block
from kfaccore.method import Block, Hyper
from kfaccore.methods.rows import factors, span
from kfaccore.methods.rows import stack as stacks
from kfaccore.methods.rows.factors import Branch, Factor, Factors, fewer_rows
from kfaccore.methods.rows.operators import Map, Sharing, damping_of, widened
from kfaccore.methods.rows.stack import Stack
from kfaccore.options import function, instance
from kfaccore.record import Record
from kfaccore.record.sharing import expand
from kfaccore.xp.arrays import Array, namespace
from kfaccore.xp.codes import Code, choose


@dataclass(frozen=True)
class Kron:
    """G (x) A + damping I from rows; a side of rows >= d is a matrix.

    sharing         expand | reduce | mean_mean | Subsample(...)
    branch          fewer_rows | always: when a side of (rows, d) is kept as rows
    through_batch   None takes the cheaper product order; False forbids rows x rows arrays
    """

    sharing: Sharing = expand
    branch: Branch = fewer_rows
    through_batch: bool | None = None

    def __post_init__(self) -> None:
        function(self, "sharing", "expand, reduce, mean_mean or Subsample(...)")
        function(self, "branch", "fewer_rows or always, a function of (rows, d)")

    def init(self, block: Block, like: Array, rows: int) -> Factors:
        return factors.init(block, like, rows, self.branch)

    def measure(self, parts: Factors, record: Record) -> factors.Stats:
        return factors.measure(parts, self.sharing(record))

    def combine(self, first: factors.Stats, second: factors.Stats) -> factors.Stats:
        return factors.combine(first, second)

    def update(self, parts: Factors, stats: factors.Stats, hyper: Hyper, donate: bool) -> Factors:
        return factors.update(parts, stats, hyper, donate=donate)

    def shape(self, parts: Factors) -> tuple[int, int, int]:
        return parts.weight.shape[0], factors.size(parts.G), factors.size(parts.A)

    def product(self, parts: Factors, v: Array) -> Array:
        """G v A."""
        A, G = factors.filled(parts)
        return factors.product(G, v, A, self.through_batch)

    def systems(self, parts: Factors, damping: float | Array) -> tuple[Map, ...]:
        c = damping_of(parts, damping)
        return (lambda v: self.product(parts, v) + c * v,)

    def diagonals(self, parts: Factors, damping: float | Array) -> tuple[Array, ...]:
        A, G = (factors.diagonal(x) for x in factors.filled(parts))
        return (G[:, :, None] * A[:, None, :] + damping_of(parts, damping),)

    def in_rows(self, parts: Factors, v: Array, damping: float | Array) -> tuple[Array, Array]:
        """By the rows' own eigenvectors; ValueError unless both sides are rows."""
        A, G = factors.filled(parts)
        if not (isinstance(A, Stack) and isinstance(G, Stack)):
            raise ValueError("InRows needs both sides as rows; a side has rows >= d: give the operator branch=always")
        a, g = (widened(x.rows) * widened(stacks.scales(x))[:, :, None] for x in (A, G))  # A = a^T a, G = g^T g
        mean = factors.scale(A).mean * factors.scale(G).mean
        c, lifted = stacks.floored(per_block(damping, parts.weight), mean)
        x = span.solve(g, a, widened(v), widened(c))
        return namespace(v).astype(x, v.dtype), choose(lifted, Code.JITTERED, Code.OK)


@dataclass(frozen=True)
class KronFactored(Kron):
    """(G + d_g I) (x) (A + d_a I) from rows: at convergence SKFAC's and K-FAC's own solution.

    split       pi | equal | per_factor | Relative(...)
    one_side    two systems, one a side, of about the root of the condition number
    """

    split: Split = pi
    one_side: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        instance(self, "split", Split, "pi, equal, per_factor or Relative(...)")
        if not self.split.separable:
            raise ValueError(f"split={self.split} does not shift each factor: take pi, or Kron() for exact damping")

    def systems(self, parts: Factors, damping: float | Array) -> tuple[Map, ...]:
        A, G = factors.filled(parts)
        d_a, d_g = self._shifts(A, G, damping)

        def right(v: Array) -> Array:
            return factors.times(v, A) + d_a[:, None, None] * v

        def left(v: Array) -> Array:
            return factors.times(v.mT, G).mT + d_g[:, None, None] * v

        return (right, left) if self.one_side else (lambda v: left(right(v)),)

    def diagonals(self, parts: Factors, damping: float | Array) -> tuple[Array, ...]:
        A, G = factors.filled(parts)
        d_a, d_g = self._shifts(A, G, damping)
        a = (factors.diagonal(A) + d_a[:, None])[:, None, :]
        g = (factors.diagonal(G) + d_g[:, None])[:, :, None]
        return (a, g) if self.one_side else (g * a,)

    def in_rows(self, parts: Factors, v: Array, damping: float | Array) -> tuple[Array, Array]:
        raise ValueError("KronFactored in the space of its rows is SKFAC: use that method")

    def _shifts(self, A: Factor, G: Factor, damping: float | Array) -> tuple[Array, Array]:
        return self.split.shifts(factors.scale(A), factors.scale(G), damping)
