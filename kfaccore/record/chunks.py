"""A record a few examples at a time.

Patches are unfolded one chunk at a time, so that memory is bounded whatever the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kfaccore import xp as kernels
from kfaccore.convolution.patches import Patches
from kfaccore.record.ids import Ids
from kfaccore.record.record import Record
from kfaccore.xp.arrays import Array


def input_chunks(record: Record, many: int | None = None) -> Iterator[tuple[int, Array]]:
    """(first example, a of the next `many` examples), unfolding patches only one chunk at a time.

    By default all of them, or of patches as many as may be held at once.
    """
    if many is None:
        unfolded = record.shared * record.d_in * record.blocks
        many = kernels.at_once(unfolded) if isinstance(record.a, Patches) else record.batch
    if isinstance(record.a, Patches) and record.mask is None:
        start = 0
        for a in record.a.rows(many):
            yield start, a
            start += a.shape[1]
        return
    rows = record.rows()
    for span in kernels.spans(record.batch, many):
        yield span.start, rows[:, span, ...]


def parts(record: Record, many: int) -> Iterator[Record]:
    """The record `many` examples at a time; n stays that of the whole."""
    if many >= record.batch:
        yield record
        return
    for span in kernels.spans(record.batch, many):
        yield _taken(record, span)


def _taken(record: Record, span: slice) -> Record:
    """The examples of `span`. What a mask hid is zero already, except in an image and under an id."""
    a: Any = record.a
    mask = None
    if isinstance(a, Ids):
        a = Ids(a.index[span, :], a.size)
    elif isinstance(a, Patches):
        a = Patches(a.image[:, span, ...], a.window, a.bias)
        mask = None if record.mask is None else record.mask[span, :]
    else:
        a = a[:, span, :, :]
    return Record(a, record.g[:, :, span, :, :], record.n, mask)
