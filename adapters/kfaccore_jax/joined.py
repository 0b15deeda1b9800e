"""Leaves that the model concatenates before it uses them, as fused gates do: the same equation on each by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kfaccore_jax.tags import SAME, Joined, Param, Tag

MOVES = SAME | {"reshape", "broadcast_in_dim", "transpose", "squeeze"}


def concatenated(eqn: Any, inputs: list[Any], tags: list[Tag]) -> Joined | None:
    """The leaves of a concatenation of nothing else, each seen once."""
    known = [tag for tag in tags if isinstance(tag, Param) and tag.by is None and not tag.layout.repeated]
    if eqn.primitive.name != "concatenate" or len(known) < len(tags):
        return None
    return Joined(int(eqn.params["dimension"]), tuple(inputs), tuple(known))


def alike(eqn: Any, tag: Joined, at: int, inputs: list[Any]) -> tuple[Callable, list[Any], int] | None:
    """The equation on each part: (function of the parts and the other operand, its arguments, axis of the result along
    which its parts are to be concatenated again, -1 where it is one value); None for what no rule knows."""
    name = eqn.primitive.name
    if name in MOVES and len(eqn.outvars) == 1:
        return _moved(eqn, tag)
    other = [x for i, x in enumerate(inputs) if i != at]
    if len(other) != 1:
        return None
    if name == "dot_general":
        return _product(eqn, tag, at, other[0])
    shape = tuple(eqn.outvars[0].aval.shape)
    if name in ("add", "add_any", "sub", "mul") and len(shape) == tag.values[0].ndim:
        return _elementwise(eqn, tag, at, jnp.broadcast_to(other[0], shape))
    return None


def _moved(eqn: Any, tag: Joined) -> tuple[Callable, list[Any], int] | None:
    """Parts moved one by one, and the axis they are then joined along."""
    name = eqn.primitive.name
    p = eqn.params
    shape = tuple(eqn.outvars[0].aval.shape)
    rank = tag.values[0].ndim
    if name == "transpose":
        order = tuple(p["permutation"])
        return lambda *parts: [jnp.transpose(x, order) for x in parts], list(tag.values), order.index(tag.axis)
    if name in SAME:
        dtype = eqn.outvars[0].aval.dtype
        return lambda *parts: [jnp.asarray(x, dtype) for x in parts], list(tag.values), tag.axis
    if name == "broadcast_in_dim":
        axis = p["broadcast_dimensions"][tag.axis]
        places = tuple(p["broadcast_dimensions"])
    else:  # axes of one element come or go
        whole = list(tag.values[0].shape)
        whole[tag.axis] = sum(tag.sizes)
        real = [i for i in range(rank) if whole[i] != 1]
        if [n for n in whole if n != 1] != [n for n in shape if n != 1] or tag.axis not in real:
            return None
        places = tuple(i for i, n in enumerate(shape) if n != 1)
        axis = places[real.index(tag.axis)]

    def one(x: Any) -> Any:
        wanted = (*shape[:axis], x.shape[tag.axis], *shape[axis + 1 :])
        if name == "broadcast_in_dim":
            return jax.lax.broadcast_in_dim(x, wanted, places)
        return jnp.reshape(x, wanted)

    return lambda *parts: [one(x) for x in parts], list(tag.values), axis


def _product(eqn: Any, tag: Joined, at: int, x: Any) -> tuple[Callable, list[Any], int] | None:
    """Products with the parts: joined again along a free axis, added where the parts were contracted."""
    numbers = eqn.params["dimension_numbers"]
    options = {name: eqn.params[name] for name in ("precision", "preferred_element_type")}
    contract = tuple(numbers[0][at])
    batch = tuple(numbers[1][at])
    if tag.axis in batch:
        return None

    def product(w: Any, x: Any) -> Any:
        pair = (w, x) if at == 0 else (x, w)
        return jax.lax.dot_general(*pair, numbers, **options)

    if tag.axis not in contract:
        free = [i for i in range(tag.values[0].ndim) if i not in (*contract, *batch)]
        axis = len(batch) + free.index(tag.axis)
        if at == 1:
            axis += x.ndim - len(contract) - len(batch)
        return lambda *args: [product(w, args[-1]) for w in args[:-1]], [*tag.values, x], axis
    along = numbers[0][1 - at][contract.index(tag.axis)]

    def summed(*args: Any) -> Any:
        pieces = _cut(args[-1], tag.sizes, along)
        total: Any = 0
        for w, piece in zip(args[:-1], pieces, strict=True):
            total = total + product(w, piece)
        return [total]

    return summed, [*tag.values, x], -1


def _elementwise(eqn: Any, tag: Joined, at: int, x: Any) -> tuple[Callable, list[Any], int]:
    """A sum or product with the parts, one by one."""
    named = {"add": jnp.add, "add_any": jnp.add, "sub": jnp.subtract, "mul": jnp.multiply}
    operation = named[eqn.primitive.name]

    def one(w: Any, piece: Any) -> Any:
        return operation(w, piece) if at == 0 else operation(piece, w)

    def each(*args: Any) -> list[Any]:
        pieces = _cut(args[-1], tag.sizes, tag.axis)
        return [one(w, piece) for w, piece in zip(args[:-1], pieces, strict=True)]

    return each, [*tag.values, x], tag.axis


def _cut(x: Any, sizes: list[int], axis: int) -> list[Any]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [jax.lax.slice_in_dim(x, end - n, end, axis=axis) for n, end in zip(sizes, ends, strict=True)]
