"""Sums of outer products over the rows of a record: what factors are averages of."""

from __future__ import annotations

from kfaccore import xp as kernels
from kfaccore.convolution.patches import Patches
from kfaccore.linalg import side
from kfaccore.record import Ids, Record
from kfaccore.xp import gpu
from kfaccore.xp.arrays import Array, device_of, namespace, scalar, to_host
from kfaccore.xp.memory import shared_first


def present(record: Record) -> int:
    """Examples that have a position which exists; read on the host where there is a mask."""
    if record.mask is None:
        return record.batch
    return int(to_host(record.mask).any(axis=1).sum())


def valid_rows(record: Record) -> Array:
    """Number of rows that exist, (blocks,)."""
    xp = namespace(record.g)
    zeros = xp.zeros((record.blocks,), dtype=record.g.dtype, device=device_of(record.g))
    if record.mask is None:
        return zeros + float(record.batch * record.shared)
    return zeros + xp.sum(xp.astype(record.mask, record.g.dtype))


def rows_of(x: Array) -> Array:
    """(draws, blocks, batch, shared, d) as (blocks, rows, d), in the order of memory where that saves a copy."""
    xp = namespace(x)
    blocks = x.shape[1]
    x = xp.moveaxis(x, -2, -3) if shared_first(x) else x
    return xp.reshape(xp.permute_dims(x, (1, 0, 2, 3, 4)) if blocks > 1 else x, (blocks, -1, x.shape[-1]))


def gram_of_gradients(record: Record, diagonal: bool = False) -> Array:
    """Sum of g g^T, (blocks, d_out, d_out), or its diagonal (blocks, d_out); n I for zero draws."""
    if record.draws == 0:
        like = side.zeros(record.blocks, record.d_out, diagonal, record.g)
        return side.identity(like) * scalar(record.n, like)
    if not diagonal and gpu.by_image_pays(record.g):
        return gpu.gram_by_image(record.g)
    return side.gram(rows_of(record.g if diagonal else gpu.narrowed(record.g)), diagonal)


def gram_of_inputs(record: Record, diagonal: bool = False) -> Array:
    """Sum of a a^T over valid rows, (blocks, d_in, d_in); the diagonal (blocks, d_in) alone if asked, or for `Ids`."""
    xp = namespace(record.g)
    if isinstance(record.a, Ids):
        ones = xp.ones((*record.a.index.shape, 1), dtype=record.g.dtype, device=device_of(record.g))
        if record.mask is not None:
            ones = xp.where(record.mask[..., None], ones, xp.zeros_like(ones))
        index = xp.reshape(record.a.index, (-1,))
        return kernels.segment_sum(xp.reshape(ones, (-1, 1)), index, record.a.size)[:, 0][None, :]
    if isinstance(record.a, Patches) and diagonal:
        return record.a.gram_diagonal(record.mask)
    if isinstance(record.a, Patches) and record.mask is None:
        return record.a.gram()
    rows = record.rows()
    return side.gram(rows_of((rows if diagonal else gpu.narrowed(rows))[None, ...]), diagonal)
