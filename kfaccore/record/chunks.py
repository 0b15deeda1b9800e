"""A record a few examples at a time.

Patches are unfolded one chunk at a time, so that memory is bounded whatever the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any

from kfaccore import xp as kernels
from kfaccore.convolution.patches import Patches
from kfaccore.record.ids import Ids
from kfaccore.record.record import Record
from kfaccore.xp import traced
from kfaccore.xp.arrays import Array, is_tracer, namespace


def input_chunks(record: Record, many: int | None = None) -> Iterator[tuple[int, Array]]:
    """(first example, a of the next `many` examples), unfolding patches only one chunk at a time.

    By default all of them, or of patches as many as may be held at once.
    """
    if isinstance(record.a, Patches):
        start = 0
        for a in record.a.rows(_held(record) if many is None else many):
            span = slice(start, start + a.shape[1])
            yield start, _present(a, None if record.mask is None else record.mask[None, span, ...])
            start = span.stop
        return
    rows = record.rows()
    for span in kernels.spans(record.batch, record.batch if many is None else many):
        yield span.start, rows[:, span, ...]


def joined(record: Record, of: Callable[[Array], Array]) -> Array:
    """`of` the rows (blocks, examples, shared, d_in) of as many examples as `input_chunks` takes, joined along them."""
    xp = namespace(record.g)
    if _loops(record):
        return xp.concat(_in_turns(record, (), traced.joined_turns, of), axis=1)
    found = [of(a) for _, a in input_chunks(record)]
    return found[0] if len(found) == 1 else xp.concat(found, axis=1)


def summed(record: Record, g: Array, of: Callable[[Array, Array], Array]) -> Array:
    """The sum of `of` these rows and the same examples of g (blocks, batch, ...)."""
    if _loops(record):
        return reduce(add, _in_turns(record, (g,), traced.in_turns, of))
    return reduce(add, (of(a, g[:, start : start + a.shape[1], ...]) for start, a in input_chunks(record)))


def _loops(record: Record) -> bool:
    """Whether a compiled program takes several chunks of patches: in one body, as each would be compiled anew."""
    return isinstance(record.a, Patches) and is_tracer(record.g) and _held(record) < record.batch


def _in_turns(record: Record, beside: tuple[Array, ...], turns: Callable[..., Array], of: Callable[..., Array]) -> list:
    """What `turns` makes of whole chunks, and `of` what is left over."""
    many = _held(record)
    whole = record.batch // many
    masks = () if record.mask is None else (record.mask[None, ...],)
    arrays = (record.a.image, *beside, *masks)

    def piece(image: Array, *others: Array) -> Array:
        a = replace(record.a, image=image).unfold()
        return of(_present(a, others[-1] if masks else None), *others[: len(beside)])

    found = [turns(arrays, many, whole, piece)]
    rest = [x[:, whole * many :, ...] for x in arrays]
    return [*found, piece(*rest)] if rest[0].shape[1] else found


def _held(record: Record) -> int:
    """How many examples of patches may be unfolded at once."""
    return kernels.at_once(record.shared * record.d_in * record.blocks)


def _present(a: Array, mask: Array | None) -> Array:
    """Rows, zero where a mask (1, examples, shared) says that there is nothing."""
    return a if mask is None else namespace(a).where(mask[..., None], a, namespace(a).zeros_like(a))


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
