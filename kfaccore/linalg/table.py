"""A table of means (blocks, size): sums and counts, filled and read by index.

Source: ours.
Cost: two passes over the entries touched.
"""

from __future__ import annotations

from dataclasses import dataclass

import array_api_compat as aac

from kfaccore import xp as kernels
from kfaccore.xp.arrays import Array, namespace


@dataclass(frozen=True)
class Table:
    """total and count (blocks, size); an entry's value is their ratio."""

    total: Array
    count: Array


def empty(blocks: int, size: int, like: Array) -> Table:
    """No entries."""
    total = namespace(like).zeros((blocks, size), dtype=like.dtype, device=aac.device(like))
    return Table(total, namespace(like).zeros_like(total))


def added(table: Table, index: Array, values: Array, ok: Array, clear: bool | Array) -> Table:
    """values (blocks, units) joined to the entries at index (units,) in blocks that are `ok`; after emptying the
    table where `clear`."""
    xp = namespace(values)
    size = table.total.shape[1]
    keep = xp.astype(xp.asarray(~xp.asarray(clear)), values.dtype)
    ok = ok[:, None]
    total, count = (
        kernels.segment_sum(xp.where(ok, x, xp.zeros_like(x)).mT, index, size).mT
        for x in (values, xp.ones_like(values))
    )
    return Table(*(xp.where(ok, old * keep + new, old) for old, new in ((table.total, total), (table.count, count))))


def read(table: Table, index: Array) -> Array:
    """Values (blocks, units) at index (units,); where an entry is empty the mean of the others, 1 if all are."""
    xp = namespace(table.total)
    n = xp.sum(table.count, axis=-1, keepdims=True)
    mean = xp.sum(table.total, axis=-1, keepdims=True) / xp.where(n > 0, n, xp.ones_like(n))
    mean = xp.where(n > 0, mean, xp.ones_like(mean))
    total, count = (xp.take(x, index, axis=1) for x in (table.total, table.count))
    return xp.where(count > 0, total / xp.where(count > 0, count, xp.ones_like(count)), mean)
