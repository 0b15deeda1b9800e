"""Several devices that run one program, each on its own examples: shard_map, pmap, named vmaps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from kfaccore import Record
from kfaccore_jax.mesh import named_axes
from kfaccore_jax.records import Drawn, widened

Tree = TypeVar("Tree")


@dataclass(frozen=True)
class Axes:
    """The communicator of named axes: sums go over all devices of them; every device does all of the rest.

    world   1 for a Preconditioner, which then places no work; their number for a rule that counts the batch's rows
    """

    names: tuple[str, ...]
    world: int = 1
    rank: int = 0
    fraction: float = 1.0

    def all_reduce(self, tree: Tree) -> Tree:
        """Leafwise sum over devices."""
        return jax.lax.psum(tree, self.names)

    def reduce(self, tree: Tree, ranks: tuple[int, ...]) -> Tree:
        """Every device gets the sum."""
        return self.all_reduce(tree)

    def broadcast(self, tree: Tree, ranks: tuple[int, ...]) -> Tree:
        """Every device has the same already."""
        return tree

    @property
    def devices(self) -> int:
        """How many there are; needs the axes in force."""
        return int(jax.lax.psum(1, self.names))  # of a number: known while tracing

    def mean(self, tree: Tree, share: Any) -> Tree:
        """Mean over devices, weighted by `share`, each one's part of the loss normaliser; what is the same on all
        devices stays what it is."""
        total = jax.lax.psum(jnp.asarray(share, jnp.result_type(float)), self.names)

        def mean(x: Any) -> Any:
            if not jnp.issubdtype(x.dtype, jnp.floating):
                return x
            wide = widened(x)  # in half precision the weights would not add up to one
            return jax.lax.psum(jnp.asarray(wide * jnp.asarray(share / total, wide.dtype), x.dtype), self.names)

        return jax.tree.map(mean, tree)


def share_of(records: Mapping[str, Any] | None) -> Any:
    """n of a batch's records, one number for all layers; 1 where there are none."""
    if isinstance(records, Drawn) and records.share is not None:
        return records.share
    for given in (records or {}).values():
        several = [given] if isinstance(given, Record) else given if isinstance(given, list | tuple) else []
        known = [record.n for record in several if isinstance(record, Record)]
        if known:
            return sum(known)
    return 1.0


def check_axes(given: tuple[str, ...] | None) -> None:
    """ValueError where an axis is in force that the caller has said nothing about, or one is named that is not."""
    force = named_axes()
    if given is None and force:
        raise ValueError(
            f"update runs under the axes {force}, where each device has its own records, and kfac() was given no "
            f"axis_name: say kfac(plan, axis_name={force[0]!r}) to average statistics over it, axis_name=() if each "
            f"device trains a model of its own"
        )
    missing = [name for name in given or () if name not in force]
    if missing:
        raise ValueError(f"kfac() was given axis_name {missing}, and update runs under the axes {list(force)}")


def averaged(axes: Axes, grads: Any, share: Any, factored: object) -> Any:
    """The mean gradient of all devices; ValueError where products were given beside it."""
    if factored:
        raise ValueError("factored gradients are each device's own, and axis_name averages gradients: pass grads")
    return axes.mean(grads, share)


def in_force(names: tuple[str, ...]) -> bool:
    """Whether all of these axes are in force here."""
    return set(names) <= set(named_axes())
