"""Functions from record to record: how shared positions become rows, and how two batches become one.

Source: Eschenhagen et al. 2023 (2311.00636) for expand and reduce.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import numpy as np

from kfaccore.convolution.patches import Patches
from kfaccore.record.ids import Ids
from kfaccore.record.record import Record
from kfaccore.xp.arrays import Array, device_of, namespace
from kfaccore.xp.memory import shared_first

Records = TypeVar("Records", Record, tuple[Record, ...])  # one a term of the loss


def whole(record: Record) -> Record:
    """The record itself: an example is all of its positions."""
    return record


def expand(record: Record) -> Record:
    """Each shared position becomes an example; n is kept. Exact when the shared axis survives to the loss.

    Patches stay folded in their image: every factor of expand is a sum over all positions anyway.
    """
    if record.shared == 1 or isinstance(record.a, Patches):
        return record
    xp = namespace(record.g)
    rows = record.batch * record.shared
    a = record.a
    plain = record.mask is None and record.ids is None
    if plain and shared_first(a) and shared_first(record.g):
        # rows in the order of memory: no copy
        return Record(_fold(xp.moveaxis(a, -2, -3)), _fold(xp.moveaxis(record.g, -2, -3)), record.n)
    a = Ids(xp.reshape(a.index, (rows,)), a.size) if isinstance(a, Ids) else _fold(a)
    mask = None if record.mask is None else xp.reshape(record.mask, (rows, 1))
    ids = None if record.ids is None else xp.repeat(record.ids, record.shared)
    return Record(a, _fold(record.g), record.n, mask, ids)


def reduce(record: Record) -> Record:
    """Mean of `a` over an example's valid positions, SUM of `g`: exact when the model averages or sums the axis.

    Not for the keys of attention, alone or in a packed projection: softmax does not see a shift common to all keys, so
    their `g` sums to zero, G has no curvature there, and the direction is the gradient over the damping.
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


def mean_mean(record: Record) -> Record:
    """Mean over an example's valid positions of `a` AND of `g`: reduce with G divided by the squared position count."""
    counts = _counts(record)
    record = reduce(record)
    return replace(record, g=record.g / counts)


def sum_sum(record: Record) -> Record:
    """Sum over an example's positions of `a` AND of `g`: reduce with A times the squared position count."""
    counts = _counts(record)
    record = reduce(record)
    return replace(record, a=record.a * counts[0, ...])


