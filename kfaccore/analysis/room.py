"""Whether layers may be measured beside each other: one thread does for each, and there is memory for all."""

from __future__ import annotations

from collections.abc import Iterable

from kfaccore.analysis.price import price
from kfaccore.analysis.target import PROBES, Limits
from kfaccore.analysis.threads import one_thread
from kfaccore.method import Method
from kfaccore.record import Record

_DIRECTIONS = 12  # arrays of the size of the weight, beside the images of probes
_COPIES = 4  # of the record's rows: as they came, in float64, and chunks of both


def narrow(record: Record, methods: Iterable[Method], limits: Limits, beside: int) -> bool:
    """Whether `beside` such layers fit within the memory that one may take, whatever is measured on them.

    What a layer takes is then far from its limits, so that its figures are the same alone and beside others.
    """
    return one_thread(record) and _held(record, limits) + _fit(record, methods) <= limits.room // beside


def _held(record: Record, limits: Limits) -> int:
    """Bytes of the exact block, of directions and images, and of the record."""
    size = record.blocks * record.d_out * record.d_in
    rows = min(record.draws * record.batch, limits.rows_of(record))
    positions = record.blocks * record.batch * record.shared
    numbers = positions * (record.draws * record.d_out + record.d_in)
    J = min(rows * size, limits.room // 128)
    return 8 * (3 * (record.blocks + 1) * rows**2 + J + (_DIRECTIONS + PROBES) * size + _COPIES * numbers)


def _fit(record: Record, methods: Iterable[Method]) -> int:
    """Bytes of the largest method, of those that take such a layer at all."""
    largest = 0
    for method in methods:
        try:
            largest = max(largest, price(method, record).fit)
        except (ValueError, TypeError):
            continue
    return largest
