"""Records of one batch, for analysis outside a training loop and for `kfaccore compare` and `advise`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import kfaccore as kf
from kfaccore_torch.asked import plan
from kfaccore_torch.draw import Batch
from kfaccore_torch.masks import Told
from kfaccore_torch.outputs import Output, picked
from kfaccore_torch.passes import passing
from kfaccore_torch.resume import of_model
from kfaccore_torch.settings import Settings
from kfaccore_torch.step import Engine


def records(
    model: nn.Module,
    loss: Any,
    inputs: Any,
    target: Any,
    mask: torch.Tensor | None = None,
    masks: Mapping[str, torch.Tensor] | None = None,
    examples: Any = None,
    draws: Any = 1,
    parts: int = 1,
    output: Output = None,
    **settings: Any,
) -> tuple[dict[str, kf.Record], dict[str, Any]]:
    """Records and mean gradients of the covered layers that a batch went through; `.grad` is left alone.

    inputs     a tensor, a tuple of positional or a mapping of keyword arguments of the model
    mask, masks, examples   as `Preconditioner.capture` takes them
    draws      how many of monte_carlo, or the draws themselves, (draws, *prediction's shape), a list of them a head
    output     which of the model's outputs the loss is of: a name, a place in a tuple, or a function
    parts      in how many such batches a sum loss is split: n is 1 / parts
    settings   fields of `Settings`

    Rows that mix examples, or that they share, are positions of one example: for draws that are independent of zero
    mean an example (the others get random signs) the mean of `dense` is right.
    """
    given = None if isinstance(draws, int) else draws
    settings = {**settings, "draws": draws if isinstance(draws, int) else 1}
    engine = Engine(model, loss, kf.Preconditioner(kf.Identity()), Settings.of(settings))
    with torch.enable_grad():
        with engine.captured() as seen:
            f = picked(called(model, inputs), output)
        engine.objective.heads(f)
        value = engine.objective.value(f, target)
        batch = Batch(f, target, Told(mask, masks or {}, examples))
        n = engine.share(batch)
        if n <= 0:
            raise ValueError(f"no records: {engine.void(batch)}")
        found, observed, _ = engine.records(
            seen, batch, 0, n / parts if engine.objective.total else n, True, given=given
        )
        wanted = [(name, role) for name in found for role in engine.plan.layers[name].parameters]
        parameters = [engine.plan.layers[name].parameters[role] for name, role in wanted]
        with passing(observed.quiet):
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    by_layer: dict[str, dict[str, torch.Tensor]] = {}
    for (name, role), p, g in zip(wanted, parameters, gradients, strict=True):
        by_layer.setdefault(name, {})[role] = torch.zeros_like(p) if g is None else g
    return found, {name: engine.matrix(engine.plan.layers[name], given) for name, given in by_layer.items()}


def called(model: nn.Module, inputs: Any) -> Any:
    """The model on a tensor or packed sequence, a tuple of positional or a mapping of keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if _several(inputs) else model(inputs)


def _several(inputs: Any) -> bool:
    """Whether they are positional arguments; a packed sequence is a tuple too, and one of them."""
    return isinstance(inputs, tuple | list) and not isinstance(inputs, nn.utils.rnn.PackedSequence)


def save_records(
    path: str | os.PathLike, model: nn.Module, loss: Any, inputs: Any, target: Any, **settings: Any
) -> None:
    """Write `records` to a file that `kfaccore compare` and `kfaccore advise` read."""
    found, grads = records(model, loss, inputs, target, **settings)
    named = inputs if isinstance(inputs, Mapping) else {}
    placed = tuple(inputs) if _several(inputs) else () if named else (inputs,)
    told = of_model(model, plan(model, *placed, skip=settings.get("skip", ()), **named))
    kf.save_records(path, found, grads, seed=settings.get("seed", 0), **told)
