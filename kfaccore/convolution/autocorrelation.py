"""Gram of the patches of a stride-1 convolution by autocorrelation, with exact border corrections.

A[d, d'] = sum over examples and grid positions t of x(t + d - p) x(t + d' - p)^T. Over the infinite grid it depends
on d' - d only: R[D] = sum_u x(u) x(u + D)^T, one FFT whatever the kernel. The grid's complement is
1 - prod(1 - outside_axis), so positions outside are subtracted by inclusion and exclusion over the axes; their
patches touch only border lines, whose correlations along the other axis are a few small products.
Flops a pixel: about 5 C^2 for 2-d instead of C^2 K^4.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from itertools import combinations, product
from math import prod
from operator import add

import numpy as np

from kfaccore import xp as kernels
from kfaccore.xp.arrays import Array, is_numpy, is_tracer, namespace

_SPECTRUM_BYTES = 1 << 26  # float32 spectra held at once
_LEAST = 1 << 22  # and where every byte of a device counts, as many as the image has, but not under this
_GROUP = 1 << 19  # entries of spectra and power spectra worked on at once


def autocorrelation(x: Array, kernel: tuple[int, ...], padding: tuple[tuple[int, int], ...]) -> Array:
    """Gram (K C, K C), K = prod(kernel), of all patches of x (batch, *spatial, C), 1 or 2 spatial axes.

    padding (low, high) an axis, of zeros; each spatial axis is at least its kernel.
    """
    xp = namespace(x)
    axes = range(len(kernel))
    A = _toeplitz(_correlations(x, kernel), kernel)
    outside = [list(_outside(*sizes)) for sizes in zip(x.shape[1:-1], kernel, padding, strict=True)]
    for count in range(1, len(kernel) + 1):
        for chosen in combinations(axes, count):
            for lines in product(*(outside[axis] for axis in chosen)):
                touched = dict(zip(chosen, lines, strict=True))
                block = _line_gram(x, kernel, touched)
                spans = tuple(
                    slice(touched[a][1], touched[a][1] + touched[a][0].stop - touched[a][0].start)
                    if a in touched
                    else slice(0, kernel[a])
                    for a in axes
                )
                both = (*spans, slice(0, x.shape[-1]))
                A = kernels.add_at(A, both + both, block if count % 2 == 0 else -block)
    size = prod(kernel) * x.shape[-1]
    return xp.reshape(A, (size, size))


def _outside(size: int, k: int, padding: tuple[int, int]) -> Iterator[tuple[slice, int]]:
    """Grid positions that do not exist but would touch the image: (image rows touched, first kernel row on them)."""
    low, high = padding
    outputs = size + low + high - k + 1
    for t in (*range(low - k + 1, 0), *range(outputs, size + low)):
        start = max(0, t - low)
        stop = min(size, t - low + k)
        yield slice(start, stop), start - (t - low)


def transform_sizes(spatial: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[int, ...]:
    """Fast transform lengths at which displacements below the kernel do not wrap."""
    need = [h + k - 1 for h, k in zip(spatial, kernel, strict=True)]
    return tuple(kernels.fast_length(n, real=axis == len(need) - 1) for axis, n in enumerate(need))


def _correlations(x: Array, kernel: tuple[int, ...]) -> Array:
    """R[D] for |D| < kernel on every axis, (2k-1, ..., C, C), summed over chunks of examples; R[-D] = R[D]^T."""
    xp = namespace(x)
    axes = tuple(range(1, x.ndim - 1))
    batch = x.shape[0]
    channels = x.shape[-1]
    size = transform_sizes(tuple(x.shape[1:-1]), kernel)
    held = _SPECTRUM_BYTES if is_numpy(x) else min(_SPECTRUM_BYTES, max(_LEAST, 4 * prod(x.shape)))
    chunks = -(-batch * prod(size) * channels * 4 // held)
    spans = kernels.spans(batch, max(1, -(-batch // chunks)))  # as few as fit, of nearly equal size
    spectra = (kernels.rfftn(x[span, ...], size, axes) for span in spans)
    turned = (xp.permute_dims(spectrum, (*axes, 0, x.ndim - 1)) for spectrum in spectra)
    total = reduce(add, (_displacements(spectrum, size, kernel) for spectrum in turned))
    return (total + xp.flip(total, axis=tuple(range(len(kernel)))).mT) / 2


def _displacements(spectrum: Array, size: tuple[int, ...], kernel: tuple[int, ...]) -> Array:
    """R from spectra (frequencies..., batch, C): the power spectrum's inverse transform at |D| < kernel alone.

    A few rows of frequencies at a time, on NumPy so that power spectra stay in cache, elsewhere for their memory.
    """
    xp = namespace(spectrum)
    first, *rest = (
        xp.astype(kernels.from_host(_waves(h, k, axis == len(size) - 1), spectrum), spectrum.dtype)
        for axis, (h, k) in enumerate(zip(size, kernel, strict=True))
    )
    rows = spectrum.shape[0]
    channels = spectrum.shape[-1]
    held = prod(spectrum.shape[1:]) + prod(spectrum.shape[1:-2]) * channels**2
    room = _GROUP if is_numpy(spectrum) else max(_GROUP // 4, prod(spectrum.shape) // 4)
    group = rows if is_tracer(spectrum) else kernels.at_once(held, room)
    total = None
    for span in kernels.spans(rows, group):
        part = spectrum[span, ...]
        part = xp.matmul(xp.conj(part).mT, part)
        if rest:
            part = xp.matmul(rest[0], xp.reshape(part, (*part.shape[:2], -1)))
        part = first[:, span] @ xp.reshape(part, (part.shape[0], -1))
        total = xp.real(part) if total is None else total + xp.real(part)
    return xp.reshape(total, (*(2 * k - 1 for k in kernel), channels, channels))


def _waves(size: int, k: int, halved: bool) -> np.ndarray:
    """Inverse transform of length `size` at |D| < k; `halved`: from a real signal's non-negative frequencies."""
    frequency = np.arange(size // 2 + 1 if halved else size)
    waves = np.exp(2j * np.pi / size * np.arange(1 - k, k)[:, None] * frequency) / size
    if halved:  # the other half is the conjugate
        waves[:, 1 : (size + 1) // 2] *= 2
    return waves


def _toeplitz(R: Array, kernel: tuple[int, ...]) -> Array:
    """A[d, c, d', c'] = R[d' - d, c, c'], (kernel..., C, kernel..., C); R has 2k-1 displacements an axis."""
    xp = namespace(R)
    channels = R.shape[-2:]
    places = np.indices(kernel).reshape(len(kernel), -1)
    index = np.zeros((prod(kernel), prod(kernel)), dtype=np.int64)
    for place, k in zip(places, kernel, strict=True):
        index = index * (2 * k - 1) + place - place[:, None] + k - 1
    flat_R = xp.reshape(R, (-1, *channels))
    blocks = xp.take(flat_R, kernels.from_host(index.reshape(-1), R), axis=0)
    blocks = xp.reshape(blocks, (prod(kernel), prod(kernel), *channels))
    return xp.reshape(xp.permute_dims(blocks, (0, 2, 1, 3)), (*kernel, channels[0], *kernel, channels[1]))


def _line_gram(x: Array, kernel: tuple[int, ...], touched: dict[int, tuple[slice, int]]) -> Array:
    """Patches at fixed positions on the axes of `touched`, summed over the infinite grid on the others."""
    xp = namespace(x)
    axes = range(len(kernel))
    piece = x[:, *(touched[a][0] if a in touched else slice(None) for a in axes), :]
    sizes = piece.shape[1:-1]
    channels = x.shape[-1]
    free = [a for a in axes if a not in touched]
    if not free:
        flat = xp.reshape(piece, (1, piece.shape[0], -1))
        return xp.reshape(kernels.gram(flat), (*sizes, channels, *sizes, channels))
    (axis,) = free
    rest = [a for a in axes if a != axis]
    piece = xp.permute_dims(piece, (0, axis + 1, *(a + 1 for a in rest), piece.ndim - 1))
    piece = xp.reshape(piece, (*piece.shape[:2], -1))
    A = _toeplitz(_short_correlations(piece, kernel[axis]), (kernel[axis],))
    inner = [sizes[a] for a in rest]
    A = xp.reshape(A, (kernel[axis], *inner, channels, kernel[axis], *inner, channels))
    place = [1 + rest.index(a) if a != axis else 0 for a in axes]
    half = len(kernel) + 1
    return xp.permute_dims(A, (*place, half - 1, *(half + p for p in place), 2 * half - 1))


def _short_correlations(x: Array, k: int) -> Array:
    """R[D], |D| < k, of x (batch, length, channels): k products, the rest by R[-D] = R[D]^T. (2k-1, C, C)."""
    xp = namespace(x)
    length, channels = x.shape[1:]
    forward = []
    for shift in range(k):
        left = xp.reshape(x[:, : length - shift, :], (-1, channels))
        right = xp.reshape(x[:, shift:, :], (-1, channels))
        forward.append(left.T @ right)
    return xp.stack([r.T for r in forward[:0:-1]] + forward)
