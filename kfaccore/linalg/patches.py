"""Inputs of a convolution: the image is kept, patches are unfolded only where a method needs rows.

Columns of a patch follow the image's own axes, (kernel positions..., channel), and a last one for the bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import product
from math import prod
from typing import Any

import array_api_compat as aac

from kfaccore import xp as kernels
from kfaccore.linalg.autocorrelation import autocorrelation
from kfaccore.xp.arrays import Array, namespace, widen

_CHUNK_BYTES = 1 << 20  # unfolded rows held at once while a gram is summed


@dataclass(frozen=True)
class Window:
    """Geometry of a convolution over 1, 2 or 3 spatial axes: one integer an axis, or one for all.

    padding is zero padding: a number or a (low, high) pair an axis, "valid" (none) or "same" (as many outputs as
    inputs at stride 1, the odd one at the high end). Other modes pad the image first.
    """

    kernel: tuple[int, ...]
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "kernel", tuple(self.kernel))
        axes = len(self.kernel)
        if axes not in (1, 2, 3):
            raise ValueError(f"kernel is {self.kernel}; need 1, 2 or 3 spatial axes")
        for name, least in (("stride", 1), ("dilation", 1), ("padding", 0)):
            value: Any = getattr(self, name)
            if isinstance(value, str):
                value = self._named_padding(value)
            value = (value,) * axes if isinstance(value, int) else tuple(value)
            if name == "padding":
                value = tuple((v, v) if isinstance(v, int) else tuple(v) for v in value)
            flat = [v for pair in value for v in pair] if name == "padding" else value
            if len(value) != axes or min(flat) < least or min(self.kernel) < 1:
                raise ValueError(f"{name} is {value} for kernel {self.kernel}; need {axes} values of at least {least}")
            put(self, name, value)

    def _named_padding(self, name: str) -> tuple[tuple[int, int], ...]:
        if name == "valid":
            return ((0, 0),) * len(self.kernel)
        if name != "same" or set(self.stride if isinstance(self.stride, tuple) else (self.stride,)) != {1}:
            raise ValueError(
                f'padding is {name!r} at stride {self.stride}; need numbers, "valid", or "same" at stride 1'
            )
        extra = [(k - 1) * r for k, r in zip(self.kernel, self.dilation, strict=True)]
        return tuple((e // 2, e - e // 2) for e in extra)

    def outputs(self, spatial: tuple[int, ...]) -> tuple[int, ...]:
        """Output positions along each axis; ValueError where the window does not fit."""
        reach = [(k - 1) * r + 1 for k, r in zip(self.kernel, self.dilation, strict=True)]
        sizes = [h + sum(p) for h, p in zip(spatial, self.padding, strict=True)]
        if any(size < need for size, need in zip(sizes, reach, strict=True)):
            raise ValueError(f"a window reaching {reach} does not fit the padded image {sizes}: pad it or shrink it")
        return tuple((size - need) // s + 1 for size, need, s in zip(sizes, reach, self.stride, strict=True))


@dataclass(frozen=True)
class Patches:
    """Patches of `image` (batch, *spatial, C), or (blocks, batch, *spatial, C) for the groups of a convolution."""

    image: Array
    window: Window
    bias: bool = False

    def __post_init__(self) -> None:
        image = widen(self.image, "image")
        axes = len(self.window.kernel)
        if image.ndim not in (axes + 2, axes + 3):
            raise ValueError(
                f"image has shape {tuple(image.shape)} for a kernel of {axes} axes; need (batch, *spatial, channels), "
                f"or the same with groups first"
            )
        image = namespace(image).expand_dims(image, axis=0) if image.ndim == axes + 2 else image
        object.__setattr__(self, "image", image)
        self.window.outputs(self.spatial)

    @property
    def blocks(self) -> int:
        return self.image.shape[0]

    @property
    def spatial(self) -> tuple[int, ...]:
        return tuple(self.image.shape[2:-1])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(blocks, batch, shared, d_in) of the unfolded rows."""
        d_in = prod(self.window.kernel) * self.image.shape[-1] + self.bias
        return self.blocks, self.image.shape[1], prod(self.window.outputs(self.spatial)), d_in

    def gram(self) -> Array:
        """Sum over examples and positions of a a^T, (blocks, d_in, d_in), by the cheapest exact way.

        FFT autocorrelation with border corrections where it pays (1-d and 2-d, kernels of 3 and more), else sums over
        cache-sized chunks of unfolded patches.
        """
        return self.gram_by_fft() if fft_pays(self.window, self.spatial) else self.gram_by_chunks()

    def gram_by_chunks(self) -> Array:
        """The gram from unfolded patches, a chunk of examples at a time: every geometry, and the oracle."""
        row_bytes = prod(self.shape[2:]) * self.blocks * (4 if self.image.dtype == namespace(self.image).float32 else 8)
        parts = self.rows(max(1, _CHUNK_BYTES // row_bytes))
        xp = namespace(self.image)
        return reduce(
            lambda total, a: total + a,
            (kernels.gram(xp.reshape(a, (self.blocks, -1, a.shape[-1]))) for a in parts),
        )

    def gram_by_fft(self) -> Array:
        """The gram by autocorrelation; needs `fft_pays` geometry."""
        xp = namespace(self.image)
        return xp.stack([self._block_gram(self.image[block, ...]) for block in range(self.blocks)])

    def rows(self, chunk: int) -> Iterator[Array]:
        """Unfolded rows (blocks, examples, shared, d_in) of `chunk` consecutive examples at a time."""
        batch = self.image.shape[1]
        for start in range(0, batch, chunk):
            yield self._unfolded(self.image[:, start : min(start + chunk, batch), ...])

    def unfold(self) -> Array:
        """All rows at once, (blocks, batch, shared, d_in)."""
        return self._unfolded(self.image)

    def mean(self) -> Array:
        """Mean patch of each example, (blocks, batch, 1, d_in), without unfolding."""
        xp = namespace(self.image)
        axes = tuple(range(2, self.image.ndim - 1))
        parts = [xp.mean(part, axis=axes) for part in self._offsets(self.image)]
        if self.bias:
            parts.append(xp.ones_like(parts[0][..., :1]))
        return xp.concat(parts, axis=-1)[:, :, None, :]

    def concat(self, other: Patches) -> Patches:
        """Both batches; windows must agree."""
        if self.window != other.window or self.bias != other.bias:
            raise ValueError(f"patches differ: {self.window}, bias {self.bias}, and {other.window}, bias {other.bias}")
        return Patches(namespace(self.image).concat([self.image, other.image], axis=1), self.window, self.bias)

    def _unfolded(self, image: Array) -> Array:
        xp = namespace(image)
        parts = list(self._offsets(image))
        if self.bias:
            parts.append(xp.ones_like(parts[0][..., :1]))
        return xp.reshape(xp.concat(parts, axis=-1), (*image.shape[:2], *self.shape[2:]))

    def _offsets(self, image: Array) -> Iterator[Array]:
        """For each kernel position the image as all windows see it there, (blocks, batch, *outputs, C)."""
        w = self.window
        padded = pad(image, w.padding)
        outputs = w.outputs(self.spatial)
        for offset in product(*map(range, w.kernel)):
            spans = (
                slice(d * r, d * r + (o - 1) * s + 1, s)
                for d, r, o, s in zip(offset, w.dilation, outputs, w.stride, strict=True)
            )
            yield padded[:, :, *spans, :]

    def _block_gram(self, image: Array) -> Array:
        xp = namespace(image)
        w = self.window
        if max(w.dilation) > 1:
            A = _dilated(image, w, self.spatial)
        elif max(w.stride) > 1:
            A = _strided(image, w, self.spatial)
        else:
            A = autocorrelation(image, w.kernel, w.padding)
        if not self.bias:
            return A
        total = xp.sum(image, axis=0)[None, None, ...]
        axes = tuple(range(2, total.ndim - 1))
        sums = xp.concat([xp.sum(part, axis=axes)[0, 0, ...] for part in self._offsets(total)])[:, None]
        count = xp.zeros((1, 1), dtype=A.dtype, device=aac.device(A)) + float(prod(self.shape[1:3]))
        return xp.concat([xp.concat([A, sums], axis=1), xp.concat([sums.mT, count], axis=1)])


def fft_pays(w: Window, spatial: tuple[int, ...]) -> bool:
    """Whether autocorrelation is cheaper than chunks, from the geometry alone.

    It costs about the same for any kernel, where unfolding costs kernel^2; strides above 1 multiply its channels,
    dilation splits the image. The image must be at least as large as the window on every axis.
    """
    if len(w.kernel) > 2 or min(w.kernel) < 3:
        return False
    if any(p > k - 1 for k, pair in zip(w.kernel, w.padding, strict=True) for p in pair):
        return False
    if max(w.dilation) > 1:
        return max(w.stride) == 1 and all(
            o // r >= 1 and h // r >= k
            for o, h, r, k in zip(w.outputs(spatial), spatial, w.dilation, w.kernel, strict=True)
        )
    if max(w.stride) > 1:
        return all(k >= 3 * s for k, s in zip(w.kernel, w.stride, strict=True)) and min(w.outputs(spatial)) >= max(
            -(-k // s) for k, s in zip(w.kernel, w.stride, strict=True)
        )
    return all(h >= k for h, k in zip(spatial, w.kernel, strict=True))


def pad(image: Array, padding: tuple[tuple[int, int], ...]) -> Array:
    """Zeros around the spatial axes of (blocks, batch, *spatial, C)."""
    xp = namespace(image)
    for axis, (low, high) in enumerate(padding, start=2):
        sides = []
        for width in (low, high):
            shape = (*image.shape[:axis], width, *image.shape[axis + 1 :])
            sides.append(xp.zeros(shape, dtype=image.dtype, device=aac.device(image)))
        if low or high:
            image = xp.concat([sides[0], image, sides[1]], axis=axis)
    return image


def _strided(image: Array, w: Window, spatial: tuple[int, ...]) -> Array:
    """Stride s as s^k phase images side by side on the channel axis, then the blocks that exist are taken."""
    xp = namespace(image)
    image = pad(image[None, ...], w.padding)[0, ...]
    batch, channels = image.shape[0], image.shape[-1]
    small = [-(-k // s) for k, s in zip(w.kernel, w.stride, strict=True)]
    need = [(o + k - 1) * s for o, k, s in zip(w.outputs(spatial), small, w.stride, strict=True)]
    image = image[:, *(slice(0, min(n, h)) for n, h in zip(need, image.shape[1:-1], strict=True)), :]
    image = pad(image[None, ...], tuple((0, n - h) for n, h in zip(need, image.shape[1:-1], strict=True)))[0, ...]
    split = [size for n, s in zip(need, w.stride, strict=True) for size in (n // s, s)]
    image = xp.reshape(image, (batch, *split, channels))
    axes = len(w.kernel)
    order = (0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1)
    phases = xp.reshape(xp.permute_dims(image, order), (batch, *split[::2], -1))
    A = autocorrelation(phases, tuple(small), ((0, 0),) * axes)
    index = []
    for offset in product(*map(range, w.kernel)):
        outer = inner = 0
        for d, s, k in zip(offset, w.stride, small, strict=True):
            outer, inner = outer * k + d // s, inner * s + d % s
        start = (outer * prod(w.stride) + inner) * channels
        index.extend(range(start, start + channels))
    keep = xp.asarray(index, device=aac.device(A))
    return xp.take(xp.take(A, keep, axis=0), keep, axis=1)


def _dilated(image: Array, w: Window, spatial: tuple[int, ...]) -> Array:
    """Dilation r at stride 1 as r^k interleaved images, each an ordinary convolution."""
    padded = pad(image[None, ...], w.padding)[0, ...]
    outputs = w.outputs(spatial)
    total = None
    for phase in product(*map(range, w.dilation)):
        spans = []
        for q, r, o, k in zip(phase, w.dilation, outputs, w.kernel, strict=True):
            positions = len(range(q, o, r))
            spans.append(slice(q, q + (positions + k - 2) * r + 1, r) if positions else None)
        if None in spans:
            continue
        part = autocorrelation(padded[:, *spans, :], w.kernel, ((0, 0),) * len(w.kernel))
        total = part if total is None else total + part
    return total
