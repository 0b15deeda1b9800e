"""Records that know what filled them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


@jax.tree_util.register_pytree_node_class
class Drawn(dict):
    """{layer: Record} with the `fisher` that the caller says their draws are of, or None, and `own`, the same rows with
    the loss's own gradients where they were asked for; a JAX tree like a dict."""

    def __init__(
        self, records: dict[str, Any], fisher: Callable | None = None, own: dict[str, Any] | None = None
    ) -> None:
        super().__init__(records)
        self.fisher = fisher
        self.own = own or {}

    def tree_flatten(self) -> tuple[tuple, tuple]:
        return (*self.values(), *self.own.values()), (tuple(self), tuple(self.own), self.fisher)

    @classmethod
    def tree_unflatten(cls, structure: tuple, values: tuple) -> Drawn:
        names, owned, fisher = structure
        own = dict(zip(owned, values[len(names) :], strict=True))
        return cls(dict(zip(names, values[: len(names)], strict=True)), fisher, own)
