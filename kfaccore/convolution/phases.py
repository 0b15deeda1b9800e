"""Strides and dilations as stride-1 convolutions of phase images, and when their autocorrelation pays.

Position u = s k + q along an axis of stride s belongs to phase q: phases become channels and the kernel shrinks s
times. With dilation r positions of different phases never meet: phases become examples.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from itertools import product
from math import prod
from operator import add

from kfaccore.convolution.autocorrelation import autocorrelation, transform_sizes
from kfaccore.convolution.window import Window, pad
from kfaccore.xp.arrays import Array, device_of, namespace

# One core in units of the time of one BLAS flop; only their ratios matter.
_FFT_POINT = 500  # forward transform, a complex number
_POWER_POINT = 150  # product and inverse transform, an entry of the power spectrum
_PRODUCT = 9.6  # complex multiply-add in a batch of small products
_COPY = 60  # moving images and patches, an entry
_RUN = 2000  # and a run of entries that lie side by side: 18 ns (`7x7 stride 2, 3 ch`)
_CALL = 3e5  # one array operation
_ENTRY = 280  # writing, negating and adding an entry of a gram: 2.5 ns where a BLAS flop takes .009 (`1024, 1 ch`)
_CHUNK = 1 << 18  # numbers of unfolded rows that stay in cache
_MOST_ROWS = 1 << 13  # from here on writing and adding a gram costs little beside its product, or takes as much memory
_LINE = 60 * _CALL  # the operations of one border line


def patch_gram(image: Array, w: Window) -> Array:
    """Gram (d_in, d_in) of the patches of image (batch, *spatial, C) by autocorrelation; see `autocorrelates`."""
    if max(w.dilation) > 1:
        return _dilated(image, w)
    if max(w.stride) > 1:
        return _strided(image, w)
    return autocorrelation(image, w.kernel, w.padding)


def autocorrelates(w: Window, spatial: tuple[int, ...]) -> bool:
    """Whether `patch_gram` covers this geometry."""
    if len(w.kernel) > 2 or (max(w.dilation) > 1 and max(w.stride) > 1):
        return False
    if max(w.dilation) > 1 or max(w.stride) > 1:
        return True  # padded first
    return all(h >= k for h, k in zip(spatial, w.kernel, strict=True))


def fft_pays(w: Window, shape: tuple[int, ...], strided: bool = True) -> bool:
    """Whether autocorrelation is cheaper than chunks for images of `shape` (blocks, batch, *spatial, C).

    A model of one core: unfolding costs kernel^2 a pixel, autocorrelation about the same for any kernel, until the
    grams of its border lines, twice kernel of them an axis, cost more to write than the patches to multiply.
    `strided`: patches are one strided copy in runs of a kernel row, as on NumPy; elsewhere in runs of the channels.
    """
    blocks, batch, *size, channels = shape
    spatial = tuple(size)
    if not autocorrelates(w, spatial):
        return False
    outputs = w.outputs(spatial)
    d_in = prod(w.kernel) * channels
    positions = batch * prod(outputs)
    run = channels * w.kernel[-1] if strided and w.dilation[-1] == 1 else channels
    chunks = positions * d_in * (d_in + _COPY + _RUN / run) + -(-positions // rows_held(d_in)) * d_in**2 * _ENTRY
    none = ((0, 0),) * len(size)
    if max(w.dilation) > 1:
        size = [-(-o // r) + k - 1 for o, r, k in zip(outputs, w.dilation, w.kernel, strict=True)]
        fft = _cost(batch * prod(w.dilation), size, channels, w.kernel, none) + prod(w.dilation) * 50 * _CALL
    elif max(w.stride) > 1:
        kernel = _shrunk(w)
        size = [o + k - 1 for o, k in zip(outputs, kernel, strict=True)]
        fft = _cost(batch, size, channels * prod(w.stride), kernel, none)
    else:
        fft = _cost(batch, size, channels, w.kernel, w.padding)
    if max(*w.dilation, *w.stride) > 1:
        fft += batch * prod(spatial) * channels * (_COPY + _RUN / channels)  # the phases
    return blocks * fft < chunks * blocks + 10 * _CALL


def rows_held(d_in: int) -> int:
    """Unfolded rows multiplied at once: 1 MB of them, or more where a gram costs more to write: see `_MOST_ROWS`."""
    return max(_CHUNK // d_in, min(max(_MOST_ROWS, d_in), 8 * d_in))


def _cost(batch: int, size: list[int], channels: int, kernel: tuple[int, ...], padding: tuple) -> float:
    """Cost of `autocorrelation`: transforms, power spectra, border lines."""
    *full, last = transform_sizes(tuple(size), kernel)
    frequencies = prod(full) * (last // 2 + 1)
    inner = frequencies * channels * (batch * (_FFT_POINT + _PRODUCT * channels) + _POWER_POINT * channels)
    border = float(_ENTRY) * (prod(kernel) * channels) ** 2  # the Toeplitz matrix itself
    lines = 1
    for axis, (k, (low, high)) in enumerate(zip(kernel, padding, strict=True)):
        rest = prod(h for a, h in enumerate(size) if a != axis)
        widths = [*range(1, k - low), *range(1, k - high)]
        reach = prod(k for a, k in enumerate(kernel) if a != axis)
        entries = sum((width * channels) ** 2 for width in widths)
        border += (2 * batch * rest * reach + _ENTRY * reach**2) * entries
        lines *= 1 + len(widths)
    return inner + border + lines * _LINE


def _shrunk(w: Window) -> tuple[int, ...]:
    return tuple(-(-k // s) for k, s in zip(w.kernel, w.stride, strict=True))


def _strided(image: Array, w: Window) -> Array:
    """Stride s as s^k phase images side by side on the channel axis, then the blocks that exist are taken."""
    xp = namespace(image)
    outputs = w.outputs(tuple(image.shape[1:-1]))
    image = pad(image[None, ...], w.padding)[0, ...]
    batch = image.shape[0]
    channels = image.shape[-1]
    small = _shrunk(w)
    need = [(o + k - 1) * s for o, k, s in zip(outputs, small, w.stride, strict=True)]
    image = image[:, *(slice(0, min(n, h)) for n, h in zip(need, image.shape[1:-1], strict=True)), :]
    image = pad(image[None, ...], tuple((0, n - h) for n, h in zip(need, image.shape[1:-1], strict=True)))[0, ...]
    split = [size for n, s in zip(need, w.stride, strict=True) for size in (n // s, s)]
    image = xp.reshape(image, (batch, *split, channels))
    axes = len(w.kernel)
    order = (0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1)
    phases = xp.reshape(xp.permute_dims(image, order), (batch, *split[::2], -1))
    A = autocorrelation(phases, small, ((0, 0),) * axes)
    index = []
    for offset in product(*map(range, w.kernel)):
        outer = inner = 0
        for d, s, k in zip(offset, w.stride, small, strict=True):
            outer = outer * k + d // s
            inner = inner * s + d % s
        start = (outer * prod(w.stride) + inner) * channels
        index.extend(range(start, start + channels))
    keep = xp.asarray(index, device=device_of(A))
    return xp.take(xp.take(A, keep, axis=0), keep, axis=1)


def _dilated(image: Array, w: Window) -> Array:
    """Dilation r at stride 1 as r^k interleaved images, each an ordinary convolution."""
    padded = pad(image[None, ...], w.padding)[0, ...]
    outputs = w.outputs(tuple(image.shape[1:-1]))
    none = ((0, 0),) * len(w.kernel)
    return reduce(add, (autocorrelation(phase, w.kernel, none) for phase in _interleaved(padded, w, outputs)))


def _interleaved(padded: Array, w: Window, outputs: tuple[int, ...]) -> Iterator[Array]:
    """The image of each phase of a dilation that has positions at all, (batch, *spatial, C)."""
    for phase in product(*map(range, w.dilation)):
        spans = []
        for q, r, o, k in zip(phase, w.dilation, outputs, w.kernel, strict=True):
            positions = len(range(q, o, r))
            if positions:
                spans.append(slice(q, q + (positions + k - 2) * r + 1, r))
        if len(spans) == len(phase):
            yield padded[:, *spans, :]
