"""Windows over images, and their patches laid out as rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import numpy as np

from kfaccore.xp.arrays import Array, is_numpy, is_tracer, namespace
from kfaccore.xp.border import bordered


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
        if not isinstance(self.kernel, tuple | list) or len(self.kernel) not in (1, 2, 3) or min(self.kernel) < 1:
            raise ValueError(f"kernel is {self.kernel}; need a tuple of 1, 2 or 3 sizes of at least 1, one an axis")
        put(self, "kernel", tuple(self.kernel))
        axes = len(self.kernel)
        for name, least in (("stride", 1), ("dilation", 1), ("padding", 0)):
            value: Any = getattr(self, name)
            if isinstance(value, str):
                value = self._named_padding(value)
            value = (value,) * axes if isinstance(value, int) else tuple(value)
            if name == "padding":
                value = tuple((v, v) if isinstance(v, int) else tuple(v) for v in value)
            flat = [v for pair in value for v in pair] if name == "padding" else value
            pairs = name != "padding" or all(len(pair) == 2 for pair in value)
            if len(value) != axes or min(flat) < least or not pairs:
                need = "numbers or (low, high) pairs" if name == "padding" else "numbers"
                raise ValueError(f"{name} is {value} for kernel {self.kernel}; need {axes} {need} of at least {least}")
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


def pad(image: Array, padding: tuple[tuple[int, int], ...]) -> Array:
    """Zeros around the spatial axes of (blocks, batch, *spatial, C)."""
    return bordered(image, padding, 2)


def unfold(image: Array, w: Window, bias: bool) -> Array:
    """Patches of (blocks, batch, *spatial, C) as rows (blocks, batch, positions, d_in), ones last if `bias`."""
    xp = namespace(image)
    padded = pad(image, w.padding)
    if is_numpy(padded):
        return _copied(padded, w, bias)
    if is_tracer(padded):
        return _gathered(padded, w, w.outputs(tuple(image.shape[2:-1])), bias)
    parts = list(_offsets(padded, w, w.outputs(tuple(image.shape[2:-1]))))
    if bias:
        parts.append(xp.ones_like(parts[0][..., :1]))
    rows = parts[0] if len(parts) == 1 else xp.concat(parts, axis=-1)
    return xp.reshape(rows, (*image.shape[:2], -1, rows.shape[-1]))


def offsets(image: Array, w: Window) -> Iterator[Array]:
    """For each kernel position the image as all windows see it there, (blocks, batch, *outputs, C)."""
    yield from _offsets(pad(image, w.padding), w, w.outputs(tuple(image.shape[2:-1])))


def _offsets(padded: Array, w: Window, outputs: tuple[int, ...]) -> Iterator[Array]:
    for offset in product(*map(range, w.kernel)):
        spans = (
            slice(d * r, d * r + (o - 1) * s + 1, s)
            for d, r, o, s in zip(offset, w.dilation, outputs, w.stride, strict=True)
        )
        yield padded[:, :, *spans, :]


def _gathered(padded: Array, w: Window, outputs: tuple[int, ...], bias: bool) -> Array:
    """`unfold` of a padded image as one gather: XLA compiles slices one by one, each kernel position's anew."""
    xp = namespace(padded)
    axes = len(w.kernel)
    split = []
    for axis, (o, s, k, r) in enumerate(zip(outputs, w.stride, w.kernel, w.dilation, strict=True), start=2):
        places = np.arange(o)[:, None] * s + np.arange(k) * r
        padded = xp.take(padded, xp.asarray(places.reshape(-1)), axis=axis, mode="clip")
        split += [o, k]
    batch = padded.shape[:2]
    parts = xp.reshape(padded, (*batch, *split, padded.shape[-1]))
    ends = range(2, 2 + 2 * axes, 2)
    parts = xp.permute_dims(parts, (0, 1, *ends, *(end + 1 for end in ends), 2 + 2 * axes))
    rows = xp.reshape(parts, (*batch, prod(outputs), prod(w.kernel) * padded.shape[-1]))
    return xp.concat([rows, xp.ones_like(rows[..., :1])], axis=-1) if bias else rows


def _copied(padded: np.ndarray, w: Window, bias: bool) -> np.ndarray:
    """`unfold` of a padded image as one strided copy, in runs of a kernel row at dilation 1."""
    axes = tuple(range(2, padded.ndim - 1))
    reach = [(k - 1) * r + 1 for k, r in zip(w.kernel, w.dilation, strict=True)]
    views = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=axes)
    views = views[:, :, *(slice(None, None, s) for s in w.stride), :, *(slice(None, None, r) for r in w.dilation)]
    views = np.moveaxis(views, len(axes) + 2, -1)
    outputs = views.shape[2 : 2 + len(axes)]
    inner = views.shape[2 + len(axes) :]
    size = prod(inner)
    rows = np.empty((*views.shape[:2], *outputs, size + bias), padded.dtype)
    rows[..., :size].reshape(*views.shape[:2], *outputs, *inner)[...] = views  # splitting one axis is always a view
    rows[..., size:] = 1
    return rows.reshape(*views.shape[:2], -1, size + bias)
