"""A batch of one example by way of two alike: a model writes other equations for an axis of one element, as
`broadcast_to` and `matmul` do, so that the places of its calls are no longer those of the plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from kfaccore import Ids, Patches
from kfaccore_jax.capture import Captured, remembered
from kfaccore_jax.records import Pair


@dataclass(frozen=True)
class One(Captured):
    """What a capture of the example twice says of it alone; right where no example's output depends on another."""

    _two: Captured

    def _pairs(self, g: Any) -> dict[str, Pair]:
        shared = {layer.name for layer in self.plan.layers if layer.common}
        found = self._two._pairs(g)
        return {name: pair if name in shared else (_first(pair[0]), pair[1][:, :, ::2]) for name, pair in found.items()}

    def _masked(self, mask: Any, draws: int) -> dict[str, Any]:
        found = self._two._masked(twice(mask), draws)
        return {name: None if rows is None else rows[::2] for name, rows in found.items()}


def alone(two: Captured, params: Any, args: tuple) -> One:
    """The capture of one example from that of two: the second one's cotangent is zero."""

    @remembered
    def pull(cotangent: Any) -> tuple[Any, dict]:
        return two._pull(jax.tree.map(lambda c: jnp.concatenate([c, jnp.zeros_like(c)]), cotangent))

    half = jax.tree.map(lambda f: f[: f.shape[0] // 2], two.prediction)
    aux = two.plan.apply(params, *args)[1] if two.plan.has_aux else None
    return One(two.plan, half, aux, two.params, pull, two._data, two._shapes, 1, two._args, two)


def twice(x: Any) -> Any:
    """An array with its only example repeated."""
    return jnp.concatenate([jnp.asarray(x)] * 2)


def _first(a: Any) -> Any:
    """Inputs of the first of two examples; of a tied layer's, draws go before examples."""
    if isinstance(a, Ids):
        return replace(a, index=a.index[::2])
    return replace(a, image=a.image[:, ::2]) if isinstance(a, Patches) else a[:, ::2]
