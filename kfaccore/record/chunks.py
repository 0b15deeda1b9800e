"""A record a few examples at a time: how many are held at once, and their inputs.

Patches are unfolded one chunk at a time, so that memory is bounded whatever the batch.
"""

from __future__ import annotations

from collections.abc import Iterator

from kfaccore.convolution.patches import Patches
from kfaccore.record.record import Record
from kfaccore.xp.arrays import Array

_CHUNK = 1 << 22  # elements of per-example arrays held at once


def chunk(elements: int) -> int:
    """How many examples of so many elements each are held at once."""
    return max(1, _CHUNK // elements)


def input_chunks(record: Record, many: int | None = None) -> Iterator[tuple[int, Array]]:
    """(first example, a of the next `many` examples), unfolding patches only one chunk at a time.

    By default all of them, or of patches as many as `chunk` allows.
    """
    if many is None:
        unfolded = record.shared * record.d_in * record.blocks
        many = chunk(unfolded) if isinstance(record.a, Patches) else record.batch
    if isinstance(record.a, Patches) and record.mask is None:
        start = 0
        for a in record.a.rows(many):
            yield start, a
            start += a.shape[1]
        return
    rows = record.rows()
    for start in range(0, record.batch, many):
        yield start, rows[:, start : min(start + many, record.batch), ...]
