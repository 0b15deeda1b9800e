"""F of the newest examples as an operator: not a Kronecker product, and not K-FAC's block.

Source: Amari 1998 for F.
Cost: 2 rows d_in d_out a product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kfaccore.factors import per_block
from kfaccore.method import Block, Hyper
from kfaccore.methods.rows import examples, fisher, units
from kfaccore.methods.rows import stack as stacks
from kfaccore.methods.rows.examples import Examples
from kfaccore.methods.rows.operators import Map, Sharing, damping_of, widened
from kfaccore.options import function
from kfaccore.record import Record
from kfaccore.record.sharing import whole
from kfaccore.xp.arrays import Array, namespace
from kfaccore.xp.codes import Code, choose


@dataclass(frozen=True)
class Empirical:
    """F + damping I of the newest examples.

    sharing     whole (an example is all its positions, exact) | expand (every position one) | reduce
    """

    sharing: Sharing = whole

    def __post_init__(self) -> None:
        function(self, "sharing", "whole, expand or reduce")

    def init(self, block: Block, like: Array, rows: int) -> Examples:
        return examples.init(block, like, rows)

    def measure(self, parts: Examples, record: Record) -> examples.Stats:
        return examples.measure(parts, units.shared(record, self.sharing))

    def combine(self, first: examples.Stats, second: examples.Stats) -> examples.Stats:
        return examples.combine(first, second)

    def update(self, parts: Examples, stats: examples.Stats, hyper: Hyper, donate: bool) -> Examples:
        return examples.update(parts, stats, hyper)

    def shape(self, parts: Examples) -> tuple[int, int, int]:
        return parts.weight.shape[0], parts.g.shape[-1], parts.a.shape[-1]

    def product(self, parts: Examples, v: Array) -> Array:
        return fisher.product(parts, v)

    def systems(self, parts: Examples, damping: float | Array) -> tuple[Map, ...]:
        c = damping_of(parts, damping)
        return (lambda v: fisher.product(parts, v) + c * v,)

    def diagonals(self, parts: Examples, damping: float | Array) -> tuple[Array, ...]:
        return (fisher.diagonal(parts) + damping_of(parts, damping),)

    def in_rows(self, parts: Examples, v: Array, damping: float | Array) -> tuple[Array, Array]:
        mean = fisher.mean_eigenvalue(parts)
        c, lifted = stacks.floored(per_block(damping, parts.weight), mean)
        wide = replace(
            parts, a=widened(parts.a), g=widened(parts.g), share=widened(parts.share), mass=widened(parts.mass)
        )
        x, code = fisher.solve(wide, widened(v), widened(c))
        return namespace(v).astype(x, v.dtype), choose(lifted & (code == int(Code.OK)), Code.JITTERED, code)
