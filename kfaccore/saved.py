"""What a saved run knows, from its file alone: the curvature of its states, and the parameters it ended with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kfaccore import io
from kfaccore.method import Block
from kfaccore.methods import CATALOGUE
from kfaccore.posterior.curvature import Curvature
from kfaccore.precondition.preconditioner import Preconditioner
from kfaccore.xp.arrays import Array


@dataclass(frozen=True)
class Saved:
    """curvature and params {layer: matrix} of a run, and what its file says of it: task, method, damping, ..."""

    curvature: Curvature
    params: dict[str, Array]
    meta: dict[str, Any]


def saved(path: str | os.PathLike) -> Saved:
    """The run in a `run.safetensors` of `kfaccore train --out`, on NumPy.

    ValueError where the file holds no preconditioned run, or one whose method keeps no curvature that can be read.
    """
    tree = io.load(path)
    meta = io.metadata(path)
    name = meta.get("method")
    parts = [_under(tree, "params"), _under(_under(tree, "state"), "layers")]
    if not all(parts) or not isinstance(name, str) or name not in CATALOGUE:
        raise ValueError(
            f"{path} holds no states of layers (method {name!r}); need the run.safetensors of a preconditioned run, "
            f"`kfaccore train TASK --method kfac --out DIR`"
        )
    leaves = io.flatten(tree)
    blocks = _blocks(path, meta, parts[0], leaves)
    params = {layer: parts[0][layer] for layer in blocks}
    like = Preconditioner(CATALOGUE[name]()).init(blocks, next(iter(params.values())))
    prefix = "state/layers/"
    leaves = {key.removeprefix(prefix): x for key, x in leaves.items() if key.startswith(prefix)}
    states = io.unflatten(leaves, dict(like.layers), f"{path} at {prefix}")
    return Saved(Curvature.of(CATALOGUE[name](), states, blocks), params, meta)


def _under(tree: object, name: str) -> Mapping[str, Any]:
    """What a tree has under a name, empty where that is no folder."""
    found = tree.get(name) if isinstance(tree, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _blocks(
    path: str | os.PathLike, meta: Mapping[str, Any], params: Mapping[str, Any], leaves: Mapping[str, np.ndarray]
) -> dict[str, Block]:
    """The sizes that the metadata give each layer, which have to be those of its parameters: they are allocated."""
    longest = max((max(np.shape(x), default=0) for x in leaves.values()), default=0)
    given = meta.get("blocks")
    if not isinstance(given, Mapping) or not given:
        raise ValueError(f"{path} has damaged metadata: need an object `blocks` of the layers' sizes")
    found = {}
    for layer, sizes in given.items():
        try:
            if not all(isinstance(size, int) for size in sizes.values()):
                raise ValueError("need whole numbers")
            block = Block(**sizes)
            # no leaf that is there can be longer
            found[layer] = replace(block, rows=min(block.rows, longest), samples=min(block.samples, longest))
            count = block.blocks * block.d_out * block.d_in
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} has damaged metadata: layer {layer!r} of sizes {sizes!r}: {error}") from error
        if not isinstance(params.get(layer), np.ndarray) or params[layer].size != count:
            shape = np.shape(params.get(layer, ()))
            raise ValueError(f"{path}: layer {layer!r} is {sizes!r} and has parameters {shape}; need as many")
    return found
