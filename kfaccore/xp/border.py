"""Zeros around an array."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import array_api_compat as aac

from kfaccore.xp.arrays import Array, device_of, namespace


def bordered(x: Array, widths: Sequence[tuple[int, int]], first: int) -> Array:
    """`x` with (low, high) zeros on each of its axes from `first` on; x itself where there are none."""
    if not any(low or high for low, high in widths):
        return x
    foreign: Any = x
    if aac.is_torch_array(foreign):
        from torch.nn.functional import pad

        after = x.ndim - first - len(widths)
        pairs = [(0, 0)] * after + list(reversed(widths))  # torch counts axes from the last
        return pad(foreign, [width for pair in pairs for width in pair])
    xp = namespace(x)
    for axis, (low, high) in enumerate(widths, start=first):
        shapes = [(*x.shape[:axis], width, *x.shape[axis + 1 :]) for width in (low, high)]
        sides = [xp.zeros(shape, dtype=x.dtype, device=device_of(x)) for shape in shapes]
        if low or high:
            x = xp.concat([sides[0], x, sides[1]], axis=axis)
    return x
