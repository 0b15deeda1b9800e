"""F of a layer kept as rows of examples: F v = sum_e share_e <J_e, v> J_e with J_e the sum of g_r a_r^T over its rows.

Rows of one example carry one number; a moving average multiplies old shares by decay and puts the newest examples in
front. An example of which a row no longer fits leaves whole, with its mass.
Source: Amari 1998 for F; rows instead of J are what makes a product cheap.
Cost: a product 2 rows d_in d_out; memory rows (d_in + d_out).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import array_api_compat as aac

from kfaccore import factors
from kfaccore import xp as kernels
from kfaccore.methods.rows.factors import gradients
from kfaccore.record import Ids, Record
from kfaccore.xp.arrays import Array, all_finite, namespace, scalar, select


@dataclass(frozen=True)
class Examples:
    """Rows a (blocks, capacity, d_in), g (blocks, capacity, d_out), newest first; share, mass and example number
    (blocks, capacity), share 0 where empty; weight (blocks,)."""

    a: Array
    g: Array
    share: Array
    mass: Array
    number: Array
    weight: Array


@dataclass(frozen=True)
class Stats:
    """Rows of a record, their examples' numbers and how many there are; n; how many records were not finite."""

    a: Array
    g: Array
    number: Array
    examples: Array
    n: Array
    bad: Array


def init(block: Any, like: Array, capacity: int) -> Examples:
    """No examples; `Block.rows` wins over `capacity`."""
    xp, device = namespace(like), aac.device(like)
    capacity = block.rows or capacity
    a, g = (xp.zeros((block.blocks, capacity, d), dtype=like.dtype, device=device) for d in (block.d_in, block.d_out))
    share = xp.zeros((block.blocks, capacity), dtype=like.dtype, device=device)
    number = xp.zeros(share.shape, dtype=xp.int32, device=device)
    return Examples(a, g, share, xp.zeros_like(share), number, xp.zeros_like(share[:, 0]))


def measure(state: Examples, record: Record) -> Stats:
    """Rows, examples first, then draws, then positions; TypeError for an embedding."""
    if isinstance(record.a, Ids):
        raise TypeError("the empirical operator got an embedding (Ids), whose rows would be one-hot: use kron")
    if record.draws == 0:
        raise ValueError("the empirical operator got a record of zero draws (forward only): it needs gradients")
    xp, device = namespace(record.g), aac.device(record.g)
    a = xp.broadcast_to(
        record.rows()[:, :, None, :, :], (record.blocks, record.batch, record.draws, record.shared, record.d_in)
    )
    examples = record.batch * record.draws
    number = xp.repeat(xp.arange(examples, dtype=xp.int32, device=device), record.shared)
    g, a = gradients(record), xp.reshape(a, (record.blocks, -1, record.d_in))
    bad = xp.astype(~(all_finite(a) & all_finite(g)), g.dtype)
    zero = xp.zeros((record.blocks, 1), dtype=xp.int32, device=device)
    return Stats(a, g, zero + number[None, :], zero[:, 0] + examples, factors.per_block(record.n, bad), bad)


def combine(first: Stats, second: Stats) -> Stats:
    """The second's examples after the first's."""
    xp = namespace(first.a)
    a, g = (xp.concat([getattr(s, name) for s in (first, second)], axis=1) for name in "ag")
    number = xp.concat([first.number, second.number + first.examples[:, None]], axis=1)
    examples, n, bad = (getattr(first, name) + getattr(second, name) for name in ("examples", "n", "bad"))
    return Stats(a, g, number, examples, n, bad)


