"""What CG-FAC iterates with: a Fisher block as an operator on (blocks, d_out, d_in), held as rows.

`kron` and `empirical` have the operators; this is what each offers.
Source: Chen 2021 (2101.00218) for never forming A and G.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from kfaccore import xp as kernels
from kfaccore.factors import per_block
from kfaccore.method import Block, Hyper, Stats
from kfaccore.record import Record
from kfaccore.xp.arrays import Array, namespace

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


def damping_of(parts: Parts, damping: float | Array) -> Array:
    """Shaped to multiply (blocks, d_out, d_in)."""
    return per_block(damping, parts.weight)[:, None, None]


def widened(x: Array) -> Array:
    """x in the widest dtype, for differences that cancel."""
    return namespace(x).astype(x, kernels.widest(x))
