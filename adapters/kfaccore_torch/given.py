"""The gradients that a loop hands to a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kfaccore_torch.unusual import dense_grad

if TYPE_CHECKING:
    from kfaccore_torch.step import Engine


def gradients(engine: Engine) -> dict[str, dict[str, torch.Tensor]]:
    """Of every covered layer that does not keep its plain one, by role; ValueError for a layer of which some parameters
    alone have one."""
    given = {}
    aside = set() if engine.due else engine.plainly
    for name, layer in engine.plan.layers.items():
        if name in aside:
            continue
        found = {role: g for role, p in layer.parameters.items() if (g := dense_grad(p)) is not None}
        if found and len(found) < len(layer.parameters):
            if engine.core.comm.world > 1:
                continue  # the ranks find out together which of them disagree
            raise ValueError(f"layer {name!r} has a gradient for {sorted(found)} only, of {list(layer.paths)}")
        if found:
            given[name] = found
    return given
