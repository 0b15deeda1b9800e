"""Sums into parts of an array."""

from __future__ import annotations

from typing import Any

import array_api_compat as aac
import numpy as np

from kfaccore.xp.arrays import Array, device_of, is_numpy, namespace


def segment_sum(values: Array, index: Array, size: int) -> Array:
    """out[i] = sum of values[r] over rows r with index[r] == i: (rows, d), (rows,) -> (size, d).

    Indices outside 0 .. size-1 are the caller's error; `Ids` checks nothing on tracers.
    """
    xp = namespace(values)
    if is_numpy(values):
        from scipy.sparse import csr_array

        rows = len(index)
        pick = csr_array((np.ones(rows, values.dtype), (np.asarray(index), np.arange(rows))), shape=(size, rows))
        return pick @ values
    zeros = xp.zeros((size, values.shape[1]), dtype=values.dtype, device=device_of(values))
    if aac.is_torch_array(values):
        return zeros.index_add(0, index, values)
    if aac.is_jax_array(values):
        return zeros.at[index].add(values)
    if aac.is_cupy_array(values):
        xp.add.at(zeros, index, values)
        return zeros
    hit = xp.arange(size, dtype=index.dtype)[:, None] == index[None, :]
    # chosen, not multiplied: a value that is not finite stays in its own sum
    return xp.sum(xp.where(hit[:, :, None], values[None, :, :], xp.zeros_like(values)[None, :, :]), axis=1)


def add_at(owned: Array, spans: tuple[slice, ...], block: Array) -> Array:
    """`owned` with `block` added at `spans`; the caller gives `owned` up, it is written to where arrays can be."""
    foreign: Any = owned
    if aac.is_jax_array(foreign):
        return foreign.at[spans].add(block)
    owned[spans] = owned[spans] + block
    return owned
