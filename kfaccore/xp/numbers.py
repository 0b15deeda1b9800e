"""Numbers of a rule in one code for all namespaces: Python floats and bools on the host, 0-d arrays on tracers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, TypeVar

import numpy as np

from kfaccore.xp.arrays import Array, is_tracer, namespace, on_gpu, to_host
from kfaccore.xp.factorise import widest

Number = float | Array  # a Python number, or a 0-d array of any namespace
T = TypeVar("T")


def numbers(x: Array) -> Array:
    """`x` for sums over layers: float64 on the host; on tracers in the widest dtype JAX has, float32 without x64."""
    return namespace(x).astype(x, widest(x)) if is_tracer(x) else to_host(x).astype(float)


def number(x: Number) -> Number:
    """A 0-d array as a Python float; on tracers as `numbers` has it."""
    return numbers(x) if is_tracer(x) else float(x)


def read(values: Sequence[Number]) -> list[Any]:
    """`numbers` of each, 0-d arrays as `number` has them: those on a GPU come to the host in one copy a dtype, as the
    host waits for the device at every copy."""
    found: list[Any] = list(values)
    waiting: dict[Any, list[int]] = {}
    for i, x in enumerate(found):
        if on_gpu(x):
            waiting.setdefault(x.dtype, []).append(i)
    for places in waiting.values():
        arrays = [found[i] for i in places]
        xp = namespace(arrays[0])
        whole = to_host(xp.concat([xp.reshape(x, (-1,)) for x in arrays]))
        ends = np.cumsum([math.prod(x.shape) for x in arrays])
        for i, x, part in zip(places, arrays, np.split(whole, ends[:-1]), strict=True):
            found[i] = part.reshape(x.shape)
    return [number(x) if isinstance(x, bool | int | float) or not x.shape else numbers(x) for x in found]


def stack(values: Sequence[Number]) -> Array:
    """A vector of numbers, float64 on the host."""
    arrays = [x for x in values if is_tracer(x)]
    if not arrays:
        return np.array(values)
    xp = namespace(arrays[0])
    return xp.stack([xp.asarray(x, dtype=arrays[0].dtype) for x in values])


def pick(flag: bool | Array, yes: Number, no: Number) -> Number:
    """`yes` where the flag holds, `no` otherwise; both are evaluated."""
    if isinstance(flag, bool | np.bool_):
        return yes if flag else no
    return namespace(flag).where(flag, _plain(yes), _plain(no))


def _plain(x: Number) -> Number:
    """A code as the integer it stands for: JAX takes no enum."""
    return int(x) if isinstance(x, IntEnum) else x


def when(flag: bool | Array, yes: Callable[[], T], no: Callable[[], T]) -> T:
    """yes() or no(), of one dtype: only one is run, `jax.lax.cond` on tracers."""
    if is_tracer(flag):
        import jax

        return jax.lax.cond(flag, yes, no)
    return yes() if flag else no()


def finite(x: Number) -> bool | Array:
    """Whether a number is neither NaN nor infinite."""
    return math.isfinite(x) if isinstance(x, int | float) else namespace(x).isfinite(x)


def root(x: Number) -> Number:
    """The square root of a number that is not negative."""
    return math.sqrt(x) if isinstance(x, int | float) else namespace(x).sqrt(x)
