"""Whose memory an array is: copies where a namespace writes in place, and which arrays share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import array_api_compat as aac

from kfaccore.xp.arrays import Array, is_numpy, namespace, select
from kfaccore.xp.shapes import Shape


def owned(x: Array) -> Array:
    """`x` in memory of its own; as it is where nobody can write to it. Of torch, a tensor that was computed stays
    differentiable; one that training writes to, a leaf, becomes its value."""
    foreign: Any = x
    if aac.is_torch_array(foreign):
        return (foreign.detach() if foreign.is_leaf else foreign).clone()
    if aac.is_jax_array(x) or isinstance(x, Shape):
        return x
    return namespace(x).asarray(x, copy=True)


def instead(flag: Array, given: Array, x: Array) -> Array:
    """`given` where the per-block flag holds, x elsewhere: never the memory of `given`."""
    found = select(flag, given, x)
    return owned(found) if found is given else found


def apart(arrays: dict[str, Array], others: Iterable[object]) -> dict[str, Array]:
    """The arrays, of those that lie in the memory of `others` copies."""
    taken = {memory(x) for x in others} - {None}
    if not taken:
        return arrays
    return {name: owned(x) if memory(x) in taken else x for name, x in arrays.items()}


def memory(x: object) -> object:
    """What is equal of arrays that lie in one allocation; None of numbers, and where nobody can write."""
    foreign: Any = x
    if is_numpy(foreign):
        while is_numpy(foreign.base):
            foreign = foreign.base
        return foreign.ctypes.data if foreign.size else None
    if aac.is_torch_array(foreign):
        return foreign.untyped_storage().data_ptr() or None
    return foreign.data.mem.ptr or None if aac.is_cupy_array(foreign) else None
