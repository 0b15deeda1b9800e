"""Rows that all examples share beside rows of their own, as in `jax.vmap(jax.hessian(...))`: the first layer meets the
examples, and directions that are one for all of them.

Such a call is given a row an example: its input is repeated, and a probe (batch, *output) is followed, as a second
value of what the call gives, to where that meets the examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from kfaccore_jax.order import grown, inner, places
from kfaccore_jax.sums import ELEMENTWISE
from kfaccore_jax.tags import Joined, Lifted, Out, Param, Tag

if TYPE_CHECKING:
    from kfaccore_jax.calls import Call
    from kfaccore_jax.walk import Walk


@dataclass(frozen=True)
class Lifts:
    """keys: the calls; axes: {place of an equation: the axis of its result that the examples are on, -1 for several};
    batched: of `plan`; n: how many examples, set by each evaluation."""

    keys: frozenset[str]
    axes: Mapping[str, int]
    batched: tuple[int, ...]
    n: int = 0

    def without(self, lost: set[str]) -> Lifts | None:
        """Those left, None where none is."""
        left = self.keys - lost
        return replace(self, keys=left) if left else None

    def raised(self, call: Call, x: Any, y: Any) -> tuple[Call, Any, Any]:
        """A call, its input and its output with the examples in front."""
        call = replace(call, x=call.x.within(False), y=call.y.within(False))
        return call, jnp.broadcast_to(x, (self.n, *x.shape)), jnp.broadcast_to(y, (self.n, *y.shape))


def lifts_of(one: Any, two: Any, calls: Mapping[str, Call], batched: tuple[int, ...]) -> Lifts | None:
    """The products on shared rows whose leaf has rows of examples too; one, two: the jaxpr at two batch sizes."""
    own = {call.leaf for call in calls.values() if call.batch is not None}
    common = [key for key, call in calls.items() if call.batch is None and call.leaf in own]
    keys = frozenset(key for key in common if calls[key].kind == "dense" and not calls[key].bias)
    if not keys or one is None:
        return None
    axes: dict[str, int] = {}
    _examples_at(axes, getattr(one, "jaxpr", one), getattr(two, "jaxpr", two), "")
    return Lifts(keys, axes, batched)


def _examples_at(axes: dict[str, int], one: Any, two: Any, prefix: str) -> None:
    for p, q, key in places(one, two, prefix):
        bodies = inner(p, q)
        if bodies is not None:
            _examples_at(axes, *bodies, f"{key}.")
        for v, w in zip(p.outvars, q.outvars, strict=True):
            if found := grown(v, w):
                axes[key] = found[0] if len(found) == 1 else -1


def followed_up(traces: Callable[[Lifts | None], list[tuple]], lifts: Lifts | None) -> tuple[list[tuple], Lifts | None]:
    """The traces at both sizes, each with its walk first, with those calls lifted that can be followed; these."""
    while True:
        pairs = traces(lifts)
        lost = pairs[0][0].sunk | pairs[1][0].sunk
        if lifts is None or not lost:
            return pairs, lifts
        lifts = lifts.without(lost)


def with_each(walk: Walk, tag: Tag) -> Tag:
    """The tag of what a call gave; of a lifted one with what it gives each example."""
    return Lifted(frozenset({tag.key}), walk.each[tag.key]) if isinstance(tag, Out) and tag.key in walk.each else tag


def sunk(walk: Walk, tags: list[Tag]) -> list[Tag]:
    """The tags without those of lifted calls, which are noted: nothing follows them here."""
    walk.sunk |= {key for tag in tags if isinstance(tag, Lifted) for key in tag.keys}
    return [None if isinstance(tag, Lifted) else tag for tag in tags]


Done = tuple[list, list[Tag]]  # results of an equation and their tags


def spread(
    walk: Walk, place: int, eqn: Any, inputs: list, tags: list[Tag], evaluate: Callable[[list], list]
) -> tuple[list, list[Tag], Done | None]:
    """Operands of an equation on values of lifted calls, with their tags, and what it gives where that is done here:
    what has no examples yet is done for each of them; an elementwise equation, or one that repeats its operand, puts
    them on their axis."""
    lifts = walk.lifts
    assert lifts is not None
    ours = [i for i, tag in enumerate(tags) if isinstance(tag, Lifted)]
    each = [tag.each if isinstance(tag, Lifted) else x for tag, x in zip(tags, inputs, strict=True)]
    axis = lifts.axes.get(f"{walk.prefix}{place}")
    shape = tuple(eqn.outvars[0].aval.shape)
    name = eqn.primitive.name
    if any(isinstance(tag, Param | Joined) for tag in tags):
        return inputs, sunk(walk, tags), None
    if axis is None:
        found = jax.vmap(lambda *values: evaluate(list(values)), [0 if i in ours else None for i in range(len(tags))])
        keys = frozenset(key for tag in tags if isinstance(tag, Lifted) for key in tag.keys)
        return inputs, tags, (evaluate(inputs), [Lifted(keys, x) for x in found(*each)])
    flat = all(len(inputs[i].shape) == len(shape) and inputs[i].shape[axis] == 1 for i in ours)
    if axis >= 0 and shape[axis] == lifts.n and name == "broadcast_in_dim":
        one = (*shape[:axis], 1, *shape[axis + 1 :])
        whole = jax.vmap(lambda x: jax.lax.broadcast_in_dim(x, one, eqn.params["broadcast_dimensions"]))(each[0])
        return inputs, tags, ([_on_axis(whole, axis)], [None])
    if axis < 0 or shape[axis] != lifts.n or name not in ELEMENTWISE or not flat:
        return inputs, sunk(walk, tags), None
    met = [_on_axis(x, axis) if i in ours else x for i, x in enumerate(each)]
    return met, [None if isinstance(tag, Lifted) else tag for tag in tags], None


def _on_axis(each: Any, axis: int) -> Any:
    """Values of examples, in front, along an axis where each has one."""
    return jnp.moveaxis(jnp.squeeze(each, axis + 1), 0, axis)
