"""Arrays of several layers as the blocks of one, and the other way: one copy in, views out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import array_api_compat as aac

from kfaccore.xp.arrays import Array, is_numpy, is_tracer, namespace


def together(arrays: Sequence[Array], axis: int = 0) -> Array:
    """Arrays that have a blocks axis joined along it; one alone is handed on as it is."""
    if len(arrays) == 1:
        return arrays[0]
    if axis == 0 and aac.is_torch_array(arrays[0]):
        known = _evenly(arrays)
        if known is not None and known.is_contiguous():
            return known.flatten(0, 1)
    return namespace(*arrays).concat(list(arrays), axis=axis)


def stacked(arrays: Sequence[Array]) -> Array:
    """Arrays without a blocks axis as the blocks of one: a view of one alone, and of slices at equal distances."""
    if len(arrays) == 1:
        return arrays[0][None, ...]
    known = _evenly(arrays) if aac.is_torch_array(arrays[0]) else None
    return namespace(*arrays).stack(list(arrays)) if known is None else known


def _evenly(arrays: Sequence[Array]) -> Any | None:
    """Tensors alike that lie at equal distances in one memory as a stack without a copy; None for others."""
    parts: list[Any] = list(arrays)
    first = parts[0]
    start = first.storage_offset()
    step = parts[1].storage_offset() - start
    memory = first.untyped_storage().data_ptr()
    for i, x in enumerate(parts):
        same = x.is_cpu == first.is_cpu and x.dtype == first.dtype
        alike = same and x.shape == first.shape and x.stride() == first.stride()
        if not alike or x.storage_offset() != start + i * step or x.untyped_storage().data_ptr() != memory:
            return None
    return first.as_strided((len(parts), *first.shape), (step, *first.stride())) if step > 0 else None


def unstacked(x: Array) -> Sequence[Array]:
    """The blocks of x one by one, without their axis: views where there are views."""
    foreign: Any = x
    if aac.is_torch_array(foreign):
        return foreign.unbind(0)
    if is_tracer(x):
        return [block[0, ...] for block in _traced(foreign, 1)]
    return list(x) if is_numpy(x) else [x[i, ...] for i in range(x.shape[0])]


def parted(x: Array, each: int) -> Sequence[Array]:
    """The blocks of x, `each` at a time: views where there are views."""
    foreign: Any = x
    if aac.is_torch_array(foreign):
        return foreign.split(each)
    if is_tracer(x):
        return _traced(foreign, each)
    return [x[i : i + each, ...] for i in range(0, x.shape[0], each)]


def _traced(x: Any, each: int) -> list[Any]:
    """The blocks of a tracer, cut at places that the compiler does not know: XLA on a CPU compiles a slice at a known
    place, and all that is fused with it, as a kernel of its own (17 ms a layer), and slices that read their place
    once for all layers."""
    starts = tuple(range(0, x.shape[0], each))
    if len(starts) == 1:
        return [x]
    import jax

    places = tuple(jax.numpy.asarray(start, "int32") for start in starts)
    never = jax.lax.stop_gradient(x)[(0,) * x.ndim] > float("inf")
    places = jax.lax.cond(never, lambda: places[::-1], lambda: places)
    return [jax.lax.dynamic_slice_in_dim(x, start, each) for start in places]
