"""A leaf meets data: the call that an equation of it is, and what becomes of leaves that no rule follows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from kfaccore_jax.rules import RULES, lone, paired, valued
from kfaccore_jax.tags import Out, Param, Tag
from kfaccore_jax.walk import Walk


def as_calls(walk: Walk, place: int, inputs: list, tags: list[Tag], name: str) -> list:
    """The operands of an equation that no rule knows. A leaf is still seen where its value was repeated, one row an
    example, or multiplied by an array: its value is then a call of its own. Any other leaf is a leak."""
    found = list(inputs)
    left: list[Tag] = []
    for i, tag in enumerate(tags):
        key = f"{walk.prefix}{place}@{i}" if not (isinstance(tag, Param) and tag.by is not None) else tag.place
        if isinstance(tag, Param) and (tag.by is not None or _repeated(walk, tag, key)):
            walk.late |= {key} if tag.by is not None else set()
            found[i] = walk.capture(key, *valued(tag, inputs[i]), inputs[i])
        else:
            left.append(tag)
    walk.leak(left, name)
    return found


def _repeated(walk: Walk, tag: Param, key: str) -> bool:
    """Whether a leaf's value is repeated, over the batch as the plan will tell."""
    plain = tag.scale is None
    return plain and (tag.layout.repeated if walk.known is None else key in walk.known)


def met(walk: Walk, place: int, eqn: Any, inputs: list, tags: list[Tag], at: int, y: Any) -> tuple[Any, Tag] | None:
    """Output and tag of an equation in which one leaf meets data, or None if no rule knows it."""
    name = eqn.primitive.name
    tag = tags[at]
    other: Any = inputs[1 - at] if len(inputs) == 2 else None
    assert isinstance(tag, Param)
    key = f"{walk.prefix}{place}"
    shape = tuple(y.shape)
    if tag.by is not None:
        if name != "mul":
            return None
        other = other * tag.by
        tag = replace(tag, by=None)
    plain = tag.factor == 1.0 and tag.scale is None
    factor = tag.factor if tag.scale is None else tag.factor * tag.scale
    if name in RULES:
        if (call := RULES[name](eqn, tag, at)) is None:
            return None
        x = inputs[1][..., 0] if call.kind == "embedding" else other if plain else other * factor
        return walk.capture(key, call, x, y), Out(key, tag.layout.of(shape))
    if name in ("add", "add_any", "sub"):
        sign = -1.0 if name == "sub" and at == 1 else 1.0
        out = tags[1 - at]
        if isinstance(out, Out) and not (name == "sub" and at == 0):
            bias = paired(walk.calls[out.key], tuple(walk.outputs[out.key].shape), out, tag, tag.factor * sign)
            if bias is not None and shape == tuple(out.layout.shape):
                walk.calls[out.key] = replace(walk.calls[out.key], bias=bias)
                return y, None
        if _of_own_shape(walk, tag, key, shape):  # what is added has no derivative by the leaf
            return y, replace(tag.times(sign), place=key)
        if plain and sign == 1.0:
            return walk.capture(key, lone("bias", eqn, tag), None, y), None
        return walk.capture(key, lone("scale", eqn, tag), jnp.full(shape, factor * sign, y.dtype), y), None
    if name == "mul":
        if tags[at] is tag and _of_own_shape(walk, tag, key, shape):
            by = jnp.broadcast_to(other, shape)
            return y, replace(tag, layout=tag.layout.stretch(shape), place=key, by=by)
        x = jnp.broadcast_to(other if plain else other * factor, shape)
        return walk.capture(key, lone("scale", eqn, tag), x, y), None
    return None


def _of_own_shape(walk: Walk, tag: Param, key: str, shape: tuple[int, ...]) -> bool:
    """Whether a product left a leaf's elements where they were, and nobody has asked for a call yet."""
    if tag.stack:
        return False
    if walk.known is not None:
        return key not in walk.known
    return key not in walk.asked and not tag.layout.stretch(shape).repeated
