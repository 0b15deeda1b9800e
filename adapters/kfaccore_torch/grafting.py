"""How long another optimizer's updates are, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from kfaccore_torch.plan import Layer


def stepped(
    optimizer: torch.optim.Optimizer, layers: Mapping[str, Layer]
) -> tuple[list[nn.Parameter], dict[str, float]]:
    """Runs the optimizer on the gradients there are, and puts the layers' parameters back: those with a gradient, and
    {layer: norm} of how far they went. Other parameters, and the optimizer's state, have taken their step."""
    old = {p: p.detach().clone() for layer in layers.values() for p in layer.parameters.values() if p.grad is not None}
    optimizer.step()
    lengths = {}
    with torch.no_grad():
        for name, layer in layers.items():
            moved = [(old[p] - p).double().square().sum() for p in layer.parameters.values() if p in old]
            if moved:
                lengths[name] = float(torch.stack(moved).sum().sqrt())
        for p, kept in old.items():
            p.copy_(kept)
    return list(old), lengths
