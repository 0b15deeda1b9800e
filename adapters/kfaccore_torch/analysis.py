"""Records of one batch, for analysis outside a training loop and for `kfaccore compare` and `advise`."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

import kfaccore as kf
from kfaccore_torch.engine import Batch, Engine, Settings


def records(
    model: nn.Module, loss: Any, inputs: Any, target: Any, **settings: Any
) -> tuple[dict[str, kf.Record], dict[str, Any]]:
    """Records and mean gradients of the covered layers that a batch went through; `.grad` is left alone.

    inputs     a tensor, a tuple of positional or a dict of keyword arguments of the model
    settings   fields of `Settings`
    """
    engine = Engine(model, loss, kf.Preconditioner(kf.Identity()), Settings(**settings))
    with torch.enable_grad(), engine.captured() as seen:
        f = model(**inputs) if isinstance(inputs, dict) else model(*inputs if isinstance(inputs, tuple) else (inputs,))
    found = engine.records(seen.calls, Batch(f, target), 0)
    grads = {}
    for name in found:
        layer = engine.plan.layers[name]
        g = torch.autograd.grad(engine.objective.value(f, target), list(layer.parameters.values()), retain_graph=True)
        grads[name] = engine.matrix(layer, dict(zip(layer.parameters, g, strict=True)))
    return found, grads


def save_records(
    path: str | os.PathLike, model: nn.Module, loss: Any, inputs: Any, target: Any, **settings: Any
) -> None:
    """Write `records` to a file that `kfaccore compare` and `kfaccore advise` read."""
    found, grads = records(model, loss, inputs, target, **settings)
    kf.save_records(path, found, grads, seed=settings.get("seed", 0))
