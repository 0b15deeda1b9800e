"""What the methods that keep modes of a factor share: Stats of rows, their updates by Brand, and the damped solve.

Each side of a state is a `LowRank`, or for an embedding the diagonal (blocks, size). Averages start at `start` times
the identity, which no side stores: start * (1 - weight) of it is left, and joins the damping.
Source: Puiu 2022 (2206.15397) and 2022 (2210.08494).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import array_api_compat as aac

from kfaccore import factors, tree
from kfaccore import xp as kernels
from kfaccore.damping import Split
from kfaccore.linalg import kron, side
from kfaccore.method import Block, Hyper
from kfaccore.methods.lowrank import brand_update as brand
from kfaccore.methods.lowrank import lowrank
from kfaccore.methods.lowrank.lowrank import LowRank, Rank
from kfaccore.record import Factored, Ids, Record
from kfaccore.solution import Solution, finish, gradient
from kfaccore.xp import Code, choose
from kfaccore.xp.arrays import Array, all_finite, namespace, scalar, select


@dataclass(frozen=True)
class Stats:
    """The rows a (blocks, many, d_in), or an embedding's counts (blocks, size), of `rows` valid rows, and the rows g
    (blocks, many, d_out) with their normaliser n."""

    a: Array
    rows: Array
    g: Array
    n: Array
    bad: Array


def measure(record: Record, sharing: Callable[[Record], Record]) -> Stats:
    """Rows of one record; zero draws give G = I by definition."""
    record = sharing(record)
    xp = namespace(record.g)
    if isinstance(record.a, Ids):
        a = factors.gram_of_inputs(record)
    else:
        a = xp.reshape(record.rows(), (record.blocks, -1, record.d_in))
    if record.draws == 0:
        g = side.identity(side.zeros(record.blocks, record.d_out, False, record.g)) * _root(record.n, record.g)
    else:
        g = xp.reshape(xp.permute_dims(record.g, (1, 2, 0, 3, 4)), (record.blocks, -1, record.d_out))
    rows = factors.valid_rows(record)
    bad = xp.astype(~(all_finite(a) & all_finite(g)), rows.dtype)
    return Stats(a, rows, g, factors.per_block(record.n, bad), bad)


def combine(first: Stats, second: Stats) -> Stats:
    """Rows of both, counts added."""
    xp = namespace(first.g)
    a = first.a + second.a if first.a.ndim == 2 else xp.concat([first.a, second.a], axis=1)
    sums = (getattr(first, name) + getattr(second, name) for name in ("rows", "n", "bad"))
    rows, n, bad = sums
    return Stats(a, rows, xp.concat([first.g, second.g], axis=1), n, bad)


def _root(n: float | Array, like: Array) -> Array:
    xp = namespace(like)
    return xp.sqrt(xp.asarray(scalar(n, like), dtype=like.dtype, device=aac.device(like)))


def grams(stats: Stats) -> factors.Stats:
    """The same as sums of outer products, for methods that also keep the factors."""
    a = stats.a if stats.a.ndim == 2 else kernels.gram(stats.a)
    return factors.Stats(a, stats.rows, kernels.gram(stats.g), stats.n, stats.bad)


def init(block: Block, rank: Rank, like: Array) -> dict[str, Any]:
    """The fields every state with Brand's modes starts from."""
    xp, held = namespace(like), rank.cap + block.rows
    return {
        "A": start(block.d_in, block.diagonal_in, block.blocks, held, rank, like),
        "G": start(block.d_out, False, block.blocks, held, rank, like),
        "weight": xp.zeros((block.blocks,), dtype=like.dtype, device=aac.device(like)),
        "code": factors.unrefreshed(block, like),
    }


def start(d: int, diagonal: bool, blocks: int, held: int, rank: Rank, like: Array) -> Any:
    """A side before any update."""
    if diagonal:
        return namespace(like).zeros((blocks, d), dtype=like.dtype, device=aac.device(like))
    return lowrank.start(blocks, d, held, rank, like)


