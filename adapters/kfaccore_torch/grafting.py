"""Another optimizer's step with K-FAC's directions: as far as it would have gone, layer by layer."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kfaccore_torch.plan import Layer

_BESIDE = ("AdamW", "Adafactor", "Muon")  # of torch.optim, shrink weights beside the step instead of in the gradient


@dataclass
class Grafted:
    """A step of an optimizer that was taken and taken back in the layers.

    lengths   {layer: norm} of how far each went, its weight decay apart
    old       the layers' parameters before it
    new       after it, those with elements that are no layer's
    shrink    the share of a parameter that its weight decay takes, where that is beside the step
    rising    parameters that the optimizer maximises with
    """

    lengths: dict[str, float]
    old: dict[nn.Parameter, torch.Tensor]
    new: dict[nn.Parameter, torch.Tensor]
    shrink: dict[nn.Parameter, Any]
    rising: set[nn.Parameter]

    @torch.no_grad()
    def take(self, layers: Mapping[str, Layer]) -> None:
        """The step with the directions that `.grad` holds now, in what is the layers' own."""
        for p in self.old:
            p.add_(p.grad, alpha=1.0 if p in self.rising else -1.0)  # pyright: ignore[reportArgumentType]
        for p, new in self.new.items():
            p.copy_(torch.where(_covered(p, layers), p, new))
        for p, share in self.shrink.items():
            p.sub_(share * self.old.get(p, p))


def stepped(optimizer: torch.optim.Optimizer, layers: Mapping[str, Layer]) -> Grafted:
    """Runs the optimizer on the gradients there are, and puts the layers' parameters back. Other parameters, and the
    optimizer's state, have taken their step; none of them takes one where a gradient is not finite.

    Raises ValueError for an optimizer that is not torch's, with a weight decay of which it does not tell what it is.
    """
    check_alone(optimizer)
    shrink, rising = _told(optimizer)
    old = {p: p.detach().clone() for layer in layers.values() for p in layer.parameters.values() if p.grad is not None}
    if finite([p.grad for group in optimizer.param_groups for p in group["params"]]):
        with _undecayed(optimizer):
            optimizer.step()
    else:
        shrink = {}
    parts = {p for layer in layers.values() for role, p in layer.parameters.items() if p in old and layer.partial(role)}
    new = {p: p.detach().clone() for p in parts if not bool(_covered(p, layers).all())}
    squares = {}
    with torch.no_grad():
        for name, layer in layers.items():
            moved = [layer.own(role, old[p] - p) for role, p in layer.parameters.items() if p in old]
            if moved:
                squares[name] = torch.stack([x.double().square().sum() for x in moved]).sum()
        for p, kept in old.items():
            p.copy_(kept)
    # one word from the device for all layers
    lengths = dict(zip(squares, torch.stack(list(squares.values())).sqrt().tolist(), strict=True)) if squares else {}
    return Grafted(lengths, old, new, shrink, rising)


def check_alone(optimizer: torch.optim.Optimizer) -> None:
    """TypeError for one whose step needs the loss again, as often as it likes (LBFGS)."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"{type(optimizer).__name__} needs a closure that forms the loss again: take an optimizer that "
            f"steps by the gradients it is given, such as SGD or Adam"
        )


def finite(grads: Iterable[torch.Tensor | None]) -> bool:
    """Whether all numbers of gradients are; one word from their device."""
    found = [(g.coalesce().values() if g.is_sparse else g).isfinite().all() for g in grads if g is not None]
    return not found or bool(torch.stack(found).all())


def _covered(p: nn.Parameter, layers: Mapping[str, Layer]) -> torch.Tensor:
    """Which elements are of a layer."""
    found = torch.zeros_like(p, dtype=torch.bool)
    for layer in layers.values():
        for role, q in layer.parameters.items():
            if q is p:
                found |= layer.own(role, torch.ones_like(p)) > 0
    return found


def _told(optimizer: torch.optim.Optimizer) -> tuple[dict[nn.Parameter, Any], set[nn.Parameter]]:
    """What `Grafted` has of weight decay and sign; a decay in the gradient is added to it, for both to see."""
    shrink: dict[nn.Parameter, Any] = {}
    rising: set[nn.Parameter] = set()
    for group in optimizer.param_groups:
        moving = [p for p in group["params"] if p.grad is not None]
        up = bool(group.get("maximize"))
        if up:
            rising.update(moving)
        decay = group.get("weight_decay", 0)
        if not decay:
            continue
        name = type(optimizer).__name__
        if getattr(torch.optim, name, None) is not type(optimizer):
            raise ValueError(
                f"graft does not know whether the weight decay of {name} is in the gradient or beside the step: give "
                f"it weight_decay=0, and shrink the weights in the loop"
            )
        if group.get("decoupled_weight_decay") or name in _BESIDE:
            shrink.update(dict.fromkeys(moving, group["lr"] * decay))
        else:
            for p in moving:
                p.grad.add_(p.detach(), alpha=-decay if up else decay)
    return shrink, rising


@contextmanager
def _undecayed(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Around its step: without the weight decay, which is seen to."""
    kept = [group.get("weight_decay") for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            if group.get("weight_decay"):
                group["weight_decay"] = 0.0
        yield
    finally:
        for group, decay in zip(optimizer.param_groups, kept, strict=True):
            if decay:
                group["weight_decay"] = decay
