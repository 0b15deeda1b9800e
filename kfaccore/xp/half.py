"""bfloat16, or float32 rounded to its bits where a namespace has no such dtype."""

from __future__ import annotations

import numpy as np

from kfaccore.xp.arrays import Array, is_numpy, namespace

_SPLITTER = 65537.0  # 2^16 + 1 leaves 8 of float32's 24 significant bits


def to_bfloat16(x: Array) -> Array:
    """`x` as bfloat16; float32 holding a bfloat16 number (nearest, ties to even on NumPy) where there is no dtype."""
    xp = namespace(x)
    if is_numpy(x):
        return _rounded_bits(x)
    native = getattr(xp, "bfloat16", None)
    if native is not None:
        return xp.astype(x, native)
    x = xp.astype(x, xp.float32)
    safe = xp.abs(x) < 1e33
    scaled = xp.where(safe, x, xp.zeros_like(x)) * _SPLITTER
    return xp.where(safe, scaled - (scaled - x), x)


def _rounded_bits(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        x = np.ascontiguousarray(x, dtype=np.float32)
    bits = x.view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + even + np.uint32(0x7FFF)) & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(np.isfinite(x), rounded, x)
