"""Arrays of several layers as the blocks of one, and the other way: one copy in, views out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import array_api_compat as aac

from kfaccore.xp.arrays import Array, is_numpy, namespace


def together(arrays: Sequence[Array], axis: int = 0) -> Array:
    """Arrays that have a blocks axis joined along it; one alone is handed on as it is."""
    return arrays[0] if len(arrays) == 1 else namespace(*arrays).concat(list(arrays), axis=axis)


def stacked(arrays: Sequence[Array]) -> Array:
    """Arrays without a blocks axis as the blocks of one; one alone is a view."""
    return arrays[0][None, ...] if len(arrays) == 1 else namespace(*arrays).stack(list(arrays))


def unstacked(x: Array) -> Sequence[Array]:
    """The blocks of x one by one, without their axis: views where there are views."""
    foreign: Any = x
    if aac.is_torch_array(foreign):
        return foreign.unbind(0)
    return list(x) if is_numpy(x) else [x[i, ...] for i in range(x.shape[0])]


def parted(x: Array, each: int) -> Sequence[Array]:
    """The blocks of x, `each` at a time: views where there are views."""
    foreign: Any = x
    if aac.is_torch_array(foreign):
        return foreign.split(each)
    return [x[i : i + each, ...] for i in range(0, x.shape[0], each)]
