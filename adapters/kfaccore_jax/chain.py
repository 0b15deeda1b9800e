"""What a dict of layers and a function do not show to Taylor rules: the order of the layers, and what mixes numbers."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

Array = Any


def chained(params: dict[str, Array], x: Array, order: Sequence[str] | None) -> dict[str, Array]:
    """The layers in their order; ValueError where neither `order`, the dict, names that count nor the
    widths tell it."""
    if order is not None:
        if sorted(order) != sorted(params):
            raise ValueError(f"order has layers {list(order)}; params have {list(params)}: name each once")
        return {name: params[name] for name in order}
    if isinstance(params, OrderedDict) or list(params) != sorted(params):
        return params  # jax sorts the names of a plain dict: here it did not
    counted = _counted(list(params))
    if counted:
        return {name: params[name] for name in counted}
    widths = {name: (W.shape[1] - 1, W.shape[0]) for name, W in params.items()}
    starts = [x.shape[-1:], {d_in for d_in, _ in widths.values()}]  # the second for a message about the points
    for found in (list(islice((way for width in start for way in _ways(widths, width)), 2)) for start in starts):
        way = found[0] if found else ()
        other = found[1] if len(found) > 1 else _swapped(way, widths)
        if way and not other:
            return {name: params[name] for name in way}
        if way:
            raise ValueError(
                f"the order of the layers {list(params)} cannot be seen: jax sorts the names of a dict, these are "
                f"sorted, and their widths go together as {' -> '.join(way)} and as {' -> '.join(other)}: "
                f"give order=(first, ..., last)"
            )
    return params


def _counted(names: list[str]) -> list[str]:
    """Names that differ by a number at their end alone, by that number; [] for others."""
    found = [re.fullmatch(r"(.*?)(\d+)", name) for name in names]
    if any(one is None for one in found) or len({one[1] for one in found if one}) > 1:
        return []
    return [name for _, name in sorted((int(one[2]), name) for one, name in zip(found, names, strict=True) if one)]


def _ways(left: dict[str, tuple[int, int]], width: int) -> Iterator[tuple[str, ...]]:
    """Orders in which each layer takes what the one before gives, but for layers of equal shapes in turn."""
    if not left:
        yield ()
    first = {shape: name for name, shape in reversed(left.items()) if shape[0] == width}
    for (_, d_out), name in first.items():
        rest = {other: shape for other, shape in left.items() if other != name}
        yield from ((name, *way) for way in _ways(rest, d_out))


def _swapped(way: tuple[str, ...], widths: dict[str, tuple[int, int]]) -> tuple[str, ...]:
    """Another order as good, two layers of equal shapes being exchanged; () where there are none."""
    for i, one in enumerate(way):
        for j in range(i + 1, len(way)):
            if widths[way[j]] == widths[one]:
                return (*way[:i], way[j], *way[i + 1 : j], one, *way[j + 1 :])
    return ()


def elementwise(activation: Callable[[Array], Array], shape: tuple[int, ...], g: Array) -> Array:
    """g, where each number of the activation depends on its own alone: a tangent of random size must come out as the
    slope times it, which it does not where numbers of a layer or points are mixed."""
    rng = np.random.default_rng(0)
    with jax.ensure_compile_time_eval():  # numbers, not tracers, unless the activation holds some
        z = jnp.asarray(rng.normal(size=shape), g.dtype)
        tangent = jnp.asarray(rng.uniform(1, 2, size=shape) * rng.choice([-1, 1], size=shape), g.dtype)
        found = jax.jvp(activation, (z,), (tangent,))[1]
        told = jax.jvp(activation, (z,), (jnp.ones_like(z),))[1] * tangent
        same = _close(found, told)
    return _answered(
        same,
        g,
        f"the activation {getattr(activation, '__name__', activation)} is not elementwise: Taylor rules need one whose "
        f"every output depends on its own input alone",
    )


def own_points(back: Callable[[Array], tuple[Array]], r: Array) -> Array:
    """dr/d(slots) of each point; by a pullback with random weights, they must be the points' own."""
    g = back(jnp.ones_like(r))[0]
    weights = jnp.asarray(np.random.default_rng(0).uniform(1, 2, size=r.shape), r.dtype)
    return _answered(
        _close(back(weights)[0], g * weights[:, None, None]),
        g,
        "the residual of a point depends on other points (a mean over them, a pair of points): a record holds the "
        "derivative by each point's own slots; give one number a point, of that point's slots alone",
    )


def _close(found: Array, told: Array) -> Array:
    """Equal to the square root of the rounding, relative to the largest number; where told is not finite, yes."""
    size = jnp.nan_to_num(jnp.abs(told), nan=0.0, posinf=0.0).max()
    apart = jnp.nan_to_num(jnp.abs(found - told), nan=0.0, posinf=0.0)
    return apart.max() <= jnp.finfo(told.dtype).eps ** 0.5 * size


def _answered(same: Array, g: Array, what: str) -> Array:
    if isinstance(same, jax.core.Tracer):
        return jnp.where(same, g, jnp.nan)
    if not same:
        raise ValueError(what)
    return g
