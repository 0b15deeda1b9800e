"""Diagonal Fisher: x = V / (D + damping) with D = (1/n) sum over draws and examples of J^2, elementwise.

Exact when F is diagonal (a layer with one input and one output; an embedding seen through one label).
Source: the diagonal of the definition; Amari 1998 for the natural gradient.
Cost: update rows d_in d_out (shared 1), batch shared d_in d_out otherwise; no refresh; memory d_in d_out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from kfaccore import factors
from kfaccore.damping import joint
from kfaccore.linalg.inverse import floored
from kfaccore.method import Additive, Block, Hyper
from kfaccore.record import Factored, Record
from kfaccore.record.squares import squares
from kfaccore.solution import Solution, check_gradient, finish_later, gradient
from kfaccore.xp import Code, choose
from kfaccore.xp.arrays import Array, all_finite, namespace, place


@dataclass(frozen=True)
class State:
    """D (blocks, d_out, d_in) times `weight` (blocks,); code (blocks,)."""

    D: Array
    weight: Array
    code: Array


@dataclass(frozen=True)
class Stats:
    """Summed squares, their normaliser, how many rows there were and how many records were not finite."""

    D: Array
    n: Array
    rows: Array
    bad: Array


@dataclass(frozen=True)
class Diagonal(Additive):
    """x = V / (D + damping), D = (1/n) sum over draws and examples of J^2 entry by entry.

    J is summed over shared positions first; V, x and D are (blocks, d_out, d_in). Exact when F is diagonal. ValueError
    for a record of zero draws. Amari 1998, natural gradient.
    """

    cycles: ClassVar[int] = 1

    def init(self, block: Block, like: Array) -> State:
        xp = namespace(like)
        where = place(like)
        D = xp.zeros((block.blocks, block.d_out, block.d_in), **where)
        weight = xp.zeros((block.blocks,), **where)
        return State(D, weight, factors.unrefreshed(block, like))

    def measure(self, state: State, record: Record, hyper: Hyper) -> Stats:
        factors.needs_draws(record)
        D = squares(record)
        rows = factors.valid_rows(record)
        n = factors.per_block(record.n, rows)
        bad = namespace(D).astype(~all_finite(D / factors.positive(n)[:, None, None]), D.dtype)
        return Stats(D, n, rows, bad)

    def update(self, state: State, stats: Stats, hyper: Hyper, donate: bool = False) -> State:
        ok = factors.counts(stats.bad == 0, stats.rows, stats.n)
        D, weight = factors.moved(state.D, state.weight, stats.D, stats.n, ok, hyper, donate)
        return replace(state, D=D, weight=weight)

    def refresh(self, state: State, hyper: Hyper) -> State:
        return replace(state, code=choose(state.weight > 0, Code.OK, state.code))

    def solve(self, state: State, grad: Array | Factored, hyper: Hyper, record: Record | None = None) -> Solution:
        grad, squeeze = gradient(grad, tuple(state.D.shape))
        v = grad.dense() if isinstance(grad, Factored) else grad
        _, _, values = self.eigensystem(state, hyper)
        below, code = floored(values, state.code)
        return finish_later(v / below, code, state, squeeze)

    def matvec(self, state: State, v: Array, hyper: Hyper) -> Array:
        check_gradient(v, tuple(state.D.shape))
        return factors.mean(state.D, state.weight) * v

    def eigensystem(self, state: State, hyper: Hyper) -> tuple[Array, Array, Array]:
        """(I, I, D + damping): the standard basis, as diagonals."""
        D = factors.mean(state.D, state.weight)
        xp = namespace(D)
        return xp.ones_like(D[:, 0, :]), xp.ones_like(D[:, :, 0]), D + joint(hyper.damping, D)
