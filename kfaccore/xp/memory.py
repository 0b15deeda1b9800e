"""Where arrays lie: which axis comes first, whether two are one, and sums into one that nobody else holds."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.linalg import blas

from kfaccore.xp.arrays import Array, is_numpy, to_host


def shared_first(x: Array) -> bool:
    """Whether a NumPy array (..., batch, shared, d) lies in memory as (..., shared, batch, d): fold it that way."""
    return is_numpy(x) and x.ndim > 2 and x.shape[-3] > 1 and x.strides[-3] < x.strides[-2]


def same(x: Array, y: Array) -> bool:
    """Whether two arrays are surely one: the same object or, on NumPy, the same memory read the same way."""
    if x is y or not (is_numpy(x) and is_numpy(y)):
        return x is y
    alike = (x.shape, x.strides, x.dtype) == (y.shape, y.strides, y.dtype)
    return alike and x.__array_interface__["data"][0] == y.__array_interface__["data"][0]


def in_rows(x: Array) -> Array:
    """A NumPy array in C order, as a file gives it back: sums are rounded in the order of memory."""
    return np.ascontiguousarray(x) if is_numpy(x) else x


def plus(own: Array, c: float | Array, x: Array) -> Array:
    """own + c x for an array `own` that nobody else holds: NumPy writes into it, without a copy of c x."""
    if not _takes_sums(own, x):
        return own + c * x
    axpy: Any = blas.get_blas_funcs("axpy", (own,))
    return axpy(to_host(x).reshape(-1), to_host(own).reshape(-1), a=float(c)).reshape(own.shape)


def _takes_sums(own: Array, x: Array) -> bool:
    """Whether BLAS can add `x` to `own` in place."""
    return is_numpy(own) and is_numpy(x) and own.dtype == x.dtype and own.flags.c_contiguous
