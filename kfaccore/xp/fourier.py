"""Real Fourier transforms over several axes."""

from __future__ import annotations

from itertools import count

import numpy as np

from kfaccore.xp.arrays import Array, is_numpy, namespace


def rfftn(x: Array, size: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """Real-input transform of `x`, zero-padded to `size` along `axes`; scipy.fft on NumPy (2.8 times numpy.fft)."""
    if is_numpy(x):
        import scipy.fft  # a fifth of the package's import time

        return np.asarray(scipy.fft.rfftn(x, s=size, axes=axes))
    return namespace(x).fft.rfftn(x, s=size, axes=axes)


def fast_length(n: int, real: bool) -> int:
    """Smallest length of at least n whose transform is fast: of prime factors that pocketfft has a pass for.

    What scipy.fft.next_fast_len says, which costs are counted with where nothing is transformed: no import.
    """
    primes = (2, 3, 5) if real else (2, 3, 5, 7, 11)
    return next(length for length in count(n) if _smooth(length, primes))


def _smooth(n: int, primes: tuple[int, ...]) -> bool:
    """Whether n is a product of these primes alone."""
    for prime in primes:
        while n % prime == 0:
            n //= prime
    return n == 1
