"""Records that know what filled them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


@jax.tree_util.register_pytree_node_class
class Drawn(dict):
    """{layer: Record} with the `fisher` that the caller says their draws are of, or None; a JAX tree like a dict."""

    def __init__(self, records: dict[str, Any], fisher: Callable | None = None) -> None:
        super().__init__(records)
        self.fisher = fisher

    def tree_flatten(self) -> tuple[tuple, tuple]:
        return tuple(self.values()), (tuple(self), self.fisher)

    @classmethod
    def tree_unflatten(cls, structure: tuple, values: tuple) -> Drawn:
        names, fisher = structure
        return cls(dict(zip(names, values, strict=True)), fisher)
