"""A batch of fewer examples that a model writes other equations for, by way of more of them: an axis of one element is
another matter to `broadcast_to` and `matmul`, and einsum takes three factors in an order that goes by their sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from kfaccore import Ids, Patches
from kfaccore_jax.capture import Captured, remembered
from kfaccore_jax.records import Pair


@dataclass(frozen=True)
class Fewer(Captured):
    """What a capture of the examples and some of them again says of the first ones; right where no example's output
    depends on another."""

    _all: Captured

    def _pairs(self, g: Any) -> dict[str, Pair]:
        shared = {layer.name for layer in self.plan.layers if layer.common}
        found = self._all._pairs(g)
        return {name: pair if name in shared else self._first(*pair) for name, pair in found.items()}

    def _first(self, a: Any, g: Any) -> Pair:
        g = self._cut(g, 2)
        if isinstance(a, Ids):
            return replace(a, index=self._cut(a.index, 0)), g
        return replace(a, image=self._cut(a.image, 1)) if isinstance(a, Patches) else self._cut(a, 1), g

    def _cut(self, x: Any, axis: int) -> Any:
        """Without the examples that are there again; of a tied layer's, draws go before examples."""
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        kept = x.reshape(*before, -1, self._all._n, *after)
        return jax.lax.slice_in_dim(kept, 0, self._n, axis=axis + 1).reshape(*before, -1, *after)

    def _masked(self, mask: Any, draws: int) -> dict[str, Any]:
        found = self._all._masked(again(mask, self._all._n), draws)
        return {name: None if rows is None else rows[: self._n] for name, rows in found.items()}


def fewer(whole: Captured, params: Any, args: tuple, n: int) -> Fewer:
    """The capture of the first n examples of `whole`: the cotangents of the others are zero."""

    @remembered
    def pull(cotangent: Any) -> tuple[Any, dict]:
        return whole._pull(
            jax.tree.map(lambda c, f: jnp.concatenate([c, jnp.zeros_like(f[len(c) :])]), cotangent, whole.prediction)
        )

    first = jax.tree.map(lambda f: f[: f.shape[0] * n // whole._n], whole.prediction)
    aux = whole.plan.apply(params, *args)[1] if whole.plan.has_aux else None
    return Fewer(whole.plan, first, aux, whole.params, pull, whole._data, whole._shapes, n, args, whole)


def again(x: Any, count: int) -> Any:
    """An array with its examples repeated up to a number."""
    return jnp.concatenate([jnp.asarray(x)] * -(-count // len(x)))[:count]