@dataclass(frozen=True)
class Subsample:
    """expand on `count` of the shared positions, the same for a and g and for the whole batch.

    positions   which ones; () takes `count` of them: evenly spaced, or drawn without replacement from `seed`
    A stays the mean over its rows and g is scaled by sqrt(shared / kept), so that over a random choice both factors
    have those of expand as their mean; with all positions they are expand's. Takes arrays and Patches.
    Source: Tang et al. 2021 (CVPR, SKFAC), spatial subsampling; its exact rule is not known to us.
    """

    count: int = 0
    seed: int | None = None
    positions: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if (self.count < 1) == (not self.positions):
            raise ValueError(f"{self}: need count >= 1 or positions, not both")

    def chosen(self, shared: int) -> tuple[int, ...]:
        """Positions kept of `shared`; ValueError when they do not exist."""
        if self.positions:
            found = self.positions
        elif self.seed is None or self.count >= shared:
            kept = min(self.count, shared)
            found = tuple(i * shared // kept for i in range(kept))
        else:
            drawn = np.random.default_rng(self.seed).choice(shared, self.count, replace=False)
            found = tuple(sorted(drawn.tolist()))
        if not all(0 <= i < shared for i in found):
            raise ValueError(f"{self}: there are only {shared} shared positions")
        return found

    def __call__(self, record: Record) -> Record:
        if isinstance(record.a, Ids):
            raise TypeError("Subsample got an embedding (Ids): its A is diagonal for any number of rows; use expand")
        chosen = self.chosen(record.shared)
        xp = namespace(record.g)
        index = xp.asarray(list(chosen), device=device_of(record.g))
        if isinstance(record.a, Patches):
            a = xp.concat([xp.take(part, index, axis=2) for part in record.a.rows(8)], axis=1)
        else:
            a = xp.take(record.a, index, axis=2)
        mask = None if record.mask is None else xp.take(record.mask, index, axis=1)
        g = xp.take(record.g, index, axis=3) * (record.shared / len(chosen)) ** 0.5
        return expand(Record(a, g, record.n, mask, record.ids))


@dataclass(frozen=True)
class ReceptiveMean:
    """A of a convolution from the mean over each patch: A = I_K (x) A_c, with a lone 1 for the bias.

    positions   K, kernel positions; columns are (kernel position, channel), then the bias
    bias        whether the last column is one
    first       spatial reduction before it: reduce | mean_mean | sum_sum | expand
    A_c is the mean of the outer products of patch means (channels); G is that of `first`. Each row becomes K rows, the
    mean in one kernel position each, and one for the bias, scaled so that means and sums come out.
    Source: Tang et al. 2021 (CVPR, SKFAC) names the reduction; its exact form is not known to us.
    """

    positions: int
    bias: bool = True
    first: Callable[[Record], Record] = reduce

    def __call__(self, record: Record) -> Record:
        channels, left = divmod(record.d_in - self.bias, self.positions)
        if self.positions < 1 or left or isinstance(record.a, Ids):
            raise ValueError(f"{self}: {record.d_in} columns are not {self.positions} positions of equal channels")
        record = self.first(record)
        xp = namespace(record.g)
        K = self.positions
        a = record.rows()
        rows = K + self.bias
        mean = xp.mean(xp.reshape(a[..., : K * channels], (*a.shape[:-1], K, channels)), axis=-2)
        eye = xp.eye(K, dtype=a.dtype, device=device_of(a))
        slots = xp.reshape(eye[:, :, None] * mean[..., None, None, :], (*a.shape[:-1], K, K * channels))
        if self.bias:
            lone = xp.zeros_like(slots[..., :1, :])
            slots = xp.concat([slots, lone], axis=-2)
            place = xp.arange(rows, device=device_of(a)) == K
            column = a[..., -1:, None] * xp.astype(place, a.dtype)[:, None]
            slots = xp.concat([slots, column], axis=-1)
        a = xp.reshape(slots * rows**0.5, (a.shape[0], -1, 1, record.d_in))
        g = xp.repeat(record.g, rows, axis=3) * rows**-0.5
        g = xp.reshape(g, (*g.shape[:2], g.shape[2] * g.shape[3], 1, record.d_out))
        mask = None if record.mask is None else xp.reshape(xp.repeat(record.mask, rows, axis=1), (-1, 1))
        return Record(a, g, record.n, mask)


def concat(first: Records, second: Records) -> Records:
    """Two records of one layer as one: batches joined, shares of the normaliser added; tuples term by term.

    Raises ValueError when they differ in kind, draws, blocks, shared or dimensions.
    """
    if isinstance(first, tuple) and isinstance(second, tuple):
        return cast("Records", tuple(_joined(*pair) for pair in zip(first, second, strict=True)))
    if isinstance(first, tuple) or isinstance(second, tuple):
        raise TypeError("concat: one is a tuple of records, one a term of the loss, and the other is not")
    return cast("Records", _joined(first, second))


def _joined(first: Record, second: Record) -> Record:
    for name in ("draws", "blocks", "shared", "d_out", "d_in"):
        left = getattr(first, name)
        right = getattr(second, name)
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


def _counts(record: Record) -> Array:
    """Valid positions of each example, (1, 1, batch, 1, 1); 1 where there are none."""
    xp = namespace(record.g)
    if record.mask is None:
        shape = (1, 1, record.batch, 1, 1)  # not cut out of g, which may have no draws
        return xp.full(shape, float(record.shared), dtype=record.g.dtype, device=device_of(record.g))
    count = xp.sum(xp.astype(record.mask, record.g.dtype), axis=-1)
    return xp.where(count > 0, count, xp.ones_like(count))[None, None, :, None, None]


def _fold(x: Array) -> Array:
    return namespace(x).reshape(x, (*x.shape[:-3], x.shape[-3] * x.shape[-2], 1, x.shape[-1]))


def _full_mask(record: Record) -> Array:
    if record.mask is not None:
        return record.mask
    xp = namespace(record.g)
    return xp.ones((record.batch, record.shared), dtype=xp.bool, device=device_of(record.g))
