"""Layers and leaves of the parameters at hand, which may be a part of those of the plan (optax.masked, partition)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from kfaccore import Block, Ids, Patches, Record
from kfaccore_jax.alike import matrices_of
from kfaccore_jax.evaluate import followed
from kfaccore_jax.layers import Layer
from kfaccore_jax.names import check_arrays, named
from kfaccore_jax.plan import Plan


@dataclass(frozen=True)
class Held:
    """A layer, or what is left of it where a mask takes its weight or its bias away; `full` is the plan's name of it,
    under which its records come."""

    layer: Layer
    full: str
    part: str = "whole"

    def record(self, record: Any) -> Any:
        """The plan's record without the columns that are not here; Stats are taken as they are."""
        if isinstance(record, list | tuple):
            return type(record)(self.record(one) for one in record)
        if self.part == "whole" or not isinstance(record, Record):
            return record
        a = record.a
        if self.part == "bias":
            column = _ones(record) if isinstance(a, Ids | Patches) else a[..., -1:]
            return replace(record, a=column)
        return replace(record, a=Patches(a.image, a.window) if isinstance(a, Patches) else a[..., :-1])


def _ones(record: Record) -> Any:
    return jnp.ones((*record.g.shape[1:4], 1), record.g.dtype)


def held(plan: Plan, leaves: Mapping[str, Any]) -> list[Held]:
    """The layers of the plan, each as far as its leaves are there."""
    found = []
    for layer in plan.layers:
        bias = layer.bias
        weight = layer.weight.leaf in leaves
        if bias is None or (weight and bias.leaf in leaves):
            found += [Held(layer, layer.name)] if weight else []
        elif weight:
            found.append(Held(replace(layer, bias=None, factor=1.0), layer.name, "weight"))
        elif bias.leaf in leaves:
            lone = replace(layer, name=bias.leaf, kind="bias", weight=bias, bias=None, lone=True, diagonal=False)
            found.append(Held(lone, layer.name, "bias"))
    return found


def blocks_of(plan: Plan, params: Any) -> dict[str, Block]:
    """Of the layers whose leaves are in `params`, and of leaves without a layer, one column each."""
    leaves = named(params)
    here = [item.layer for item in held(plan, leaves)]
    owned = {part.leaf for layer in here for part in layer.parts}
    rest = {k: x for k, x in leaves.items() if k not in owned and followed(x)}
    return {layer.name: layer.block for layer in here} | {name: Block(x.size, 1) for name, x in rest.items()}


def check_leaves(plan: Plan, params: Any) -> None:
    """ValueError naming leaves that the plan does not know, or knows in another shape, or where there are none;
    TypeError for those that are no numbers."""
    check_arrays(params)
    if not any(followed(x) for x in jax.tree.leaves(params)):
        raise ValueError(
            "init got params without an array of real numbers: optax.masked or optax.partition may leave none of them "
            "to kfac(plan), and optax.tree_utils.tree_map_params asks with none, where jax.tree.map over its state does"
        )
    keys = [name for name, x in named(params).items() if jnp.issubdtype(x.dtype, jax.dtypes.extended)]
    if keys:
        raise TypeError(
            f"init got leaves that are random keys, {keys[:5]}, which no transformation can add to: keep them out of "
            f"params, as another argument of apply, or hide them by optax.masked"
        )
    known = {row.leaf: row.shape for row in plan.table}
    leaves = {name: tuple(x.shape) for name, x in named(params).items()}
    strange = sorted(name for name in leaves if name not in known)
    if strange:
        raise ValueError(
            f"init got leaves {strange[:5]} that the plan has not; it has {list(known)[:5]}: give init the tree that "
            f"plan was given, or a part of it with the same names"
        )
    other = [f"{name} {shape}, planned as {known[name]}" for name, shape in leaves.items() if shape != known[name]]
    if other:
        raise ValueError(f"init got leaves of other shapes than the plan's: {', '.join(other[:5])}; plan again")


def check_halves(plan: Plan, grads: Any, blocks: Mapping[str, Block]) -> None:
    """ValueError naming the leaf of a layer that has no gradient where its block is of the whole layer."""
    here = named(grads)
    for item in held(plan, here):
        if item.part != "whole" and blocks.get(item.full, item.layer.block).d_in != item.layer.block.d_in:
            layer = next(x for x in plan.layers if x.name == item.full)
            lacking = [part.leaf for part in layer.parts if part.leaf not in here]
            raise ValueError(
                f"layer {item.full} got no gradient of {lacking[0]} and one of its other part, and one block has both: "
                f"freeze both of them, or hide {lacking[0]} from init too, by optax.masked or optax.partition"
            )


def seen(plan: Plan, tree: Any, blocks: Mapping[str, Block]) -> dict[str, Any]:
    """{leaf: array} of those leaves of layers and blocks that a rule with these blocks sees of a whole tree."""
    leaves = named(tree)
    names = set(blocks)
    for layer in plan.layers:
        if layer.name in blocks:
            whole = blocks[layer.name].d_in == layer.block.d_in
            names |= {part.leaf for part in (layer.parts if whole else [layer.weight])}
    return {name: x for name, x in leaves.items() if name in names}


def matrices(plan: Plan, grads: Any, blocks: Mapping[str, Block]) -> dict[str, Any]:
    """{layer or leaf: (blocks, d_out, d_in)} of a tree of gradients; one that is None is frozen."""
    leaves = named(grads)
    found = matrices_of([item.layer for item in held(plan, leaves)], leaves)
    return found | {name: leaves[name].reshape(1, -1, 1) for name in blocks if name in leaves and name not in found}


def tree_of(plan: Plan, grads: Any, directions: Mapping[str, Any]) -> Any:
    """A tree like `grads` with the directions in their places."""
    leaves = named(grads)
    names = list(leaves)
    here = [item.layer for item in held(plan, leaves)]
    for layer in here:
        leaves = layer.scatter(leaves, directions[layer.name])
    for name in set(directions) - {layer.name for layer in here}:
        leaves[name] = directions[name].reshape(leaves[name].shape).astype(leaves[name].dtype)
    return jax.tree.unflatten(jax.tree.structure(grads), [leaves[name] for name in names])
