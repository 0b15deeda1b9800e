"""What a saved run knows, from its file alone: the curvature of its states, and the parameters it ended with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
    if not isinstance(tree, Mapping) or "layers" not in tree.get("state", {}) or name not in CATALOGUE:
        raise ValueError(
            f"{path} holds no states of layers (method {name!r}); need the run.safetensors of a preconditioned run, "
            f"`kfaccore train TASK --method kfac --out DIR`"
        )
    blocks = {layer: Block(**sizes) for layer, sizes in meta["blocks"].items()}
    params = {layer: tree["params"][layer] for layer in blocks}
    like = Preconditioner(CATALOGUE[name]()).init(blocks, next(iter(params.values())))
    prefix = "state/layers/"
    leaves = {key.removeprefix(prefix): x for key, x in io.flatten(tree).items() if key.startswith(prefix)}
    states = io.unflatten(leaves, dict(like.layers), f"{path} at {prefix}")
    return Saved(Curvature.of(CATALOGUE[name](), states, blocks), params, meta)
