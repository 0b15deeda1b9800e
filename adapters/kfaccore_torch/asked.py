"""The plan of a model by what one forward shows, without training: for looking before one starts, also on meta."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn

from kfaccore_torch.capture import Capture
from kfaccore_torch.compiled import eagerly
from kfaccore_torch.handed import kept
from kfaccore_torch.inside import check_grad
from kfaccore_torch.moved import Moved
from kfaccore_torch.plan import Plan, modules
from kfaccore_torch.replay import found as as_found
from kfaccore_torch.replay import replayed
from kfaccore_torch.sight import sighted


def plan(model: nn.Module, *inputs: Any, skip: tuple[str, ...] = (), **named: Any) -> Plan:
    """Which parameters are covered, and how: by the forward model(*inputs, **named), or, without inputs, by what types
    of modules suggest.

    skip   patterns of parameter names (`head.*`) to leave uncovered

    Parameters, buffers, gradients and random state stay as they are; a model on the meta device takes no memory. Print
    the plan, or `plan.report(core)` for the sizes under a preconditioner. Raises ValueError for lazy modules that have
    not seen a batch, for a pattern that matches nothing, and for an output without a graph.
    """
    found = modules(model, skip)
    if not inputs and not named:
        return found
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    seen = Capture(found)
    moved = Moved(model, found)
    seen.span.watch = moved.note
    with torch.enable_grad(), _left(model, device, {"inputs": inputs, "named": named}, moved):
        with eagerly(), seen:
            output = model(*inputs, **named)
        heads = [x for x in _tensors(output) if x.requires_grad and x.ndim > 0]
        check_grad()
        if not heads:
            raise ValueError(f"the model's output, {type(output).__name__}, has no tensor with a graph behind it")
        return sighted(seen, heads).plan


@contextmanager
def _left(model: nn.Module, device: torch.device, given: dict[str, Any], moved: Moved) -> Iterator[None]:
    """What modules hold, random state, parameters and what the model was `given` as they were."""
    if device.type == "meta":
        yield
        return
    with replayed(model, as_found(model, device, {}), device, [moved.undo, *kept(given)]):
        yield


def _tensors(x: Any) -> Iterator[torch.Tensor]:
    """Floating tensors in nested containers and dataclasses."""
    if isinstance(x, torch.Tensor):
        if x.is_floating_point():
            yield x
    elif isinstance(x, Mapping):
        for child in x.values():
            yield from _tensors(child)
    elif isinstance(x, list | tuple):
        for child in x:
            yield from _tensors(child)
    elif is_dataclass(x) and not isinstance(x, type):
        for field in fields(x):
            yield from _tensors(getattr(x, field.name))
