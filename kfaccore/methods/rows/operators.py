"""Fisher blocks as operators on (blocks, d_out, d_in), held as rows: what CG-FAC iterates with.

`Operator` says what each offers.
Source: Chen 2021 (2101.00218) for never forming A and G.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from kfaccore import xp as kernels
from kfaccore.damping import Split, pi
from kfaccore.factors import per_block
from kfaccore.method import Block, Hyper, Stats
from kfaccore.methods.rows import factors, fisher, span
from kfaccore.methods.rows import stack as stacks
from kfaccore.methods.rows.factors import Branch, Factor, Factors, fewer_rows
from kfaccore.methods.rows.fisher import Examples
from kfaccore.methods.rows.stack import Stack
from kfaccore.record import Record
from kfaccore.record.sharing import expand, whole
from kfaccore.xp.arrays import Array, namespace
from kfaccore.xp.codes import Code, choose

Sharing = Callable[[Record], Record]
Map = Callable[[Array], Array]


class Parts(Protocol):
    """A tree of arrays: what an operator keeps. weight (blocks,) is 0 before the first update."""

    @property
    def weight(self) -> Array: ...


P = TypeVar("P", bound=Parts)
T = TypeVar("T", bound=Stats)


class Operator(Protocol[P, T]):
    """What CG-FAC asks of a Fisher block; v (blocks, d_out, d_in), damping a number or (blocks,)."""

    def init(self, block: Block, like: Array, rows: int) -> P:
        """No rows yet, with room for `rows`."""
        ...

    def measure(self, parts: P, record: Record) -> T:
        """Stats of a record."""
        ...

    def combine(self, first: T, second: T) -> T:
        """Stats of two records as one."""
        ...

    def update(self, parts: P, stats: T, hyper: Hyper, donate: bool) -> P:
        """The newest rows in front."""
        ...

    def shape(self, parts: P) -> tuple[int, int, int]:
        """(blocks, d_out, d_in)."""
        ...

    def product(self, parts: P, v: Array) -> Array:
        """F~ v, undamped."""
        ...

    def systems(self, parts: P, damping: float | Array) -> tuple[Map, ...]:
        """Damped operators to solve with, one after the other."""
        ...

    def diagonals(self, parts: P, damping: float | Array) -> tuple[Array, ...]:
        """Diagonal of each of `systems`."""
        ...

    def in_rows(self, parts: P, v: Array, damping: float | Array) -> tuple[Array, Array]:
        """The solution by systems of the size of the rows, and a code; ValueError where there is none."""
        ...


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
        A, G = factors.debiased(parts)
        return factors.product(G, v, A, self.through_batch)

    def systems(self, parts: Factors, damping: float | Array) -> tuple[Map, ...]:
        c = _damping(parts, damping)
        return (lambda v: self.product(parts, v) + c * v,)

    def diagonals(self, parts: Factors, damping: float | Array) -> tuple[Array, ...]:
        A, G = (factors.diagonal(x) for x in factors.debiased(parts))
        return (G[:, :, None] * A[:, None, :] + _damping(parts, damping),)

    def in_rows(self, parts: Factors, v: Array, damping: float | Array) -> tuple[Array, Array]:
        """By the rows' own eigenvectors; ValueError unless both sides are rows."""
        A, G = factors.debiased(parts)
        if not (isinstance(A, Stack) and isinstance(G, Stack)):
            raise ValueError("InRows needs both sides as rows; a side has rows >= d: give the operator branch=always")
        a, g = (_wide(x.rows) * _wide(stacks.scales(x))[:, :, None] for x in (A, G))  # A = a^T a, G = g^T g
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

    def systems(self, parts: Factors, damping: float | Array) -> tuple[Map, ...]:
        A, G = factors.debiased(parts)
        d_a, d_g = self._shifts(A, G, damping)

        def right(v: Array) -> Array:
            return factors.times(v, A) + d_a[:, None, None] * v

        def left(v: Array) -> Array:
            return factors.times(v.mT, G).mT + d_g[:, None, None] * v

        return (right, left) if self.one_side else (lambda v: left(right(v)),)

    def diagonals(self, parts: Factors, damping: float | Array) -> tuple[Array, ...]:
        A, G = factors.debiased(parts)
        d_a, d_g = self._shifts(A, G, damping)
        a = (factors.diagonal(A) + d_a[:, None])[:, None, :]
        g = (factors.diagonal(G) + d_g[:, None])[:, :, None]
        return (a, g) if self.one_side else (g * a,)

    def in_rows(self, parts: Factors, v: Array, damping: float | Array) -> tuple[Array, Array]:
        raise ValueError("KronFactored in the space of its rows is SKFAC: use that method")

    def _shifts(self, A: Factor, G: Factor, damping: float | Array) -> tuple[Array, Array]:
        return self.split.shifts(factors.scale(A), factors.scale(G), damping)


@dataclass(frozen=True)
class Empirical:
    """F + damping I of the newest examples: not a Kronecker product, and not K-FAC's block.

    sharing     whole (an example is all its positions, exact) | expand (every position one) | reduce
    """

    sharing: Sharing = whole

    def init(self, block: Block, like: Array, rows: int) -> Examples:
        return fisher.init(block, like, rows)

    def measure(self, parts: Examples, record: Record) -> fisher.Stats:
        return fisher.measure(parts, self.sharing(record))

    def combine(self, first: fisher.Stats, second: fisher.Stats) -> fisher.Stats:
        return fisher.combine(first, second)

    def update(self, parts: Examples, stats: fisher.Stats, hyper: Hyper, donate: bool) -> Examples:
        return fisher.update(parts, stats, hyper)

    def shape(self, parts: Examples) -> tuple[int, int, int]:
        return parts.weight.shape[0], parts.g.shape[-1], parts.a.shape[-1]

    def product(self, parts: Examples, v: Array) -> Array:
        return fisher.product(parts, v)

    def systems(self, parts: Examples, damping: float | Array) -> tuple[Map, ...]:
        c = _damping(parts, damping)
        return (lambda v: fisher.product(parts, v) + c * v,)

    def diagonals(self, parts: Examples, damping: float | Array) -> tuple[Array, ...]:
        return (fisher.diagonal(parts) + _damping(parts, damping),)

    def in_rows(self, parts: Examples, v: Array, damping: float | Array) -> tuple[Array, Array]:
        mean = fisher.mean_eigenvalue(parts)
        c, lifted = stacks.floored(per_block(damping, parts.weight), mean)
        wide = replace(parts, a=_wide(parts.a), g=_wide(parts.g), share=_wide(parts.share), mass=_wide(parts.mass))
        x, code = fisher.solve(wide, _wide(v), _wide(c))
        return namespace(v).astype(x, v.dtype), choose(lifted & (code == int(Code.OK)), Code.JITTERED, code)


def _damping(parts: Parts, damping: float | Array) -> Array:
    """Shaped to multiply (blocks, d_out, d_in)."""
    return per_block(damping, parts.weight)[:, None, None]


def _wide(x: Array) -> Array:
    """x in the widest dtype, for differences that cancel."""
    return namespace(x).astype(x, kernels.widest(x))
