"""What a loss of torch and its target say of each other before any number is read."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def nonnegative(loss: Any, core: Any, target: Any) -> bool | None:
    """Whether a loss cannot be below 0: never where `core`, its per-example loss, cannot; None where that hangs on the
    numbers of soft labels, or of weights by example, which may lie on a device."""
    if isinstance(loss, nn.CrossEntropyLoss) and isinstance(target, torch.Tensor) and target.is_floating_point():
        return None
    if isinstance(loss, nn.BCEWithLogitsLoss) and (loss.weight is not None or loss.pos_weight is not None):
        return None
    return core.nonnegative


def check_alike(loss: Any, f: torch.Tensor, y: Any) -> None:
    """ValueError for a target that broadcasting would hold against the prediction crosswise."""
    shape = y.shape if isinstance(y, torch.Tensor) else ()
    if len(shape) > f.ndim or torch.broadcast_shapes(f.shape, shape) != f.shape:
        raise ValueError(
            f"{type(loss).__name__} got a prediction of shape {tuple(f.shape)} and a target of shape {tuple(shape)}, "
            f"which would be held against each other crosswise; need equal shapes"
        )


def check_labels(loss: Any, y: Any) -> None:
    """TypeError for a target that is no tensor."""
    if not isinstance(y, torch.Tensor):
        raise TypeError(
            f"{type(loss).__name__} got a target of type {type(y).__name__}; need the tensor of labels that the loss "
            f"is of: pre.loss(f, y), or pre.attach(value, f, y) for a value formed elsewhere"
        )


def asks_labels(loss: Any) -> bool:
    """Whether the curvature, or n, hangs on the labels."""
    return isinstance(loss, nn.CrossEntropyLoss) or getattr(loss, "pos_weight", None) is not None


def check_its_own(loss: nn.Module, value: torch.Tensor, *given: Any) -> None:
    """ValueError for a loss that does not come to what its class does, whose curvature is taken: one with hooks that
    change what it is given or gives, or with a `forward` of its own."""
    if not (loss._forward_hooks or loss._forward_pre_hooks or "forward" in vars(loss)):
        return
    with torch.no_grad():
        plain = type(loss).forward(loss, *given)
    value = value.detach()
    if not torch.allclose(plain, value, rtol=1e-5, atol=0.0, equal_nan=True):
        name = type(loss).__name__
        raise ValueError(
            f"this {name} has hooks or a `forward` of its own, and comes to {float(value):g} where {name} is "
            f"{float(plain):g}: its curvature is not that of its class. Write it as a kfaccore_torch.ExampleLoss, or "
            f"put what it does to the prediction into the model"
        )
