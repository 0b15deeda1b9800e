"""Modes grown from rows: what the three Brand methods share. Stats are rows; an update takes them in by Brand's.

A side moves as U D U^T <- decay U D U^T + (1 - decay) X^T X / many for the new rows X, of which there are `many`.
Source: Puiu 2022 (2210.08494).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, TypedDict, TypeVar

from kfaccore import factors, tree
from kfaccore import xp as kernels
from kfaccore.linalg import side
from kfaccore.method import Block, Hyper
from kfaccore.methods.lowrank import brand_update as brand
from kfaccore.methods.lowrank import lowrank, modes
from kfaccore.methods.lowrank.lowrank import Factor, LowRank, Outside, Rank
from kfaccore.methods.lowrank.modes import Modes, Sides
from kfaccore.record import Record
from kfaccore.xp import Code, choose
from kfaccore.xp.arrays import Array, all_finite, device_of, namespace, place, scalar, select


class State(modes.State, Protocol):
    """A state with modes A, G of the averages, times their `weight` (blocks,)."""

    @property
    def A(self) -> Factor: ...

    @property
    def G(self) -> Factor: ...


class FullState(State, Protocol):
    """One that keeps the averages themselves as well."""

    @property
    def full_A(self) -> Array: ...

    @property
    def full_G(self) -> Array: ...


S = TypeVar("S", bound=State)
F = TypeVar("F", bound=FullState)


@dataclass(frozen=True)
class Stats:
    """The rows a (blocks, many, d_in) of `rows` valid rows, and the rows g (blocks, many, d_out) with their normaliser
    n; of a diagonal side the sums of their squares, (blocks, d)."""

    a: Array
    rows: Array
    g: Array
    n: Array
    bad: Array


class Fields(TypedDict):
    """What every state with grown modes starts from."""

    A: Factor
    G: Factor
    weight: Array
    code: Array


class Grown(Modes[S]):
    """Base of methods whose modes grow from each update's rows; they add `init` and `refresh`."""

    def measure(self, state: S, record: Record, hyper: Hyper) -> Stats:
        return measure(record, self.sharing, state)

    def combine(self, first: Stats, second: Stats) -> Stats:
        """Rows of both, sums added."""
        return Stats(
            a=_joined(first.a, second.a),
            rows=first.rows + second.rows,
            g=_joined(first.g, second.g),
            n=first.n + second.n,
            bad=first.bad + second.bad,
        )

    def update(self, state: S, stats: Stats, hyper: Hyper, donate: bool = False) -> S:
        return moved(state, stats, hyper, self.rank, self.outside)

    def sides(self, state: S) -> Sides:
        """The modes divided by their weight."""
        total, identity = modes.normaliser(state.weight, self.start)
        return Sides(lowrank.scaled(state.A, 1 / total), lowrank.scaled(state.G, 1 / total), identity)

    def kronecker_terms(self, state: S, block: Block) -> tuple[tuple[Array, Array], ...]:
        """((A~, G~),), dense; none where a side is too wide for a matrix."""
        if max(block.d_in, block.d_out) > side.WIDEST:
            return ()
        sides = self.sides(state)
        return ((lowrank.dense(sides.A), lowrank.dense(sides.G)),)


class Kept(Grown[F]):
    """Base of those that keep the averages as well, for their refresh."""

    def update(self, state: F, stats: Stats, hyper: Hyper, donate: bool = False) -> F:
        full = averaged(state, stats, hyper, donate)
        return replace(super().update(state, stats, hyper, donate), **full)


def init(block: Block, rank: Rank, like: Array) -> Fields:
    """Sides with room for the counted modes and one update's rows."""
    held = rank.cap + block.rows
    return {
        "A": modes.empty(block.d_in, block.diagonal_in, block.blocks, held, rank, like),
        "G": modes.empty(block.d_out, block.diagonal_out, block.blocks, held, rank, like),
        "weight": namespace(like).zeros((block.blocks,), **place(like)),
        "code": factors.unrefreshed(block, like),
    }


