"""The gram of patches on a GPU: rows of bounded pieces of the batch, few launches, in the precision in force."""

from __future__ import annotations

from math import prod

from kfaccore import xp as kernels
from kfaccore.convolution.window import Window
from kfaccore.xp import gpu
from kfaccore.xp.arrays import Array, namespace
from kfaccore.xp.windows import framed, windows

PIECE = 1 << 26  # numbers of the rows of a piece: 128 MiB of bfloat16
_RUN = 4  # channels are rounded up to runs that move as one number


def gram_by_windows(image: Array, window: Window, bias: bool) -> Array:
    """Sum of a a^T of images (blocks, batch, *spatial, C), (blocks, d_in, d_in)."""
    outputs = window.outputs(tuple(image.shape[2:-1]))
    if max(window.kernel) == 1 and not any(map(any, window.padding)):
        return _pointwise(image, window, outputs, bias)
    channels = image.shape[-1]
    wide = channels if channels < _RUN - 1 else -(-channels // _RUN) * _RUN
    frame = framed(image, window.padding, wide)
    each = image.shape[0] * prod(outputs) * (prod(window.kernel) * wide + bias)
    found = None
    for span in kernels.spans(image.shape[1], kernels.at_once(each, PIECE)):
        rows = windows(frame[:, span, ...], outputs, window.kernel, window.stride, window.dilation, bias)
        part = gpu.gram(rows)
        found = part if found is None else found + part
    assert found is not None
    return _without_gaps(found, prod(window.kernel), channels, wide, bias)


def _pointwise(image: Array, window: Window, outputs: tuple[int, ...], bias: bool) -> Array:
    """Of a kernel of one position: pixels are the rows."""
    xp = namespace(image)
    image = image[(slice(None), slice(None), *(slice(None, None, s) for s in window.stride), slice(None))]
    shape = (*image.shape[:2], prod(outputs), image.shape[-1])
    if not bias and max(window.stride) == 1:  # a view
        rows = xp.reshape(image, (1, *shape))
        if gpu.by_image_pays(rows):
            return gpu.gram_by_image(rows)
    rows = xp.reshape(gpu.narrowed(image), shape)
    if bias:
        rows = xp.concat([rows, xp.ones_like(rows[..., :1])], axis=-1)
    return gpu.gram(xp.reshape(rows, (rows.shape[0], -1, rows.shape[-1])))


def _without_gaps(gram: Array, positions: int, channels: int, wide: int, bias: bool) -> Array:
    """The gram of rows whose channels were rounded up to `wide`, and their width after that, without what was added."""
    xp = namespace(gram)
    blocks = gram.shape[0]
    size = positions * wide
    A = gram[:, : size + bias, : size + bias]
    if wide == channels:
        return A
    cut = (blocks, positions, wide, positions, wide)
    whole = (blocks, positions * channels, positions * channels)
    inner = xp.reshape(xp.reshape(A[:, :size, :size], cut)[:, :, :channels, :, :channels], whole)
    if not bias:
        return inner
    sums = xp.reshape(xp.reshape(A[:, :size, size], cut[:3])[..., :channels], (blocks, -1, 1))
    top = xp.concat([inner, sums], axis=2)
    return xp.concat([top, xp.concat([sums.mT, A[:, size:, size:]], axis=2)], axis=1)
