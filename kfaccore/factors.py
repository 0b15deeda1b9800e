"""Kronecker factors: sums over a record, and their moving averages.

A = mean over valid rows of a a^T, G = (1/n) sum over rows of g g^T, after the method's sharing (expand or reduce).
Source: Martens & Grosse 2015 (1503.05671); Eschenhagen et al. 2023 (2311.00636) for shared weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, dataclass, replace
from functools import cached_property, reduce
from operator import add
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import numpy as np

from kfaccore import xp as kernels
from kfaccore.linalg import side
from kfaccore.linalg.grams import gram_of_gradients, gram_of_inputs, rows_of, valid_rows
from kfaccore.record import Ids, Record
from kfaccore.record.chunks import input_chunks
from kfaccore.xp.arrays import Array, device_of, namespace, scalar
from kfaccore.xp.codes import Code

if TYPE_CHECKING:
    from kfaccore.method import Block, Hyper

SHARINGS = "kf.expand, kf.reduce or a function from record to record"


class Averages(Protocol):
    """A state, or a part of one, with averages A and G times their `weight` (blocks,)."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def A(self) -> Array: ...

    @property
    def G(self) -> Array: ...

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


@dataclass(frozen=True)
class Traces(Stats):
    """Partial traces, both over n, with `seen` rows."""

    seen: Array


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
    xp = namespace(like)
    device = device_of(like)
    return {
        "A": side.zeros(block.blocks, block.d_in, block.diagonal_in, like),
        "G": side.zeros(block.blocks, block.d_out, block.diagonal_out, like),
        "weight": xp.zeros((block.blocks,), dtype=like.dtype, device=device),
        "code": unrefreshed(block, like),
    }


def unrefreshed(block: Block, like: Array) -> Array:
    """Code IDENTITY for every block."""
    xp = namespace(like)
    return xp.full((block.blocks,), int(Code.IDENTITY), dtype=xp.int32, device=device_of(like))


class Sides(Protocol):
    """What has factors A and G, of which either may be diagonal."""

    @property
    def A(self) -> Array: ...

    @property
    def G(self) -> Array: ...


def measure(record: Record, sharing: Callable[[Record], Record], like: Sides | None = None) -> Stats:
    """Stats of one record, diagonal where the factors of `like` are; zero draws give G = I by definition."""
    found = sums(record, sharing, like)
    bad = namespace(found.G).astype(found.bad, found.G.dtype)
    return Stats(found.A, per_block(found.rows, bad), found.G, per_block(found.n, bad), bad)


def sums(record: Record, sharing: Callable[[Record], Record], like: Sides | None = None) -> Sums:
    """As `measure`, without anything that can wait until layers stand side by side."""
    record = sharing(record)
    A = gram_of_inputs(record, like is not None and side.is_diagonal(like.A))
    G = gram_of_gradients(record, like is not None and side.is_diagonal(like.G))
    rows = float(record.batch * record.shared) if record.mask is None else valid_rows(record)
    xp = namespace(G)
    n = record.n
    if not isinstance(n, int | float):  # one a block, as layers of a stack are joined by blocks
        n = xp.broadcast_to(xp.reshape(scalar(n, G), (1,)), (record.blocks,))
    return Sums(A, rows, G, n)


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


def partial_traces(record: Record, sharing: Callable[[Record], Record], like: Sides | None = None) -> Stats:
    """Sums over rows of |g|^2 a a^T in A and |a|^2 g g^T in G, both over n; each has the trace sum |a|^2 |g|^2.

    Diagonal where the factors of `like` are.
    """
    record = sharing(record)
    needs_draws(record)
    xp = namespace(record.g)
    diagonal_in = like is not None and side.is_diagonal(like.A)
    diagonal_out = like is not None and side.is_diagonal(like.G)
    weight = xp.sum(xp.vecdot(record.g, record.g), axis=0)
    if isinstance(record.a, Ids):
        A = kernels.segment_sum(xp.reshape(weight, (-1, 1)), xp.reshape(record.a.index, (-1,)), record.a.size)
        A = A[:, 0][None, :]
        G = side.gram(rows_of(record.g), diagonal_out)
    else:
        rows = (_weighted_rows(record, weight, start, a) for start, a in input_chunks(record))
        parts = [(side.gram(x, diagonal_in), side.gram(y, diagonal_out)) for x, y in rows]
        A = reduce(add, (part[0] for part in parts))
        G = reduce(add, (part[1] for part in parts))
    seen = valid_rows(record)
    n = per_block(record.n, seen)
    return Traces(A, n, G, n, not_finite(A, n, G, n), seen)


def _weighted_rows(record: Record, weight: Array, start: int, a: Array) -> tuple[Array, Array]:
    """|g| a and |a| g of the examples from `start` on, as rows; weight |g|^2 (blocks, batch, shared)."""
    xp = namespace(a)
    span = slice(start, start + a.shape[1])
    norm = xp.sqrt(xp.vecdot(a, a))[..., None]
    scaled = xp.sqrt(weight[:, span, :])[..., None] * a
    return rows_of(scaled[None, ...]), rows_of(record.g[:, :, span, ...] * norm)


def update(state: S, stats: Stats | Sums, hyper: Hyper, donate: bool = False) -> S:
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


def usable(stats: Stats | Sums) -> Array:
    """Where there is something to average, (blocks,): finite means of at least one row."""
    ok = stats.finite if isinstance(stats, Sums) else stats.bad == 0
    seen = stats.seen if isinstance(stats, Traces) else stats.rows
    return ok if isinstance(seen, int | float) else ok & (seen > 0)


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
    return average / namespace(average).reshape(divisor, (-1, *(1,) * (average.ndim - 1)))


def per_block(value: float | Array, like: Array) -> Array:
    """A number as (blocks,) of the dtype of `like` (blocks,)."""
    return namespace(like).zeros_like(like) + scalar(value, like)


def positive(count: N) -> N:
    """A denominator that can be divided by: 1 where nothing was counted."""
    if isinstance(count, int | float):
        return count
    xp = namespace(count)
    return xp.where(count > 0, count, xp.ones_like(count))
