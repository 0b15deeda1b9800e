"""Functions from record to record: how shared positions become rows, and how two batches become one.

Source: Eschenhagen et al. 2023 (2311.00636) for expand and reduce.
"""

from __future__ import annotations

from kfaccore.record import Record
from kfaccore.xp.arrays import Array, namespace


def _fold(x: Array) -> Array:
    return namespace(x).reshape(x, (*x.shape[:-3], x.shape[-3] * x.shape[-2], 1, x.shape[-1]))


def _full_mask(record: Record) -> Array:
    xp = namespace(record.g)
    return xp.ones((record.batch, record.shared), dtype=xp.bool) if record.mask is None else record.mask
