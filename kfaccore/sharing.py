"""Functions from record to record: how shared positions become rows, and how two batches become one.

Source: Eschenhagen et al. 2023 (2311.00636) for expand and reduce.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kfaccore.linalg.patches import Patches
from kfaccore.record import Ids, Record
from kfaccore.xp.arrays import Array, namespace, shared_first


def expand(record: Record) -> Record:
    """Each shared position becomes an example; n is kept. Exact when the shared axis survives to the loss.

    Patches stay folded in their image: every factor of expand is a sum over all positions anyway.
    """
    if record.shared == 1 or isinstance(record.a, Patches):
        return record
    xp = namespace(record.g)
    rows = record.batch * record.shared
    a = record.a
    if (
        record.mask is None
        and record.ids is None
        and not isinstance(a, Ids)
        and shared_first(a)
        and shared_first(record.g)
    ):
        swapped = (xp.moveaxis(x, -2, -3) for x in (a, record.g))  # rows in the order of memory: no copy
        return Record(*(_fold(x) for x in swapped), record.n)
    a = Ids(xp.reshape(a.index, (rows,)), a.size) if isinstance(a, Ids) else _fold(a)
    mask = None if record.mask is None else xp.reshape(record.mask, (rows, 1))
    ids = None if record.ids is None else xp.repeat(record.ids, record.shared)
    return Record(a, _fold(record.g), record.n, mask, ids)


def reduce(record: Record) -> Record:
    """Mean of `a` over an example's valid positions, SUM of `g`: exact when the model averages or sums the axis.

    Raises TypeError for Ids: the mean of one-hot rows is dense.
    """
    if isinstance(record.a, Ids):
        raise TypeError("reduce got an embedding (Ids): the mean of one-hot rows is dense; use expand")
    if record.shared == 1 and not isinstance(record.a, Patches):
        return record
    xp = namespace(record.g)
    g = xp.sum(record.g, axis=-2, keepdims=True)
    if record.mask is None:
        a = record.a.mean() if isinstance(record.a, Patches) else xp.mean(record.a, axis=-2, keepdims=True)
        return replace(record, a=a, g=g)
    count = xp.sum(xp.astype(record.mask, g.dtype), axis=-1)
    a = xp.sum(record.rows(), axis=-2, keepdims=True) / xp.where(count > 0, count, xp.ones_like(count))[:, None, None]
    return Record(a, g, record.n, (count > 0)[:, None], record.ids)


def concat(first: Any, second: Any) -> Any:
    """Two records of one layer as one: batches joined, shares of the normaliser added; tuples term by term.

    Raises ValueError when they differ in kind, draws, blocks, shared or dimensions.
    """
    if isinstance(first, tuple):
        return tuple(concat(*pair) for pair in zip(first, second, strict=True))
    for name in ("draws", "blocks", "shared", "d_out", "d_in"):
        left, right = getattr(first, name), getattr(second, name)
        if left != right:
            raise ValueError(f"concat: {name} is {left} in the first record and {right} in the second; need equal")
    if type(first.a) is not type(second.a):
        raise TypeError(f"concat: a is {type(first.a).__name__} and {type(second.a).__name__}; need one kind")
    xp = namespace(first.g, second.g)
    a: Any
    if isinstance(first.a, Ids):
        a = Ids(xp.concat([first.a.index, second.a.index]), first.a.size)
    elif isinstance(first.a, Patches):
        a = first.a.concat(second.a)
    else:
        a = xp.concat([first.a, second.a], axis=1)
    mask = ids = None
    if first.mask is not None or second.mask is not None:
        mask = xp.concat([_full_mask(first), _full_mask(second)])
    if first.ids is not None and second.ids is not None:
        ids = xp.concat([first.ids, second.ids])
    return Record(a, xp.concat([first.g, second.g], axis=2), first.n + second.n, mask, ids)


def _fold(x: Array) -> Array:
    return namespace(x).reshape(x, (*x.shape[:-3], x.shape[-3] * x.shape[-2], 1, x.shape[-1]))


def _full_mask(record: Record) -> Array:
    xp = namespace(record.g)
    return xp.ones((record.batch, record.shared), dtype=xp.bool) if record.mask is None else record.mask
