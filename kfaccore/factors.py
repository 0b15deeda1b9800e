"""Kronecker factors: sums over a record, and their moving averages.

A = mean over valid rows of a a^T, G = (1/n) sum over rows of g g^T, after the method's sharing (expand or reduce).
Source: Martens & Grosse 2015 (1503.05671); Eschenhagen et al. 2023 (2311.00636) for shared weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import numpy as np

from kfaccore import xp as kernels
from kfaccore.linalg import side
from kfaccore.linalg.grams import gram_of_gradients, gram_of_inputs, valid_rows
from kfaccore.record import Record
from kfaccore.record.sharing import expand
from kfaccore.xp.arrays import Array, device_of, namespace, place, scalar
from kfaccore.xp.codes import Code

if TYPE_CHECKING:
    from kfaccore.method import Block, Hyper

SHARINGS = "kf.expand, kf.reduce or a function from record to record"


class Sides(Protocol):
    """What has factors A and G, of which either may be diagonal."""

    @property
    def A(self) -> Array: ...

    @property
    def G(self) -> Array: ...


class Averages(Sides, Protocol):
    """A state, or a part of one, with averages A and G times their `weight` (blocks,)."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def weight(self) -> Array: ...


S = TypeVar("S", bound=Averages)
N = TypeVar("N", bound=float | Array)


@dataclass(frozen=True)
class Stats:
    """Sums of one record: A over `rows` rows, G with its normaliser n; `bad` counts non-finite records."""

    SYMMETRIC: ClassVar = ("A", "G")
    A: Array
    rows: Array
    G: Array
    n: Array
    bad: Array

    @property
    def seen(self) -> Array:
        """How many rows there were, (blocks,)."""
        return self.rows


class Counted(Sides, Protocol):
    """Sums A over `rows` and G over `n`, of `seen` rows; `bad` counts non-finite records. All of them (blocks, ...)."""

    @property
    def rows(self) -> Array: ...

    @property
    def n(self) -> Array: ...

    @property
    def bad(self) -> Array: ...

    @property
    def seen(self) -> Array: ...


@dataclass(frozen=True)
class Sums:
    """Sums of one record: A over `rows` rows, G with its normaliser n, numbers where they are known on the host, so
    that a layer costs two products; what is not finite is looked for once, when it is asked for."""

    SYMMETRIC: ClassVar = ("A", "G")
    A: Array
    rows: float | Array
    G: Array
    n: float | Array

    @cached_property
    def finite(self) -> Array:
        """Whether the means of a block are finite, (blocks,)."""
        return finite_means(self.A, self.rows, self.G, self.n)

    @property
    def bad(self) -> Array:
        """Which blocks have a record that is not finite, (blocks,) bool."""
        return ~self.finite


def init(block: Block, like: Array) -> dict[str, Array]:
    """The fields every state with factors starts from: zero averages of weight zero, code IDENTITY."""
    return {
        "A": side.zeros(block.blocks, block.d_in, block.diagonal_in, like),
        "G": side.zeros(block.blocks, block.d_out, block.diagonal_out, like),
        "weight": namespace(like).zeros((block.blocks,), **place(like)),
        "code": unrefreshed(block, like),
    }


def unrefreshed(block: Block, like: Array) -> Array:
    """Code IDENTITY for every block."""
    xp = namespace(like)
    return xp.full((block.blocks,), int(Code.IDENTITY), dtype=xp.int32, device=device_of(like))


def measure(record: Record, sharing: Callable[[Record], Record], like: Sides | None = None) -> Stats:
    """Stats of one record, diagonal where the factors of `like` are; zero draws give G = I by definition."""
    found = sums(record, sharing, like)
    bad = namespace(found.G).astype(found.bad, found.G.dtype)
    return Stats(found.A, per_block(found.rows, bad), found.G, per_block(found.n, bad), bad)


def unmoved(state: Averages, record: Record) -> Stats:
    """Stats of one record whose means are the state's own A and G."""
    A, G = means(state)
    weight = state.weight
    rows = per_block(_many(record), weight)
    n = per_block(record.n, weight)
    return Stats(_times(A, rows), rows, _times(G, n), n, namespace(weight).zeros_like(weight))


