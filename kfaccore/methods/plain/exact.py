"""Exact block: x = (F + damping I)^-1 vec(V) with F the dense block. For tests and small layers.

F = (1/n) sum over draws and examples of vec(J) vec(J)^T, J summed over shared.

Exact always (within the layer's block).
Source: Amari 1998, natural gradient.
Cost: update batch (d_out d_in)^2; refresh (d_out d_in)^3; memory 2 (d_out d_in)^2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from kfaccore import factors, tree
from kfaccore.linalg import side
from kfaccore.linalg.inverse import accepted
from kfaccore.method import Additive, Block, Hyper
from kfaccore.record import Factored, Record, dense
from kfaccore.refreshing import InSteps
from kfaccore.solution import Solution, check_gradient, finish, gradient
from kfaccore.xp.arrays import Array, all_finite, namespace, place
from kfaccore.xp.asking import Ask, Asks
from kfaccore.xp.ranges import NO_BOUND, ranged


@dataclass(frozen=True)
class State:
    """F (blocks, D, D) times `weight` (blocks,) with D = d_out d_in, its damped inverse, code (blocks,); `sides` is
    structure."""

    F: Array
    weight: Array
    inverse: Array
    code: Array
    sides: tuple[int, int] = tree.static(default=(1, 1))  # (d_out, d_in)


@dataclass(frozen=True)
class Stats:
    """Summed outer products, their normaliser, how many rows there were and how many records were not finite."""

    F: Array
    n: Array
    rows: Array
    bad: Array


@dataclass(frozen=True)
class Exact(InSteps[State], Additive):
    """vec(x) = (F + damping I)^-1 vec(V), F = (1/n) sum vec(J) vec(J)^T the dense block (blocks, d, d), d = d_out d_in.

    V and x (blocks, d_out, d_in). Always exact within the layer. ValueError for a layer of more than `largest`
    parameters. Amari 1998, natural gradient.
    """

    largest: int = 8192
    cycles: ClassVar[int] = 1

    def __post_init__(self) -> None:
        ranged(self, largest=NO_BOUND)

    def init(self, block: Block, like: Array) -> State:
        size = block.d_out * block.d_in
        if size > self.largest:
            raise ValueError(
                f"Exact got a layer of {block.d_out} x {block.d_in} = {size} parameters; the dense block "
                f"stops at {self.largest}: use KFAC or EKFAC, or raise `largest`"
            )
        F = side.zeros(block.blocks, size, False, like)
        weight = namespace(like).zeros((block.blocks,), **place(like))
        return State(F, weight, side.identity(F), factors.unrefreshed(block, like), (block.d_out, block.d_in))

    def measure(self, state: State, record: Record, hyper: Hyper) -> Stats:
        F = dense(record)
        bad = namespace(F).astype(~all_finite(F), F.dtype)
        rows = factors.valid_rows(record)
        n = factors.per_block(record.n, rows)
        return Stats(F * n[:, None, None], n, rows, bad)

    def update(self, state: State, stats: Stats, hyper: Hyper, donate: bool = False) -> State:
        ok = factors.counts(stats.bad == 0, stats.rows, stats.n)
        F, weight = factors.moved(state.F, state.weight, stats.F, stats.n, ok, hyper, donate)
        return replace(state, F=F, weight=weight)

    def refreshing(self, state: State, hyper: Hyper) -> Asks[State]:
        shift = factors.per_block(hyper.damping, state.weight)
        ((inverse, code),) = yield (Ask(side.inverse, (factors.mean(state.F, state.weight), shift), side.grown),)
        inverse, code = accepted(inverse, code, state.inverse, state.code, state.weight)
        return replace(state, inverse=inverse, code=code)

    def solve(self, state: State, grad: Array | Factored, hyper: Hyper, record: Record | None = None) -> Solution:
        v = grad.dense() if isinstance(grad, Factored) else grad
        v, squeeze = gradient(v, (state.F.shape[0], *state.sides))
        return finish(self._product(state.inverse, v), state.code, state, squeeze)

    def matvec(self, state: State, v: Array, hyper: Hyper) -> Array:
        check_gradient(v, (state.F.shape[0], *state.sides))
        return self._product(factors.mean(state.F, state.weight), v)

    @staticmethod
    def _product(matrix: Array, v: Array) -> Array:
        xp = namespace(v)
        return xp.reshape(xp.matmul(matrix, xp.reshape(v, (v.shape[0], -1, 1))), v.shape)

    def matrix(self, state: State, block: Block) -> Array:
        """F itself, (blocks, D, D)."""
        return factors.mean(state.F, state.weight)
