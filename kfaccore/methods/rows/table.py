"""A table of means (blocks, size), filled and read by index.

Source: ours.
Cost: reading the entries read, adding a few passes over the table.
"""

from __future__ import annotations

from dataclasses import dataclass

from kfaccore import xp as kernels
from kfaccore.xp.arrays import Array, device_of, namespace, place


@dataclass(frozen=True)
class Table:
    """value and count (blocks, size): means of what was added to each entry, and of how many; an entry without any
    has the mean of all the others, 1 in an empty table."""

    value: Array
    count: Array


def empty(blocks: int, size: int, like: Array) -> Table:
    """No entries."""
    count = namespace(like).zeros((blocks, size), **place(like))
    return Table(namespace(like).ones_like(count), count)


def added(table: Table, index: Array, values: Array, ok: Array, clear: bool | Array) -> Table:
    """values (blocks, units) joined to the entries at index (units,) in blocks that are `ok`; after emptying the
    table where `clear`. A negative index is nobody's: nothing is added."""
    xp = namespace(values)
    one = xp.where(index >= 0, xp.ones_like(values), xp.zeros_like(values))
    values = xp.where(index >= 0, values, xp.zeros_like(values))
    index = xp.maximum(index, xp.zeros_like(index))
    size = table.count.shape[1]
    kept = table.count * xp.astype(
        ~xp.asarray(clear, device=device_of(values)), values.dtype
    )  # clear may be traced: no `if`
    total = table.value * kept + kernels.segment_sum(values.mT, index, size).mT
    count = kept + kernels.segment_sum(one.mT, index, size).mT
    mean = xp.sum(total, axis=-1, keepdims=True) / xp.sum(count, axis=-1, keepdims=True)
    value = xp.where(count > 0, total / xp.where(count > 0, count, xp.ones_like(count)), mean)
    return Table(xp.where(ok[:, None], value, table.value), xp.where(ok[:, None], count, table.count))


def read(table: Table, index: Array) -> Array:
    """Values (blocks, units) at index (units,); NaN at a negative one, which is nobody's."""
    xp = namespace(table.value)
    found = xp.take(table.value, xp.maximum(index, xp.zeros_like(index)), axis=1)
    return xp.where(index >= 0, found, xp.zeros_like(found) + float("nan"))
