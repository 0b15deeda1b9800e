"""Inputs of a convolution: the image is kept, patches are unfolded only where a method needs rows.

Columns of a patch follow the image's own axes, (kernel positions..., channel), and a last one for the bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from math import prod
from operator import add, iadd

from kfaccore import xp as kernels
from kfaccore.convolution.phases import autocorrelates, fft_pays, patch_gram, rows_held
from kfaccore.convolution.pieces import gram_by_windows
from kfaccore.convolution.window import Window, offsets, unfold
from kfaccore.xp import traced
from kfaccore.xp.arrays import Array, device_of, is_numpy, is_tracer, namespace, on_gpu, widen

__all__ = ["Patches", "Window"]

_PIECE = 1 << 19  # numbers of an image whose autocorrelation is taken at once, NumPy aside
_PIECES = 8  # but no more of them


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
        """Groups of channels, each with a matrix of its own."""
        return self.image.shape[0]

    @property
    def spatial(self) -> tuple[int, ...]:
        """Sizes of the image without batch and channels."""
        return tuple(self.image.shape[2:-1])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(blocks, batch, shared, d_in) of the unfolded rows."""
        d_in = prod(self.window.kernel) * self.image.shape[-1] + self.bias
        return self.blocks, self.image.shape[1], prod(self.window.outputs(self.spatial)), d_in

    def gram(self) -> Array:
        """Sum over examples and positions of a a^T, (blocks, d_in, d_in), by the cheapest exact way.

        FFT autocorrelation with border corrections where it pays (1-d and 2-d), else sums over cache-sized chunks of
        unfolded patches; on a GPU over pieces of them, in the precision in force.
        """
        if on_gpu(self.image):
            return gram_by_windows(self.image, self.window, self.bias)
        pays = fft_pays(self.window, tuple(self.image.shape), is_numpy(self.image))
        return self.gram_by_fft() if pays else self.gram_by_chunks()

    def gram_diagonal(self, mask: Array | None = None) -> Array:
        """The diagonal of the gram alone, (blocks, d_in), of positions where mask (batch, shared) holds: nothing is
        unfolded, each kernel position sums the squares that all windows see there."""
        xp = namespace(self.image)
        outputs = self.window.outputs(self.spatial)
        if is_tracer(self.image):
            rows = self.unfold()
            counted = rows if mask is None else xp.where(mask[None, :, :, None], rows, xp.zeros_like(rows))
            return xp.sum(counted * counted, axis=(1, 2))
        axes = tuple(range(1, self.image.ndim - 1))
        parts = (part * part for part in offsets(self.image, self.window))  # one at a time
        if mask is not None:
            counted = xp.reshape(mask, (1, mask.shape[0], *outputs, 1))
            parts = (xp.where(counted, part, xp.zeros_like(part)) for part in parts)
        sums = [xp.sum(part, axis=axes) for part in parts]
        if self.bias:
            ones = xp.ones_like(sums[0][:, :1])
            many = float(self.shape[1] * self.shape[2]) if mask is None else xp.sum(xp.astype(mask, ones.dtype))
            sums.append(ones * many)
        return xp.concat(sums, axis=-1)

    def gram_by_chunks(self) -> Array:
        """The gram from unfolded patches, a chunk of examples at a time: every geometry, and the oracle."""
        xp = namespace(self.image)
        _, batch, positions, d_in = self.shape
        chunk = -(-rows_held(d_in) // (positions * self.blocks))
        if is_tracer(self.image) and chunk < batch:
            return self._gram_in_turns(chunk)
        parts = self.rows(chunk)
        return reduce(
            iadd,  # the first gram is ours to add to
            (kernels.gram(xp.reshape(a, (self.blocks, -1, a.shape[-1]))) for a in parts),
        )

    def _gram_in_turns(self, chunk: int) -> Array:
        """`gram_by_chunks` in a loop of one body, and what is left over."""
        whole = self.shape[1] // chunk

        def of(image: Array) -> Array:
            rows = unfold(image, self.window, self.bias)
            return kernels.gram(namespace(rows).reshape(rows, (self.blocks, -1, rows.shape[-1])))

        found = traced.in_turns((self.image,), chunk, whole, of)
        left = self.image[:, whole * chunk :, ...]
        return found + of(left) if left.shape[1] else found

    def gram_by_fft(self) -> Array:
        """The gram by autocorrelation; ValueError for a geometry that has none."""
        if not autocorrelates(self.window, self.spatial):
            raise ValueError(
                f"{self.window} over an image of {self.spatial} has no autocorrelation form; need 1 or 2 axes no "
                f"shorter than the kernel, and stride or dilation 1: use gram_by_chunks"
            )
        xp = namespace(self.image)
        batch = self.image.shape[1]
        size = prod(self.image.shape[1:])
        # phases, spectra and what is padded are each as large as the image; where calls are launched, each piece costs
        most = 1 if is_numpy(self.image) else _PIECES if str(device_of(self.image)) == "cpu" else 2
        pieces = min(most, -(-size // _PIECE), batch)
        grams = []
        for block in range(self.blocks):
            images = (self.image[block, span, ...] for span in kernels.spans(batch, -(-batch // pieces)))
            grams.append(reduce(add, (self._block_gram(image) for image in images)))
        return xp.stack(grams)

    def rows(self, chunk: int) -> Iterator[Array]:
        """Unfolded rows (blocks, examples, shared, d_in) of `chunk` consecutive examples at a time."""
        for span in kernels.spans(self.image.shape[1], chunk):
            yield unfold(self.image[:, span, ...], self.window, self.bias)

    def unfold(self) -> Array:
        """All rows at once, (blocks, batch, shared, d_in)."""
        return unfold(self.image, self.window, self.bias)

    def mean(self) -> Array:
        """Mean patch of each example, (blocks, batch, 1, d_in), without unfolding."""
        xp = namespace(self.image)
        if is_tracer(self.image):
            return xp.mean(self.unfold(), axis=2, keepdims=True)
        axes = tuple(range(2, self.image.ndim - 1))
        parts = [xp.mean(part, axis=axes) for part in offsets(self.image, self.window)]
        if self.bias:
            parts.append(xp.ones_like(parts[0][..., :1]))
        return xp.concat(parts, axis=-1)[:, :, None, :]

    def concat(self, other: Patches) -> Patches:
        """Both batches; windows must agree."""
        if self.window != other.window or self.bias != other.bias:
            raise ValueError(f"patches differ: {self.window}, bias {self.bias}, and {other.window}, bias {other.bias}")
        return Patches(namespace(self.image).concat([self.image, other.image], axis=1), self.window, self.bias)

    def _block_gram(self, image: Array) -> Array:
        xp = namespace(image)
        A = patch_gram(image, self.window)
        if not self.bias:
            return A
        total = xp.sum(image, axis=0)[None, None, ...]
        axes = tuple(range(2, total.ndim - 1))
        parts = [xp.sum(part, axis=axes)[0, 0, ...] for part in offsets(total, self.window)]
        sums = xp.concat(parts)[:, None]
        count = xp.zeros((1, 1), dtype=A.dtype, device=device_of(A)) + float(image.shape[0] * self.shape[2])
        return xp.concat([xp.concat([A, sums], axis=1), xp.concat([sums.mT, count], axis=1)])
