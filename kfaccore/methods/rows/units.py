"""Per-example gradients of a record through their inner products: K = U^T U, U^T v and U y, without U.

A unit is one draw of one example, its J summed over shared positions; units are numbered draw by draw. With one
position K = (a a^T) o (g g^T). With more, inner products of all pairs of positions, or J a slice of outputs at a time,
whichever is cheaper; an embedding's a a^T is the equality of its ids, and where its positions are many their gradients
are summed by id, in memory linear in them.
Source: Ou et al. 2024 (2403.03473) for layers as inner products of rows; the choice of order is ours.
Cost: K units^2 shared^2 (d_in + d_out), or units^2 d_in d_out, or units^2 shared d_out by ids; the others one weight
gradient each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

from kfaccore import factors
from kfaccore import xp as kernels
from kfaccore.convolution.patches import Patches
from kfaccore.linalg import refined
from kfaccore.record import Ids, Record
from kfaccore.record.chunks import input_chunks
from kfaccore.record.sharing import expand
from kfaccore.xp import traced
from kfaccore.xp.arrays import Array, device_of, is_tracer, namespace
from kfaccore.xp.codes import Code, choose


def gram(record: Record, pairs: bool | None = None) -> Array:
    """K (blocks, units, units); `pairs` overrides the choice."""
    if pairs is None:
        cheaper = record.shared**2 * (record.d_in + record.d_out) < record.d_in * record.d_out
        pairs = record.shared == 1 or cheaper
    if isinstance(record.a, Ids):
        few = record.shared == 1 or kernels.read_again(_pairs(record), record.g) >= record.batch
        return _by_pairs(record) if few else _by_ids(record)
    return _by_pairs(record) if pairs else _by_slices(record)


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


@dataclass(frozen=True)
class Damped:
    """system = K + n damping I and its inverse (blocks, units, units); the damping in use and n times it (blocks,), and
    a code."""

    system: Array
    inverse: Array
    damping: Array
    shift: Array
    code: Array

    def solve(self, b: Array) -> Array:
        """system^-1 b (blocks, units) for b in the span of K, also of units that depend on each other, where the
        inverse has entries of 1 / damping."""
        inverse = refined.on_span(self.inverse, kernels.shifted(self.system, -self.shift), self.shift)
        return refined.solved(self.system, inverse, b[:, :, None])[:, :, 0]


def damped(K: Array, n: float | Array, damping: float | Array, relative: bool = False) -> Damped:
    """The system of K; a damping of 0 is lifted to eps of the mean eigenvalue.

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
    system = K + (shift * n)[:, None, None] * eye
    inverse, code = kernels.spd_inverse(system)
    return Damped(system, inverse, shift, shift * n, choose(lifted & (code == int(Code.OK)), Code.JITTERED, code))


def _by_pairs(record: Record) -> Array:
    """K from the inner products of pairs of positions: of some examples with all at a time."""
    xp = namespace(record.g)
    draws, blocks, batch, shared, d_out = record.g.shape
    g = xp.permute_dims(record.g, (1, 0, 2, 3, 4))
    every = xp.reshape(g, (blocks, -1, d_out)).mT
    a = record.a.index if isinstance(record.a, Ids) else record.rows()

    def part(span: slice) -> Array:
        some = xp.reshape(g[:, :, span, ...], (blocks, -1, d_out))
        if isinstance(record.a, Ids):
            a_a = xp.reshape(a[span, :], (-1,))[:, None] == xp.reshape(a, (-1,))[None, :]
            a_a = xp.astype(a_a, g.dtype)[None, ...]
        else:
            a_a = xp.matmul(_flat(a[:, span, ...]), _flat(a).mT)
        if draws > 1:
            a_a = xp.tile(a_a, (1, draws, draws))  # every pair of draws has the same a
        K = xp.matmul(some, every) * a_a
        if shared > 1:
            K = xp.sum(xp.reshape(K, (blocks, draws * (span.stop - span.start), shared, -1, shared)), axis=(2, 4))
        return xp.reshape(K, (blocks, draws, -1, draws * batch))

    parts = [part(span) for span in kernels.spans(batch, kernels.at_once(_pairs(record)))]
    return xp.reshape(parts[0] if len(parts) == 1 else xp.concat(parts, axis=2), (blocks, draws * batch, -1))


def _pairs(record: Record) -> int:
    """Pairs of one example's positions with all, of all draws."""
    return record.blocks * record.batch * (record.draws * record.shared) ** 2


def _by_ids(record: Record) -> Array:
    """K of an embedding some units at a time: their rows summed by id, which all others read where they have it."""
    xp = namespace(record.g)
    draws, _, batch, shared, d_out = record.g.shape
    units = draws * batch
    index, size = _numbered(record.a)
    g = xp.reshape(record.g, (1, units, shared, d_out))
    mine = xp.reshape(xp.tile(index, (draws,)), (1, units, shared))

    def of(g_some: Array, some: Array) -> Array:
        many = some.shape[1]
        tables = xp.arange(many, dtype=some.dtype, device=device_of(some))[:, None] * size
        rows = xp.reshape(g_some, (-1, d_out))
        J = kernels.segment_sum(rows, xp.reshape(some[0, ...] + tables, (-1,)), many * size)
        read = xp.take(xp.reshape(J, (many, size, d_out)), index, axis=1)
        read = xp.reshape(read, (many, 1, batch, shared * d_out))
        K = xp.vecdot(read, xp.reshape(record.g, (1, draws, batch, shared * d_out)))
        return xp.reshape(K, (1, many, units))

    many = kernels.at_once(d_out * (size + batch * shared * (1 + draws)))
    K = _some_at_a_time((g, mine), many, of)
    return (K + K.mT) / 2.0  # the two halves are rounded apart


def _some_at_a_time(arrays: tuple[Array, Array], many: int, of: Callable[[Array, Array], Array]) -> Array:
    """`of` the arrays, so many units (second axis) at a time, joined; under a trace by a loop of one body."""
    xp = namespace(*arrays)
    units = arrays[0].shape[1]
    if many >= units:
        return of(*arrays)
    whole = units // many if is_tracer(arrays[0]) else 0
    found = [traced.joined_turns(arrays, many, whole, of)] if whole else []
    rest = [x[:, whole * many :, ...] for x in arrays]
    found += [of(*(x[:, span, ...] for x in rest)) for span in kernels.spans(units - whole * many, many)]
    return xp.concat(found, axis=1)


def _numbered(ids: Ids) -> tuple[Array, int]:
    """Ids (positions,) and how many there may be: new ones, no more than positions, where the table is longer."""
    xp = namespace(ids.index)
    index = xp.reshape(ids.index, (-1,))
    if ids.size <= index.shape[0]:
        return index, ids.size
    return xp.astype(xp.searchsorted(xp.sort(index), index), index.dtype), index.shape[0]  # its first place among all


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
