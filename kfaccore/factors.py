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
from kfaccore.convolution.patches import Patches
from kfaccore.linalg import side
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
        """1 for each block with a record that is not finite, (blocks,)."""
        return namespace(self.G).astype(~self.finite, self.G.dtype)


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


def dense_only(name: str, block: Block) -> str:
    """What a method says that needs dense factors of both sides; "" where it has them."""
    if not (block.diagonal_in or block.diagonal_out):
        return ""
    what = "an embedding, or inputs" if block.diagonal_in else "outputs"
    size = block.d_in if block.diagonal_in else block.d_out
    return (
        f"{name} got {what} too wide for a matrix ({size}, a diagonal side), and both its factors are dense: give this "
        f"layer KFAC, EKFAC or TKFAC, or BrandKFAC for modes alone; a Preconditioner's `widest` says what is too wide"
    )


def measure(record: Record, sharing: Callable[[Record], Record], like: Sides | None = None) -> Stats:
    """Stats of one record, diagonal where the factors of `like` are; zero draws give G = I by definition."""
    found = sums(record, sharing, like)
    rows = found.rows + namespace(found.bad).zeros_like(found.bad)
    return Stats(found.A, rows, found.G, per_block(found.n, found.bad), found.bad)


def sums(record: Record, sharing: Callable[[Record], Record], like: Sides | None = None) -> Sums:
    """As `measure`, without anything that can wait until layers stand side by side."""
    record = sharing(record)
    A = gram_of_inputs(record, like is not None and side.is_diagonal(like.A))
    G = gram_of_gradients(record, like is not None and side.is_diagonal(like.G))
    if record.mask is not None:
        rows = valid_rows(record)
        return Sums(A, rows, G, share(record, rows))
    n = record.n if isinstance(record.n, int | float) else namespace(G).reshape(scalar(record.n, G), (1,))
    return Sums(A, float(record.batch * record.shared), G, n)


def not_finite(A: Array, rows: float | Array, G: Array, n: float | Array) -> Array:
    """1 for each block with a mean that is not finite, (blocks,)."""
    return namespace(G).astype(~finite_means(A, rows, G, n), G.dtype)


def finite_means(A: Array, rows: float | Array, G: Array, n: float | Array) -> Array:
    """Whether the means of two grams, which are what will be stored, are finite, (blocks,): a bad row shows on a gram's
    diagonal, whose entries are squares, so that nothing cancels."""
    with np.errstate(over="ignore", invalid="ignore"):
        xp = namespace(A)
        traces = xp.sum(side.diagonal(A), axis=-1) / positive(rows) + xp.sum(side.diagonal(G), axis=-1) / positive(n)
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
        G = side.gram(_rows(record.g), diagonal_out)
    else:
        rows = (_weighted_rows(record, weight, start, a) for start, a in input_chunks(record))
        parts = [(side.gram(x, diagonal_in), side.gram(y, diagonal_out)) for x, y in rows]
        A = reduce(add, (part[0] for part in parts))
        G = reduce(add, (part[1] for part in parts))
    n = share(record, A[:, 0] if A.ndim == 2 else A[:, 0, 0])
    return Stats(A, n, G, n, not_finite(A, n, G, n))


def _weighted_rows(record: Record, weight: Array, start: int, a: Array) -> tuple[Array, Array]:
    """|g| a and |a| g of the examples from `start` on, as rows; weight |g|^2 (blocks, batch, shared)."""
    xp = namespace(a)
    span = slice(start, start + a.shape[1])
    norm = xp.sqrt(xp.vecdot(a, a))[..., None]
    scaled = xp.sqrt(weight[:, span, :])[..., None] * a
    return _rows(scaled[None, ...]), _rows(record.g[:, :, span, ...] * norm)


def update(state: S, stats: Stats | Sums, hyper: Hyper, donate: bool = False) -> S:
    """`state` with A, G and weight moved towards the record's means; untouched where the Stats are not usable."""
    xp = namespace(state.weight)
    ok = stats.finite if isinstance(stats, Sums) else stats.bad == 0
    if not isinstance(stats.rows, int | float):
        ok = ok & (stats.rows > 0)
    decay = scalar(hyper.decay, state.weight)
    return replace(
        state,
        A=kernels.average(state.A, stats.A, decay, (1 - decay) / positive(stats.rows), ok, donate),
        G=kernels.average(state.G, stats.G, decay, (1 - decay) / positive(stats.n), ok, donate),
        weight=xp.where(ok, decay * state.weight + (1 - decay), state.weight),
    )


def moved(
    average: Array, weight: Array, total: Array, n: Array, ok: Array, hyper: Hyper, donate: bool
) -> tuple[Array, Array]:
    """(average, weight) of one quantity moved towards total / n where `ok` and something was seen, for states with a
    single average."""
    ok = ok & (n > 0)
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


def share(record: Record, like: Array) -> Array:
    """The record's n as (blocks,) of the dtype of `like` (blocks,); 0, a record that adds nothing, where its mask
    leaves no row."""
    n = per_block(record.n, like)
    if record.mask is None:
        return n
    xp = namespace(n)
    return xp.where(xp.any(record.mask), n, xp.zeros_like(n))


def positive(count: N) -> N:
    """A denominator that can be divided by: 1 where nothing was counted."""
    if isinstance(count, int | float):
        return count
    xp = namespace(count)
    return xp.where(count > 0, count, xp.ones_like(count))


def valid_rows(record: Record) -> Array:
    """Number of rows that exist, (blocks,)."""
    xp = namespace(record.g)
    zeros = xp.zeros((record.blocks,), dtype=record.g.dtype, device=device_of(record.g))
    if record.mask is None:
        return zeros + float(record.batch * record.shared)
    return zeros + xp.sum(xp.astype(record.mask, record.g.dtype))


def _rows(x: Array) -> Array:
    """(draws, blocks, batch, shared, d) as (blocks, rows, d)."""
    xp = namespace(x)
    blocks = x.shape[1]
    return xp.reshape(xp.permute_dims(x, (1, 0, 2, 3, 4)) if blocks > 1 else x, (blocks, -1, x.shape[-1]))


def gram_of_gradients(record: Record, diagonal: bool = False) -> Array:
    """Sum of g g^T, (blocks, d_out, d_out), or its diagonal (blocks, d_out); n I for zero draws."""
    if record.draws == 0:
        like = side.zeros(record.blocks, record.d_out, diagonal, record.g)
        return side.identity(like) * scalar(record.n, like)
    return side.gram(_rows(record.g), diagonal)


def gram_of_inputs(record: Record, diagonal: bool = False) -> Array:
    """Sum of a a^T over valid rows, (blocks, d_in, d_in); the diagonal (blocks, d_in) alone if asked, or for `Ids`."""
    xp = namespace(record.g)
    if isinstance(record.a, Ids):
        ones = xp.ones((*record.a.index.shape, 1), dtype=record.g.dtype, device=device_of(record.g))
        if record.mask is not None:
            ones = xp.where(record.mask[..., None], ones, xp.zeros_like(ones))
        index = xp.reshape(record.a.index, (-1,))
        return kernels.segment_sum(xp.reshape(ones, (-1, 1)), index, record.a.size)[:, 0][None, :]
    if isinstance(record.a, Patches) and diagonal:
        return record.a.gram_diagonal(record.mask)
    if isinstance(record.a, Patches) and record.mask is None:
        return record.a.gram()
    return side.gram(xp.reshape(record.rows(), (record.blocks, -1, record.d_in)), diagonal)
