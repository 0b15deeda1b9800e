"""Per-example gradients of a record through their inner products: K = U^T U, U^T v and U y, without U.

A unit is one draw of one example, its J summed over shared positions; units are numbered draw by draw. With one
position K = (a a^T) o (g g^T). With more, inner products of all pairs of positions, or J a slice of outputs at a time,
whichever is cheaper; an embedding's a a^T is the equality of its ids.
Source: Ou et al. 2024 (2403.03473) for layers as inner products of rows; the choice of order is ours.
Cost: K units^2 shared^2 (d_in + d_out), or units^2 d_in d_out; the others one weight gradient each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import reduce
from operator import add

from kfaccore import factors
from kfaccore import xp as kernels
from kfaccore.convolution.patches import Patches
from kfaccore.record import Ids, Record
from kfaccore.record.chunks import input_chunks
from kfaccore.record.sharing import expand
from kfaccore.xp.arrays import Array, device_of, namespace
from kfaccore.xp.codes import Code, choose


def gram(record: Record, pairs: bool | None = None) -> Array:
    """K (blocks, units, units); `pairs` overrides the choice."""
    if pairs is None:
        cheaper = record.shared**2 * (record.d_in + record.d_out) < record.d_in * record.d_out
        pairs = record.shared == 1 or cheaper
    if pairs or isinstance(record.a, Ids):
        return _by_pairs(record)
    return _by_slices(record)


def shared(record: Record, sharing: Callable[[Record], Record]) -> Record:
    """The record as `sharing` has it, of rows where `expand` leaves Patches folded: here a unit is a position."""
    record = sharing(record)
    if sharing is not expand or not isinstance(record.a, Patches):
        return record
    return expand(replace(record, a=record.rows()))


def inner(record: Record, v: Array) -> Array:
    """U^T v: <J, v> of each unit, (blocks, units), for v (blocks, d_out, d_in)."""
    xp = namespace(v)
    if isinstance(record.a, Ids):
        columns = xp.take(v[0, ...], xp.reshape(record.a.index, (-1,)), axis=1).mT  # <g e_i^T, v> = <g, column i>
        products = record.g * xp.reshape(columns, (1, 1, record.batch, record.shared, record.d_out))
        return _joined(xp.sum(products, axis=(-2, -1)))
    parts = [xp.sum(xp.matmul(g, v[None, :, None, :, :]) * a[None, ...], axis=(-2, -1)) for a, g in _chunks(record)]
    return _joined(parts[0] if len(parts) == 1 else xp.concat(parts, axis=-1))


def combined(record: Record, y: Array) -> Array:
    """U y: the sum of y J over units, (blocks, d_out, d_in), for y (blocks, units)."""
    xp = namespace(y)
    y = xp.permute_dims(xp.reshape(y, (record.blocks, record.draws, record.batch)), (1, 0, 2))
    weighed = record.g * y[..., None, None]
    if isinstance(record.a, Ids):
        rows = xp.reshape(xp.sum(weighed, axis=0), (-1, record.d_out))
        return kernels.segment_sum(rows, xp.reshape(record.a.index, (-1,)), record.a.size).mT[None, ...]
    summed = xp.sum(weighed, axis=0)[None, ...]  # all draws have the same a: sum them before the product
    return reduce(add, (xp.matmul(_flat(g[0, ...]).mT, _flat(a)) for a, g in _chunks(record, summed)))


def widened(record: Record) -> Record:
    """The record in the widest dtype."""
    xp = namespace(record.g)
    dtype = kernels.widest(record.g)
    if record.g.dtype == dtype:
        return record
    a = record.a
    if isinstance(a, Patches):
        a = replace(a, image=xp.astype(a.image, dtype))
    elif not isinstance(a, Ids):
        a = xp.astype(a, dtype)
    return replace(record, a=a, g=xp.astype(record.g, dtype))


def damped_inverse(
    K: Array, n: float | Array, damping: float | Array, relative: bool = False
) -> tuple[Array, Array, Array]:
    """(K + n damping I)^-1, damping (blocks,), and a code; a damping of 0 is lifted to eps of the mean eigenvalue.

    relative: damping in units of tr(K) / n^2; the unit of zeros is 1.
    """
    xp = namespace(K)
    n = kernels.scalar(n, K)
    size = K.shape[-1]
    trace = xp.sum(xp.linalg.diagonal(K), axis=-1) / n
    shift = factors.per_block(damping, trace)
    if relative:
        unit = trace / n
        shift = shift * xp.where(unit > 0, unit, xp.ones_like(unit))
    floor = kernels.eps(K.dtype, xp) * xp.where(trace > 0, trace, xp.ones_like(trace)) / size
    lifted = shift <= floor
    shift = xp.where(lifted, floor, shift)
    eye = xp.eye(size, dtype=K.dtype, device=device_of(K))
    inverse, code = kernels.spd_inverse(K + (shift * n)[:, None, None] * eye)
    return inverse, shift, choose(lifted & (code == int(Code.OK)), Code.JITTERED, code)


def _by_pairs(record: Record) -> Array:
    """K from the inner products of all pairs of positions."""
    xp = namespace(record.g)
    blocks = record.blocks
    draws = record.draws
    shared = record.shared
    units = draws * record.batch
    g = xp.reshape(xp.permute_dims(record.g, (1, 0, 2, 3, 4)), (blocks, units * shared, record.d_out))
    if isinstance(record.a, Ids):
        index = xp.reshape(record.a.index, (-1,))
        a_a = xp.astype(index[:, None] == index[None, :], record.g.dtype)[None, ...]
    else:
        a = _flat(record.rows())
        a_a = xp.matmul(a, a.mT)
    if draws > 1:
        a_a = xp.tile(a_a, (1, draws, draws))  # every pair of draws has the same a
    K = xp.matmul(g, g.mT) * a_a
    if shared == 1:
        return K
    return xp.sum(xp.reshape(K, (blocks, units, shared, units, shared)), axis=(2, 4))


def _by_slices(record: Record) -> Array:
    """K as the sum over slices of outputs of J J^T, J (blocks, units, width d_in) a slice at a time."""
    xp = namespace(record.g)
    units = record.draws * record.batch
    width = kernels.at_once(units * record.d_in * record.blocks)

    def part(span: slice) -> Array:
        outputs = record.g[..., span]
        parts = [xp.matmul(g.mT, a[None, ...]) for a, g in _chunks(record, outputs)]
        J = xp.permute_dims(xp.concat(parts, axis=2), (1, 0, 2, 3, 4))
        return kernels.gram(xp.reshape(J, (record.blocks, units, -1)).mT)

    return reduce(add, (part(span) for span in kernels.spans(record.d_out, width)))


def _chunks(record: Record, g: Array | None = None) -> Iterator[tuple[Array, Array]]:
    """(a, g) a part of the batch at a time; all at once unless patches are unfolded."""
    rows = record.g if g is None else g
    size = record.batch
    if isinstance(record.a, Patches):
        size = kernels.at_once(record.shared * record.d_in * record.blocks)
    for start, a in input_chunks(record, size):
        yield a, rows[:, :, start : start + a.shape[1], ...]


def _flat(x: Array) -> Array:
    """(blocks, batch, shared, d) -> (blocks, rows, d)."""
    return namespace(x).reshape(x, (x.shape[0], -1, x.shape[-1]))


def _joined(x: Array) -> Array:
    """(draws, blocks, batch) -> (blocks, units)."""
    xp = namespace(x)
    return xp.reshape(xp.permute_dims(x, (1, 0, 2)), (x.shape[1], -1))
