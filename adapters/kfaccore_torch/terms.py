"""A term of the loss that no `pre.loss` explains is noticed once: it has no curvature, and one should know."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Terms:
    """Whether terms without curvature were declared, and whether that was looked at."""

    declared: bool = False
    looked: bool = False
    _waiting: list[Any] = field(default_factory=list)

    def expect(self, value: torch.Tensor, expected: Sequence[torch.Tensor | None], engine: Any) -> None:
        """Look, at the end of the backward pass of `value`, whether the gradient is that of `value` alone.

        expected   of the covered and other parameters, known from the question whose row is whose
        """
        if self.declared or self.looked or not expected or not value.requires_grad:
            return
        layers = engine.plan.layers.values()
        parameters = [p for layer in layers for p in layer.parameters.values()] + list(engine.plan.rest.values())
        if any(p.grad is not None and bool(p.grad.any()) for p in parameters):
            return
        self.looked = True

        def compare() -> None:
            if not self.declared and not _parallel([p.grad for p in parameters], expected):
                warnings.warn(
                    "the gradient is not that of pre.loss alone: a term of the loss has no curvature here. Declare it, "
                    "loss = pre.loss(f, y) + pre.extra(term), or form it by pre.loss",
                    stacklevel=2,
                )

        def at_the_end(grad: torch.Tensor) -> None:
            torch.autograd.Variable._execution_engine.queue_callback(compare)

        value.register_hook(at_the_end)


def _parallel(found: Sequence[torch.Tensor | None], expected: Sequence[torch.Tensor | None]) -> bool:
    """Whether a gradient is a multiple of the one expected, to rounding; where none is expected nothing is known."""
    known = ((g, e) for g, e in zip(found, expected, strict=True) if e is not None)
    pairs = [(torch.zeros_like(e) if g is None else g, e) for g, e in known]
    products = torch.zeros(3, dtype=torch.float64)
    for g, e in pairs:
        g, e = g.detach().double().reshape(-1).cpu(), e.detach().double().reshape(-1).cpu()
        products += torch.stack([g @ g, g @ e, e @ e])
    gg, ge, ee = products.tolist()
    if not gg or not ee or gg != gg:
        return True
    return gg - ge * ge / ee <= 1e-4 * gg
