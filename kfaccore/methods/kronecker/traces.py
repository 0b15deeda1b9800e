"""Partial traces of the Fisher, which TKFAC's factors and TEKFAC's basis are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import ClassVar

from kfaccore import factors
from kfaccore import xp as kernels
from kfaccore.linalg import side
from kfaccore.linalg.grams import rows_of, valid_rows
from kfaccore.record import Ids, Record
from kfaccore.record.chunks import input_chunks
from kfaccore.xp.arrays import Array, namespace


@dataclass(frozen=True)
class Traces:
    """Partial traces, both over n, of `seen` rows; `bad` counts non-finite records."""

    SYMMETRIC: ClassVar = ("A", "G")
    A: Array
    G: Array
    n: Array
    bad: Array
    seen: Array

    @property
    def rows(self) -> Array:
        """What A is divided by: n as well, so that a share of n reaches both."""
        return self.n


def partial_traces(record: Record, sharing: Callable[[Record], Record], like: factors.Sides | None = None) -> Traces:
    """Sums over rows of |g|^2 a a^T in A and |a|^2 g g^T in G, both over n; each has the trace sum |a|^2 |g|^2.

    Diagonal where the factors of `like` are.
    """
    record = sharing(record)
    factors.needs_draws(record)
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
    n = factors.per_block(record.n, seen)
    return Traces(A, G, n, factors.not_finite(A, n, G, n), seen)


def _weighted_rows(record: Record, weight: Array, start: int, a: Array) -> tuple[Array, Array]:
    """|g| a and |a| g of the examples from `start` on, as rows; weight |g|^2 (blocks, batch, shared)."""
    xp = namespace(a)
    span = slice(start, start + a.shape[1])
    norm = xp.sqrt(xp.vecdot(a, a))[..., None]
    scaled = xp.sqrt(weight[:, span, :])[..., None] * a
    return rows_of(scaled[None, ...]), rows_of(record.g[:, :, span, ...] * norm)
