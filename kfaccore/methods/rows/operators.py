"""Fisher blocks as operators on (blocks, d_out, d_in), held as rows: what CG-FAC iterates with.

Each offers init, measure, combine and update of its parts, their undamped `product`, the damped `systems` to solve one
after the other, their `diagonals`, and `in_rows`, the solution by systems of the size of the rows.
Source: Chen 2021 (2101.00218) for never forming A and G.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kfaccore import xp as kernels
from kfaccore.damping import Split, pi
from kfaccore.factors import per_block
from kfaccore.methods.rows import factors, fisher, span
from kfaccore.methods.rows import stack as stacks
from kfaccore.methods.rows.factors import Branch, fewer_rows
from kfaccore.methods.rows.stack import Stack
from kfaccore.record import Record
from kfaccore.record.sharing import expand, whole
from kfaccore.xp.arrays import Array, namespace
from kfaccore.xp.codes import Code, choose

if TYPE_CHECKING:
    from kfaccore.method import Block, Hyper

Sharing = Callable[[Record], Record]
Map = Callable[[Array], Array]


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

    def init(self, block: Block, like: Array, rows: int) -> Any:
        return factors.init(block, like, rows, self.branch)

    def measure(self, parts: Any, record: Record) -> Any:
        return factors.measure(parts, self.sharing(record))

    def combine(self, first: Any, second: Any) -> Any:
        return factors.combine(first, second)

    def update(self, parts: Any, stats: Any, hyper: Hyper, donate: bool) -> Any:
        return factors.update(parts, stats, hyper, donate=donate)

    def product(self, parts: Any, v: Array) -> Array:
        """G v A."""
        A, G = factors.debiased(parts)
        return factors.product(G, v, A, self.through_batch)

    def systems(self, parts: Any, damping: float | Array) -> tuple[Map, ...]:
        """Operators to solve with, one after the other."""
        c = per_block(damping, parts.weight)[:, None, None]
        return (lambda v: self.product(parts, v) + c * v,)

    def diagonals(self, parts: Any, damping: float | Array) -> tuple[Array, ...]:
        """Diagonal of each of `systems`."""
        A, G = (factors.diagonal(x) for x in factors.debiased(parts))
        return (G[:, :, None] * A[:, None, :] + per_block(damping, parts.weight)[:, None, None],)

    def in_rows(self, parts: Any, v: Array, damping: float | Array) -> tuple[Array, Array]:
        """The solution without iterations, and a code; ValueError unless both sides are rows."""
        A, G = factors.debiased(parts)
        if not (isinstance(A, Stack) and isinstance(G, Stack)):
            raise ValueError("InRows needs both sides as rows; a side has rows >= d: give the operator branch=always")
        a, g = (_wide(x.rows) * _wide(stacks.scales(x))[:, :, None] for x in (A, G))
        mean = factors.scale(A).mean * factors.scale(G).mean
        c, lifted = stacks.floored(per_block(damping, parts.weight), mean)
        x = span.solve(g, a, _wide(v), _wide(c))
        return namespace(v).astype(x, v.dtype), choose(lifted, Code.JITTERED, Code.OK)


@dataclass(frozen=True)
class KronFactored(Kron):
    """(G + d_g I) (x) (A + d_a I) from rows: at convergence SKFAC's and K-FAC's own solution.

    split       pi | equal | per_factor | Relative(...)
    one_side    two systems, one a side, of about the root of the condition number
    """

    split: Split = pi
    one_side: bool = False

    def systems(self, parts: Any, damping: float | Array) -> tuple[Map, ...]:
        A, G = factors.debiased(parts)
        d_a, d_g = (x[:, None, None] for x in self._shifts(A, G, damping))

        def right(v: Array) -> Array:
            return factors.times(v, A) + d_a * v

        def left(v: Array) -> Array:
            return factors.times(v.mT, G).mT + d_g * v

        return (right, left) if self.one_side else (lambda v: left(right(v)),)

    def diagonals(self, parts: Any, damping: float | Array) -> tuple[Array, ...]:
        A, G = factors.debiased(parts)
        d_a, d_g = (x[:, None] for x in self._shifts(A, G, damping))
        a, g = (factors.diagonal(A) + d_a)[:, None, :], (factors.diagonal(G) + d_g)[:, :, None]
        return (a, g) if self.one_side else (g * a,)

    def in_rows(self, parts: Any, v: Array, damping: float | Array) -> tuple[Array, Array]:
        raise ValueError("KronFactored in the space of its rows is SKFAC: use that method")

    def _shifts(self, A: Any, G: Any, damping: float | Array) -> tuple[Array, Array]:
        return self.split.shifts(factors.scale(A), factors.scale(G), damping)


@dataclass(frozen=True)
class Empirical:
    """F + damping I of the newest examples: not a Kronecker product, and not K-FAC's block.

    sharing     whole (an example is all its positions, exact) | expand (every position one) | reduce
    """

    sharing: Sharing = whole

    def init(self, block: Block, like: Array, rows: int) -> Any:
        return fisher.init(block, like, rows)

    def measure(self, parts: Any, record: Record) -> Any:
        return fisher.measure(parts, self.sharing(record))

    def combine(self, first: Any, second: Any) -> Any:
        return fisher.combine(first, second)

    def update(self, parts: Any, stats: Any, hyper: Hyper, donate: bool) -> Any:
        return fisher.update(parts, stats, hyper)

    def product(self, parts: Any, v: Array) -> Array:
        return fisher.product(parts, v)

    def systems(self, parts: Any, damping: float | Array) -> tuple[Map, ...]:
        c = per_block(damping, parts.weight)[:, None, None]
        return (lambda v: fisher.product(parts, v) + c * v,)

    def diagonals(self, parts: Any, damping: float | Array) -> tuple[Array, ...]:
        return (fisher.diagonal(parts) + per_block(damping, parts.weight)[:, None, None],)

    def in_rows(self, parts: Any, v: Array, damping: float | Array) -> tuple[Array, Array]:
        mean = fisher.mean_eigenvalue(parts)
        c, lifted = stacks.floored(per_block(damping, parts.weight), mean)
        wide = {name: _wide(getattr(parts, name)) for name in ("a", "g", "share", "mass")}
        x, code = fisher.solve(replace(parts, **wide), _wide(v), _wide(c))
        return namespace(v).astype(x, v.dtype), choose(lifted & (code == int(Code.OK)), Code.JITTERED, code)


def _wide(x: Array) -> Array:
    """x in the widest dtype, for differences that cancel."""
    return namespace(x).astype(x, kernels.widest(x))
