"""kfaccore's dataclasses as JAX trees, so that jit, cond, donation and checkpoints see their arrays."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kfaccore import Factored, Ids, Patches, Record
from kfaccore_jax.state import Codes

_known: set[type] = set()
_written: set[type] = set()


def register(tree: Any) -> Any:
    """`tree`, after every dataclass type in it has become a JAX tree node, and flax can write it if it is there."""
    if is_dataclass(tree) and not isinstance(tree, type):
        _register(type(tree))
        for name in _names(type(tree))[0]:
            register(getattr(tree, name))
    elif isinstance(tree, dict):
        for child in tree.values():
            register(child)
    elif isinstance(tree, tuple | list):
        for child in tree:
            register(child)
    return tree


def lending(update: Callable) -> Callable:
    """An `update` whose state may have NumPy's arrays, as one that was read or brought to the host has."""

    @wraps(update)
    def run(grads: Any, state: Any, params: Any = None, **given: Any) -> Any:
        state = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray | np.generic) else x, state)
        return update(grads, state, params, **given)

    return run


def _names(kind: type) -> tuple[list[str], list[str]]:
    """Fields that are children, and fields that are structure."""
    static = _STATIC.get(kind, ())
    fixed = [f.name for f in fields(kind) if f.metadata.get("static") or f.name in static]
    return [f.name for f in fields(kind) if f.name not in fixed], fixed


def _register(kind: type) -> None:
    """Rebuilding skips __init__: JAX puts placeholders where arrays were."""
    _for_flax(kind)
    if kind in _known:
        return
    _known.add(kind)
    children, fixed = _names(kind)

    def flatten(x: Any) -> tuple[list, tuple]:
        keys = [(jax.tree_util.GetAttrKey(name), getattr(x, name)) for name in children]
        return keys, tuple(getattr(x, name) for name in fixed)

    def unflatten(structure: tuple, values: Any) -> Any:
        x = object.__new__(kind)
        for name, value in (*zip(fixed, structure, strict=True), *zip(children, values, strict=True)):
            object.__setattr__(x, name, value)
        return x

    jax.tree_util.register_pytree_with_keys(kind, flatten, unflatten)


def _for_flax(kind: type) -> None:
    """Lets flax.serialization write a type's arrays by name; nothing where flax is not in use."""
    flax = sys.modules.get("flax.serialization")
    if flax is None or kind in _written:
        return
    _written.add(kind)
    children = _names(kind)[0]

    if issubclass(kind, Codes):  # by name, as in files of before
        flax.register_serialization_state(kind, dict, lambda x, state: x.rebuilt(state))
        return

    def to_dict(x: Any) -> dict[str, Any]:
        return {name: flax.to_state_dict(getattr(x, name)) for name in children}

    later = {f.name for f in fields(kind) if "era" in f.metadata}

    def from_dict(x: Any, state: dict[str, Any]) -> Any:
        # a file of before lacks fields that were added, which are then zero
        absent = {
            name: flax.to_state_dict(jax.tree.map(jnp.zeros_like, getattr(x, name))) for name in later - set(state)
        }
        known = {**state, **absent}
        found = {name: flax.from_state_dict(getattr(x, name), known[name]) for name in children}
        leaves = [found[name] for name in children]
        return jax.tree.unflatten(jax.tree.structure(x), jax.tree.leaves(leaves))

    flax.register_serialization_state(kind, to_dict, from_dict)


_STATIC = {Ids: ("size",), Patches: ("window", "bias")}
for _kind in (Record, Factored, Ids, Patches):
    _register(_kind)