def sums(record: Record, sharing: Callable[[Record], Record], like: Sides | None = None) -> Sums:
    """As `measure`, without anything that can wait until layers stand side by side."""
    record = record if sharing is expand else sharing(record)  # sums over all positions need no rows of them
    A = gram_of_inputs(record, like is not None and side.is_diagonal(like.A))
    G = gram_of_gradients(record, like is not None and side.is_diagonal(like.G))
    rows = _many(record)
    xp = namespace(G)
    n = record.n
    if not isinstance(n, int | float):  # one a block, as layers of a stack are joined by blocks
        n = xp.broadcast_to(xp.reshape(scalar(n, G), (1,)), (record.blocks,))
    return Sums(A, rows, G, n)


def _many(record: Record) -> float | Array:
    """Its valid rows, on the host where they can be known there."""
    return float(record.batch * record.shared) if record.mask is None else valid_rows(record)


def not_finite(A: Array, rows: float | Array, G: Array, n: float | Array) -> Array:
    """1 for each block with a mean that is not finite, (blocks,)."""
    return namespace(G).astype(~finite_means(A, rows, G, n), G.dtype)


def finite_means(A: Array, rows: float | Array, G: Array, n: float | Array) -> Array:
    """Whether the means of two grams, which are what will be stored, are finite, (blocks,): a bad row shows on a gram's
    diagonal, whose entries are squares, so that nothing cancels."""
    with np.errstate(over="ignore", invalid="ignore"):
        traces = side.trace(A) / positive(rows) + side.trace(G) / positive(n)
        return traces - traces == 0


def needs_draws(record: Record) -> None:
    """ValueError for a record of zero draws."""
    if record.draws == 0:
        raise ValueError("a record of zero draws (forward only) came: this method needs per-example gradients")


def update(state: S, stats: Counted | Sums, hyper: Hyper, donate: bool = False) -> S:
    """`state` with A, G and weight moved towards the record's means; untouched where the Stats are not usable."""
    xp = namespace(state.weight)
    ok = usable(stats)
    decay = scalar(hyper.decay, state.weight)
    return replace(
        state,
        A=kernels.average(state.A, stats.A, decay, (1 - decay) / positive(stats.rows), ok, donate),
        G=kernels.average(state.G, stats.G, decay, (1 - decay) / positive(stats.n), ok, donate),
        weight=xp.where(ok, decay * state.weight + (1 - decay), state.weight),
    )


def usable(stats: Counted | Sums) -> Array:
    """Where there is something to average, (blocks,)."""
    if isinstance(stats, Sums):
        return counts(stats.finite, stats.rows, stats.n)
    return counts(stats.bad == 0, stats.seen, stats.n)


def counts(fine: Array, rows: float | Array, n: float | Array) -> Array:
    """Where statistics are `fine`, of at least one row, and of a loss in which something counts: n is 0 where the host
    does not know that all labels are ignored."""
    for count in (rows, n):
        fine = fine if isinstance(count, int | float) else fine & (count > 0)
    return fine


def moved(
    average: Array, weight: Array, total: Array, n: Array, ok: Array, hyper: Hyper, donate: bool
) -> tuple[Array, Array]:
    """(average, weight) of one quantity moved towards total / n where `ok`, for states with a single average."""
    decay = scalar(hyper.decay, weight)
    average = kernels.average(average, total, decay, (1 - decay) / positive(n), ok, donate)
    return average, namespace(weight).where(ok, decay * weight + (1 - decay), weight)


def mean(average: Array, weight: Array) -> Array:
    """A zero-started average divided by its weight (1 where nothing was averaged yet)."""
    return _over(average, positive(weight))


def means(state: Averages) -> tuple[Array, Array]:
    """(A, G) of a state, divided by their weight."""
    divisor = positive(state.weight)
    return _over(state.A, divisor), _over(state.G, divisor)


def _over(average: Array, divisor: Array) -> Array:
    return average / _beside(divisor, average)


def _times(mean: Array, count: Array) -> Array:
    return mean * _beside(count, mean)


def _beside(numbers: Array, x: Array) -> Array:
    """(blocks,) with as many axes as x."""
    return namespace(x).reshape(numbers, (-1, *(1,) * (x.ndim - 1)))


def per_block(value: float | Array, like: Array) -> Array:
    """A number as (blocks,) of the dtype of `like` (blocks,)."""
    return namespace(like).zeros_like(like) + scalar(value, like)


def positive(count: N) -> N:
    """A denominator that can be divided by: 1 where nothing was counted; what is no number stays none."""
    if isinstance(count, int | float):
        return count
    xp = namespace(count)
    return xp.where(count == 0, xp.ones_like(count), count)
