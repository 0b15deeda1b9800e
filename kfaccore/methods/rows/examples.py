"""The newest examples of a layer as rows: what F is a sum over.

Rows of one example carry one number; a moving average multiplies old shares by decay and puts the newest examples in
front. An example of which a row no longer fits leaves whole, with its mass.
Source: ours.
Cost: a copy of the rows an update; memory rows (d_in + d_out).
"""

from __future__ import annotations

from dataclasses import dataclass

from kfaccore import factors
from kfaccore.method import Block, Hyper
from kfaccore.methods.rows.factors import gradients
from kfaccore.record import Ids, Record
from kfaccore.xp.arrays import Array, all_finite, device_of, namespace, place, scalar, select


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
    """Rows of a record, their examples' numbers and how many there are; n; how many rows exist; how many records were
    not finite."""

    a: Array
    g: Array
    number: Array
    examples: Array
    n: Array
    rows: Array
    bad: Array


def init(block: Block, like: Array, capacity: int) -> Examples:
    """No examples; `Block.rows` wins over `capacity`."""
    xp = namespace(like)
    where = place(like)
    slots = (block.blocks, block.rows or capacity)
    share = xp.zeros(slots, **where)
    return Examples(
        a=xp.zeros((*slots, block.d_in), **where),
        g=xp.zeros((*slots, block.d_out), **where),
        share=share,
        mass=xp.zeros_like(share),
        number=xp.zeros(slots, dtype=xp.int32, device=where["device"]),
        weight=xp.zeros_like(share[:, 0]),
    )


def measure(state: Examples, record: Record) -> Stats:
    """Rows, examples first, then draws, then positions; TypeError for an embedding."""
    if isinstance(record.a, Ids):
        raise TypeError("the empirical operator got an embedding (Ids), whose rows would be one-hot: use kron")
    if record.draws == 0:
        raise ValueError("the empirical operator got a record of zero draws (forward only): it needs gradients")
    xp = namespace(record.g)
    device = device_of(record.g)
    shape = (record.blocks, record.batch, record.draws, record.shared, record.d_in)
    a = xp.broadcast_to(record.rows()[:, :, None, :, :], shape)  # each draw of an example has the example's inputs
    a = xp.reshape(a, (record.blocks, -1, record.d_in))
    g = gradients(record)
    examples = record.batch * record.draws
    number = xp.repeat(xp.arange(examples, dtype=xp.int32, device=device), record.shared)
    zero = xp.zeros((record.blocks, 1), dtype=xp.int32, device=device)
    fine = all_finite(a) & all_finite(g)
    rows = factors.valid_rows(record)
    n = factors.per_block(record.n, rows)
    bad = xp.astype(~(fine & xp.isfinite(1 / factors.positive(n))), g.dtype)
    return Stats(a, g, zero + number[None, :], zero[:, 0] + examples, n, rows, bad)


def combine(first: Stats, second: Stats) -> Stats:
    """The second's examples after the first's."""
    xp = namespace(first.a)
    return Stats(
        a=xp.concat([first.a, second.a], axis=1),
        g=xp.concat([first.g, second.g], axis=1),
        number=xp.concat([first.number, second.number + first.examples[:, None]], axis=1),
        examples=first.examples + second.examples,
        n=first.n + second.n,
        rows=first.rows + second.rows,
        bad=first.bad + second.bad,
    )


def update(state: Examples, stats: Stats, hyper: Hyper) -> Examples:
    """Newest examples in front, untouched where the Stats are not usable; ValueError when they do not fit."""
    xp = namespace(state.a)
    count = stats.a.shape[1]
    capacity = state.a.shape[1]
    if count > capacity:
        raise ValueError(f"a batch has {count} rows and there is room for {capacity}: raise rows (or Block.rows)")
    ok = factors.counts(stats.bad == 0, stats.rows, stats.n)
    decay = scalar(hyper.decay, state.weight)
    ones = xp.ones(stats.number.shape, dtype=state.a.dtype, device=device_of(state.a))
    # Stats on their way may have been cast, whole numbers too, to the dtype of the state
    older = _older(state, capacity - count, xp.astype(stats.examples, xp.int32), decay)

    def joined(new: Array, kept: Array, before: Array) -> Array:
        return select(ok, xp.concat([new, kept], axis=1), before)

    return Examples(
        a=joined(stats.a, older.a, state.a),
        g=joined(stats.g, older.g, state.g),
        share=joined(ones * ((1 - decay) / factors.positive(stats.n))[:, None], older.share, state.share),
        mass=joined(ones * ((1 - decay) / count), older.mass, state.mass),
        number=joined(xp.astype(stats.number, xp.int32), older.number, state.number),
        weight=xp.where(ok, decay * state.weight + (1 - decay), state.weight),
    )


def _older(state: Examples, room: int, arriving: Array, decay: Array | float) -> Examples:
    """The first `room` rows, decayed and numbered behind the `arriving` (blocks,) new examples; an example of which a
    row no longer fits has share and mass 0 there."""
    xp = namespace(state.a)
    number = state.number + arriving[:, None]
    number = xp.where(state.share > 0, number, xp.zeros_like(number))  # empty rows keep number 0
    stays = xp.astype(_whole(number, state.share, room), state.a.dtype) * decay
    return Examples(
        a=state.a[:, :room, :],
        g=state.g[:, :room, :],
        share=state.share[:, :room] * stays,
        mass=state.mass[:, :room] * stays,
        number=number[:, :room],
        weight=state.weight,
    )


def _whole(number: Array, share: Array, room: int) -> Array:
    """Which of the first `room` rows are of an example all of whose rows are among them, (blocks, room).

    Rows of an example lie side by side, so only the example of the first row behind can be cut.
    """
    if not 0 < room < number.shape[1]:
        xp = namespace(number)
        return xp.ones(number[:, :room].shape, dtype=xp.bool, device=device_of(number))
    behind = slice(room, room + 1)
    return (number[:, :room] != number[:, behind]) | (share[:, behind] == 0)
