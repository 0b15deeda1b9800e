"""What a step subtracts from each parameter, and what its penalty adds to the loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kfaccore_torch.step import Engine


def moves(engine: Engine, updates: Mapping[str, Any]) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """(parameter, update + alpha weight_decay parameter), once a parameter."""
    found: dict[int, tuple[nn.Parameter, torch.Tensor]] = {}
    told = engine.info.step if engine.info else {}
    shrink = float(told["alpha"]) * engine.core.schedules.weight_decay
    for name, given in engine.tensors_of(updates).items():
        layer = engine.plan.layers[name]
        for role, x in given.items():
            p = layer.parameters[role]
            x = x + shrink * layer.own(role, p.detach()) if shrink else x
            found[id(p)] = p, found[id(p)][1] + x if id(p) in found else x  # parts of one parameter
    return list(found.values())


def move_by(found: Sequence[tuple[nn.Parameter, torch.Tensor]]) -> None:
    """Subtracts from each parameter; at once where all are torch's own, as a subclass may know no lists."""
    if found and all(type(p) is nn.Parameter for p, _ in found):
        torch._foreach_sub_([p for p, _ in found], [move for _, move in found])
        return
    for p, move in found:
        p.sub_(move)


def stepped(engine: Engine, grads: Mapping[str, Any], rest: Sequence[Any]) -> Iterator[nn.Parameter]:
    """Parameters that a step with these gradients, of layers and of what the plan leaves over, moves."""
    yield from (p for name in grads for p in engine.plan.layers[name].parameters.values())
    yield from (p for p, g in zip(engine.plan.rest.values(), rest, strict=True) if g is not None)


def penalty(engine: Engine, l2: Mapping[str, float]) -> float:
    """Sum of l2 / 2 |theta|^2 over covered parameters, in one word from their device."""
    layers = engine.plan.layers
    covered = {p: weight for name, weight in l2.items() for p in layers[name].parameters.values()}
    if not covered:
        return 0.0
    squares = torch.stack([(p.detach() ** 2).sum().double() for p in covered]).tolist()
    return 0.5 * sum(weight * square for weight, square in zip(covered.values(), squares, strict=True))
