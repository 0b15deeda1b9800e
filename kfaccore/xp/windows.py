"""Windows of an image laid out as rows by strides: one launch a piece, 16 bytes at a time where they lie together."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from math import gcd, prod
from typing import Any

import array_api_compat as aac

from kfaccore.xp.arrays import Array, device_of, namespace
from kfaccore.xp.gpu import ALIGNED
from kfaccore.xp.precision import BFLOAT16, statistics


def framed(image: Array, padding: Sequence[tuple[int, int]], channels: int) -> Array:
    """Images (blocks, batch, *spatial, C) in memory of their own, zeros around them, and after their channels up to
    `channels`; of torch in the precision in force."""
    foreign: Any = image
    spatial = [low + size + high for (low, high), size in zip(padding, image.shape[2:-1], strict=True)]
    shape = (*image.shape[:2], *spatial, channels)
    if aac.is_torch_array(image):
        import torch

        half = image.dtype == torch.float32 and statistics() == BFLOAT16
        out: Any = foreign.new_zeros(shape, dtype=torch.bfloat16 if half else image.dtype)
    else:
        out = namespace(image).zeros(shape, dtype=image.dtype, device=device_of(image))
    inside = [slice(low, low + size) for (low, _), size in zip(padding, image.shape[2:-1], strict=True)]
    out[(slice(None), slice(None), *inside, slice(0, image.shape[-1]))] = foreign
    return out


def windows(
    frame: Array,
    outputs: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    ones: bool,
) -> Array:
    """Rows (blocks, batch * positions, width) of the windows of contiguous frames (blocks, batch, *spatial, C): columns
    (kernel positions, channel), one of `ones`, and anything up to an aligned width."""
    blocks, batch = frame.shape[:2]
    found = prod(kernel) * frame.shape[-1]
    width = -(-(found + ones) // ALIGNED) * ALIGNED
    rows = _empty(frame, (blocks, batch * prod(outputs), width))
    if ones:
        rows[..., found] = 1
    into, source = _in_runs(rows[..., :found], frame)
    steps = _steps(source)
    moves = [step * s for step, s in zip(steps[2:-1], stride, strict=True)]
    reads = [step * r for step, r in zip(steps[2:-1], dilation, strict=True)]
    shape = (blocks, batch, *outputs, *kernel, source.shape[-1])
    # splitting axes is always a view
    target = into.view(shape) if aac.is_torch_array(into) else into.reshape(shape)
    target[...] = _strided(source, shape, (*steps[:2], *moves, *reads, 1))
    return rows


def _in_runs(rows: Any, frame: Any) -> tuple[Any, Any]:
    """Both with as many of a pixel's channels as one number as 16 bytes hold."""
    if not aac.is_torch_array(frame):
        return rows, frame
    import torch

    size = frame.element_size()
    run = gcd(frame.shape[-1] * size, 16)
    wide = {8: torch.complex64, 16: torch.complex128}.get(run)
    return (rows, frame) if wide is None or size == run else (rows.view(wide), frame.view(wide))


def _steps(x: Any) -> list[int]:
    """From one index of each axis to the next, in numbers."""
    return list(x.stride()) if aac.is_torch_array(x) else [step // x.itemsize for step in x.strides]


def _strided(x: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    if aac.is_torch_array(x):
        return x.as_strided(shape, strides, x.storage_offset())
    tricks = import_module(f"{type(x).__module__.split('.')[0]}.lib.stride_tricks")
    return tricks.as_strided(x, shape, tuple(step * x.itemsize for step in strides))


def _empty(like: Any, shape: tuple[int, ...]) -> Any:
    if aac.is_torch_array(like):
        return like.new_empty(shape)
    return namespace(like).empty(shape, dtype=like.dtype, device=device_of(like))