def update(state: Examples, stats: Stats, hyper: Any) -> Examples:
    """Newest examples in front, untouched where the Stats are not usable; ValueError when they do not fit."""
    xp, ok = namespace(state.a), stats.bad == 0
    (_, count, _), capacity = stats.a.shape, state.a.shape[1]
    if count > capacity:
        raise ValueError(f"a batch has {count} rows and there is room for {capacity}: raise rows (or Block.rows)")
    decay = scalar(hyper.decay, state.weight)
    ones = xp.ones(stats.number.shape, dtype=state.a.dtype, device=aac.device(state.a))
    kept = capacity - count
    number = xp.astype(stats.number, xp.int32)
    shifted = state.number + xp.astype(stats.examples, xp.int32)[:, None]
    shifted = xp.where(state.share > 0, shifted, xp.zeros_like(shifted))
    whole = ones[:, :1] > 0
    if 0 < kept < capacity:
        whole = (shifted[:, :kept] != shifted[:, kept : kept + 1]) | (state.share[:, kept : kept + 1] == 0)
    stays = xp.astype(whole, state.a.dtype) * decay
    new = (stats.a, stats.g, ones * ((1 - decay) / stats.n)[:, None], ones * ((1 - decay) / count), number)
    share, mass = state.share[:, :kept] * stays, state.mass[:, :kept] * stays
    old = (state.a[:, :kept, :], state.g[:, :kept, :], share, mass, shifted[:, :kept])
    before = (state.a, state.g, state.share, state.mass, state.number)
    pairs = zip(new, old, before, strict=True)
    a, g, share, mass, number = (select(ok, xp.concat([n, o], axis=1), b) for n, o, b in pairs)
    return Examples(a, g, share, mass, number, xp.where(ok, decay * state.weight + (1 - decay), state.weight))


def product(state: Examples, v: Array) -> Array:
    """F v."""
    xp = namespace(v)
    c = per_example(state, xp.sum(xp.matmul(state.g, v) * state.a, axis=-1))
    return xp.matmul((state.g * (c * shares(state))[:, :, None]).mT, state.a)


def per_example(state: Examples, values: Array) -> Array:
    """Each row's value (blocks, capacity) replaced by the sum over its example's rows."""
    xp = namespace(values)
    blocks, capacity = values.shape
    start = xp.arange(blocks, dtype=state.number.dtype, device=aac.device(values))[:, None] * capacity
    slot = xp.reshape(state.number + start, (-1,))
    given = xp.where(state.share > 0, values, xp.zeros_like(values))
    total = kernels.segment_sum(xp.reshape(given, (-1, 1)), slot, blocks * capacity)
    return xp.reshape(xp.take(total[:, 0], slot), values.shape)


def shares(state: Examples) -> Array:
    """Each row's weight in F, debiased."""
    xp = namespace(state.share)
    total = xp.sum(state.mass, axis=-1, keepdims=True)
    return state.share / xp.where(total > 0, total, xp.ones_like(total))


def diagonal(state: Examples) -> Array:
    """diag(F) as (blocks, d_out, d_in) if every row were an example of its own."""
    xp = namespace(state.a)
    return xp.matmul((state.g**2 * shares(state)[:, :, None]).mT, state.a**2)


def mean_eigenvalue(state: Examples) -> Array:
    """tr(F) / (d_in d_out) if every row were an example of its own, (blocks,)."""
    xp = namespace(state.a)
    squares = xp.sum(state.a**2, axis=-1) * xp.sum(state.g**2, axis=-1) * shares(state)
    return xp.sum(squares, axis=-1) / (state.a.shape[-1] * state.g.shape[-1])


def solve(state: Examples, v: Array, shift: Array) -> tuple[Array, Array]:
    """(F + shift I)^-1 v for any v and shift (blocks,), by a system of the size of the rows; and a code.

    (v - sum_e y_e J_e) / shift with (K + shift / share) y = <J, v>, K the inner products of the J. No iteration.
    """
    xp = namespace(v)
    index = xp.arange(state.number.shape[1], dtype=state.number.dtype, device=aac.device(v))
    root = xp.astype(state.number[:, None, :] == index[:, None], v.dtype) * xp.sqrt(shares(state))[:, None, :]
    K = xp.matmul(state.a, state.a.mT) * xp.matmul(state.g, state.g.mT)
    system = xp.matmul(xp.matmul(root, K), root.mT) + shift[:, None, None] * xp.eye(
        K.shape[-1], dtype=v.dtype, device=aac.device(v)
    )
    inverse, code = kernels.spd_inverse(system)
    inner = xp.sum(xp.matmul(state.g, v) * state.a, axis=-1)
    y = xp.matmul(root.mT, xp.matmul(inverse, xp.matmul(root, inner[:, :, None])))
    return (v - xp.matmul((state.g * y).mT, state.a)) / shift[:, None, None], code
