"""Coarse vectors: arrays (blocks, d_out, d_in), or products left right^T, whose image under J costs far less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import array_api_compat as aac

from kfaccore.linalg import side
from kfaccore.xp.arrays import Array, is_numpy, namespace


@dataclass(frozen=True)
class Outer:
    """left (blocks, d_out) times right (blocks, d_in)."""

    left: Array
    right: Array

    def dense(self) -> Array:
        """(blocks, d_out, d_in)."""
        return self.left[:, :, None] * self.right[:, None, :]


def dense(v: Any) -> Array:
    """A vector as an array (blocks, d_out, d_in)."""
    return v.dense() if isinstance(v, Outer) else v


def inner(r: Any, v: Any) -> Array:
    """<r, v> over all blocks; of two `Outer` without forming either."""
    if isinstance(v, Outer) and not isinstance(r, Outer):
        return inner(v, r)
    xp = namespace(v.left if isinstance(v, Outer) else v)
    if not isinstance(r, Outer):
        return xp.vecdot(xp.reshape(r, (-1,)), xp.reshape(v, (-1,)))
    if isinstance(v, Outer):
        return xp.sum(xp.sum(r.left * v.left, axis=-1) * xp.sum(r.right * v.right, axis=-1))
    return xp.sum(r.left * xp.matmul(v, r.right[:, :, None])[..., 0])


def scaled(c: Array, r: Any) -> Array:
    """c r as an array."""
    return (c * r.left)[:, :, None] * r.right[:, None, :] if isinstance(r, Outer) else c * r


def unit(v: Any) -> Any:
    """The vector over its largest absolute entry; under 1e-30 it is dropped: zero. Only the range counts, so NumPy
    leaves an array as it is whose squares are far from the ends of float32."""
    if isinstance(v, Outer):
        xp = namespace(v.left)
        top = xp.max(xp.max(xp.abs(v.left), axis=-1) * xp.max(xp.abs(v.right), axis=-1))
    else:
        xp = namespace(v)
        top = xp.maximum(xp.max(v), -xp.min(v))
        if is_numpy(v) and 1e-9 < top < 1e9:
            return v
    scale = xp.where(top > 1e-30, 1.0 / xp.where(top > 1e-30, top, xp.ones_like(top)), xp.zeros_like(top))
    return Outer(v.left * scale, v.right) if isinstance(v, Outer) else v * scale


def pair(index: Array, Qg: Array, Qa: Array) -> Outer:
    """Eigenvector number `index` (blocks,) of the d_out d_in Kronecker ones, row-major."""
    d_in = Qa.shape[-1]
    row = index // d_in
    return Outer(_column(Qg, row), _column(Qa, index - row * d_in))


def _column(Q: Array, index: Array) -> Array:
    """Column index[b] of block b, (blocks, d); a diagonal side has unit vectors."""
    xp = namespace(Q)
    hit = xp.astype(xp.arange(Q.shape[-1], device=aac.device(Q))[None, :] == index[:, None], Q.dtype)
    return hit if side.is_diagonal(Q) else xp.sum(Q * hit[:, None, :], axis=-1)