def measure(record: Record, sharing: Callable[[Record], Record], like: State) -> Stats:
    """Rows of one record, or squares of a side that is diagonal in `like`; zero draws give G = I by definition."""
    record = sharing(record)
    xp = namespace(record.g)
    if not isinstance(like.A, LowRank):
        a = factors.gram_of_inputs(record, diagonal=True)
    else:
        a = xp.reshape(record.rows(), (record.blocks, -1, record.d_in))
    if not isinstance(like.G, LowRank):
        g = factors.gram_of_gradients(record, diagonal=True)
    elif record.draws == 0:
        identity = side.identity(side.zeros(record.blocks, record.d_out, False, record.g))
        g = identity * _root(record.n, record.g)  # so that g^T g / n = I
    else:
        g = xp.reshape(xp.permute_dims(record.g, (1, 2, 0, 3, 4)), (record.blocks, -1, record.d_out))
    rows = factors.valid_rows(record)
    n = factors.per_block(record.n, rows)
    # of rows, what will be stored are the means of their squares
    fine = all_finite(a) & all_finite(g) & xp.isfinite(_total(a) / factors.positive(rows))
    fine = fine & xp.isfinite(_total(g) / factors.positive(n))
    return Stats(a, rows, g, n, xp.astype(~fine, rows.dtype))


def _total(x: Array) -> Array:
    """Sum of squares of rows, or of what is squares already, (blocks,)."""
    xp = namespace(x)
    if x.ndim == 2:
        return xp.sum(x, axis=-1)
    flat = xp.reshape(x, (x.shape[0], -1))
    return xp.vecdot(flat, flat)


def moved(state: S, stats: Stats, hyper: Hyper, rank: Rank, outside: Outside) -> S:
    """`state` with its sides A, G and weight moved by the Stats; untouched where these are not usable."""
    xp = namespace(state.weight)
    usable = factors.counts(stats.bad == 0, stats.rows, stats.n)
    one = xp.ones_like(state.weight)
    keep = scalar(hyper.decay, one) * one

    def side_moved(old: Factor, rows: Array, add: Array) -> tuple[Factor, Array]:
        if not isinstance(old, LowRank):
            return keep[:, None] * old + add[:, None] * rows, usable
        new = brand.moved(old, select(usable, rows, xp.zeros_like(rows)), keep, add, rank, outside)
        return new, usable & all_finite(new.U) & all_finite(new.D) & all_finite(new.trace[:, None])

    A, ok_a = side_moved(state.A, stats.a, (1 - keep) / factors.positive(stats.rows))
    G, ok_g = side_moved(state.G, stats.g, (1 - keep) / factors.positive(stats.n))
    ok = ok_a & ok_g
    return replace(
        state,
        A=tree.map(lambda new, old: select(ok, new, old), A, state.A),
        G=tree.map(lambda new, old: select(ok, new, old), G, state.G),
        weight=select(ok, keep * state.weight + (1 - keep), state.weight),
        code=choose(ok, Code.OK, state.code),
    )


def averaged(state: FullState, stats: Stats, hyper: Hyper, donate: bool) -> dict[str, Array]:
    """full_A and full_G of `state` moved by the same Stats."""
    A = stats.a if stats.a.ndim == 2 else kernels.gram(stats.a)
    G = stats.g if stats.g.ndim == 2 else kernels.gram(stats.g)
    ok = factors.counts(stats.bad == 0, stats.rows, stats.n)
    decay = scalar(hyper.decay, state.weight)
    return {
        "full_A": kernels.average(state.full_A, A, decay, (1 - decay) / factors.positive(stats.rows), ok, donate),
        "full_G": kernels.average(state.full_G, G, decay, (1 - decay) / factors.positive(stats.n), ok, donate),
    }


def _joined(x: Array, y: Array) -> Array:
    """Rows one after the other, sums of squares added."""
    return x + y if x.ndim == 2 else namespace(x).concat([x, y], axis=1)


def _root(n: float | Array, like: Array) -> Array:
    xp = namespace(like)
    return xp.sqrt(xp.asarray(scalar(n, like), dtype=like.dtype, device=device_of(like)))
