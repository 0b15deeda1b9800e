"""Coarse vectors: arrays (blocks, d_out, d_in), or products left right^T, whose image under J costs far less."""

from __future__ import annotations

from dataclasses import dataclass

from kfaccore.record import Ids, Record
from kfaccore.record.chunks import joined
from kfaccore.xp.arrays import Array, is_numpy, namespace


@dataclass(frozen=True)
class Outer:
    """left (blocks, d_out) times right (blocks, d_in)."""

    left: Array
    right: Array

    def dense(self) -> Array:
        """(blocks, d_out, d_in)."""
        return self.left[:, :, None] * self.right[:, None, :]


Vector = Array | Outer


def dense(v: Vector) -> Array:
    """A vector as an array (blocks, d_out, d_in)."""
    return v.dense() if isinstance(v, Outer) else v


def inner(r: Vector, v: Vector) -> Array:
    """<r, v> over all blocks; of two `Outer` without forming either."""
    if not isinstance(r, Outer):
        return _applied(v, r) if isinstance(v, Outer) else _flat(r, v)
    if not isinstance(v, Outer):
        return _applied(r, v)
    xp = namespace(v.left)
    return xp.sum(xp.sum(r.left * v.left, axis=-1) * xp.sum(r.right * v.right, axis=-1))


def _applied(r: Outer, v: Array) -> Array:
    """left . (v right)."""
    xp = namespace(v)
    return xp.sum(r.left * xp.matmul(v, r.right[:, :, None])[..., 0])


def _flat(r: Array, v: Array) -> Array:
    xp = namespace(v)
    return xp.vecdot(xp.reshape(r, (-1,)), xp.reshape(v, (-1,)))


def dots(record: Record, r: Outer) -> tuple[Array, Array]:
    """right . a (blocks, batch, shared) and left . g (draws, blocks, batch, shared)."""
    xp = namespace(record.g)
    shape = (record.blocks, record.batch, record.shared)
    if isinstance(record.a, Ids):
        p = xp.take(r.right[0, :], xp.reshape(record.a.index, (-1,)))
    else:
        p = joined(record, lambda a: xp.reshape(xp.matmul(_rows(a), r.right[:, :, None]), a.shape[:-1]))
    q = xp.matmul(xp.reshape(record.g, (record.draws, record.blocks, -1, record.d_out)), r.left[None, :, :, None])
    return xp.reshape(p, shape), xp.reshape(q, (record.draws, *shape))


def _rows(a: Array) -> Array:
    return namespace(a).reshape(a, (a.shape[0], -1, a.shape[-1]))


def scaled(c: Array, r: Vector) -> Array:
    """c r as an array."""
    return (c * r.left)[:, :, None] * r.right[:, None, :] if isinstance(r, Outer) else c * r


def unit(v: Vector) -> Vector:
    """The vector over its largest absolute entry; under 1e-30 it is dropped: zero. Only the range counts, so NumPy
    leaves an array as it is whose squares are far from the ends of float32."""
    if isinstance(v, Outer):
        xp = namespace(v.left)
        top = xp.max(xp.max(xp.abs(v.left), axis=-1) * xp.max(xp.abs(v.right), axis=-1))
        return Outer(v.left * _reciprocal(top), v.right)
    xp = namespace(v)
    top = xp.maximum(xp.max(v), -xp.min(v))  # without an array of absolute values
    if is_numpy(v) and 1e-9 < top < 1e9:
        return v
    return v * _reciprocal(top)


def _reciprocal(top: Array) -> Array:
    """1 / top, 0 where that is under 1e-30."""
    xp = namespace(top)
    safe = xp.where(top > 1e-30, top, xp.ones_like(top))
    return xp.where(top > 1e-30, 1.0 / safe, xp.zeros_like(top))