def moved(state: Any, stats: Stats, hyper: Hyper, rank: Rank, outside: Callable[[LowRank], Array]) -> Any:
    """`state` with its sides A, G and weight moved by the Stats; untouched where these are not usable."""
    xp = namespace(state.weight)
    ok = (stats.bad == 0) & (stats.rows > 0)
    one = xp.ones_like(state.weight)
    keep = scalar(hyper.decay, one) * one
    many = xp.where(stats.rows > 0, stats.rows, one)
    sides, finite = [], ok
    for old, rows, count in ((state.A, stats.a, many), (state.G, stats.g, stats.n)):
        add = (1 - keep) / count
        if isinstance(old, LowRank):
            rows = select(ok, rows, xp.zeros_like(rows))
            new = brand.moved(old, rows, keep, add, rank, outside)
            finite = finite & all_finite(new.U) & all_finite(new.D) & all_finite(new.trace[:, None])
        else:
            new = keep[:, None] * old + add[:, None] * rows
        sides.append(new)
    new = replace(
        state,
        A=sides[0],
        G=sides[1],
        weight=keep * state.weight + (1 - keep),
        code=choose(ok & finite, Code.OK, state.code),
    )
    chosen = {name: _chosen(finite, getattr(new, name), getattr(state, name)) for name in ("A", "G", "weight", "code")}
    return replace(state, **chosen)


def _chosen(ok: Array, new: Any, old: Any) -> Any:
    return tree.map(lambda n, o: select(ok, n, o), new, old)


def averaged(state: Any, stats: Stats, hyper: Hyper, donate: bool) -> dict[str, Array]:
    """full_A and full_G of `state` moved by the same Stats."""
    sums = grams(stats)
    ok = (stats.bad == 0) & (stats.rows > 0)
    rows = namespace(ok).where(stats.rows > 0, stats.rows, namespace(ok).ones_like(stats.rows))
    decay, found = scalar(hyper.decay, state.weight), {}
    for name, total, many in (("full_A", sums.A, rows), ("full_G", sums.G, stats.n)):
        found[name] = kernels.average(getattr(state, name), total, decay, (1 - decay) / many, ok, donate)
    return found


def means(state: Any, start: float) -> tuple[Any, Any, Array]:
    """Both sides divided by their weight, and the identity's share."""
    total, identity = normaliser(state.weight, start)
    return lowrank.scaled(state.A, 1 / total), lowrank.scaled(state.G, 1 / total), identity


def normaliser(weight: Array, start: float) -> tuple[Array, Array]:
    """(what averages are divided by, the identity's share) at this weight: start * (1 - weight) is left of it."""
    xp = namespace(weight)
    left = start * (1 - weight)
    total = weight + left
    total = xp.where(total > 0, total, xp.ones_like(total))
    return total, left / total


def inverses(state: Any, A: Any, G: Any, split: Split, identity: Array, hyper: Hyper) -> tuple[Array, Array]:
    """Dense damped inverses of both sides, for analysis."""
    inner, outer, _ = damped(A, G, split, hyper.damping, identity, state.code == int(Code.IDENTITY))
    return lowrank.dense(inner), lowrank.dense(outer)


def damped(
    A: Any, G: Any, split: Split, damping: float | Array, identity: Array, unit: Array
) -> tuple[Any, Any, Array]:
    """Damped inverses of both sides (means), and whether a denominator had to be lifted; I for blocks where `unit`."""
    d_a, d_g = split.shifts(lowrank.scale(A), lowrank.scale(G), damping)
    left, lifted_a = lowrank.inverse(A, d_a + identity, unit)
    right, lifted_g = lowrank.inverse(G, d_g + identity, unit)
    return left, right, lifted_a | lifted_g


def solve(state: Any, A: Any, G: Any, split: Split, identity: Array, grad: Array | Factored, hyper: Hyper) -> Solution:
    """(G + d_g I)^-1 V (A + d_a I)^-1 for the means A, G, at the newest damping; a factored V is never formed."""
    grad, squeeze = gradient(grad, (state.code.shape[0], lowrank.size(G), lowrank.size(A)))
    unit = state.code == int(Code.IDENTITY)
    inner, outer, lifted = damped(A, G, split, hyper.damping, identity, unit)
    direction = kron.sandwich(lambda g: lowrank.times(g, outer), grad, lambda a: lowrank.times(a, inner))
    code = choose(lifted & (state.code == int(Code.OK)), Code.JITTERED, state.code)
    return finish(direction, code, state, squeeze)


def checked(split: Split) -> None:
    """Raises ValueError for a split that does not shift each factor."""
    if not split.separable:
        raise ValueError(f"split={split} does not shift each factor: use pi, equal, per_factor, top or Relative(...)")
