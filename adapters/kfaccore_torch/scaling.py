"""Loss scales: gradients of a scaled loss that overflow are for the scaler to see, not to be mended out of sight."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from kfaccore_torch.bridge import HALF, constant


@dataclass
class Scale:
    """What the losses of a step were multiplied by before they were differentiated, as their gradients tell."""

    seen: torch.Tensor | None = None

    def note(self, grad: torch.Tensor) -> None:
        """The gradient that arrives at a loss; a hook of it."""
        self.seen = grad.detach()

    def overflow(self, grads: Sequence[Any], world: int) -> torch.Tensor | None:
        """NaN where a gradient, or its square, is not finite and its loss was made larger, beyond the number of ranks
        that a sum is multiplied by; else 0. Added to any gradient, it shows the scaler what a direction of zero would
        hide. Nothing is read on the host."""
        if self.seen is None or not grads:
            return None
        # the scale may overflow too in half precision; an infinite one elsewhere is no scaler's
        scaled = self.seen > world if self.seen.dtype in HALF else (self.seen > world) & (self.seen < math.inf)
        norm = torch.stack(torch._foreach_norm(grads)).sum()
        return torch.where(scaled.to(norm.device), norm * 0.0, constant(0.0, norm.dtype, norm.device))

    @contextmanager
    def shown(self, grads: Sequence[torch.Tensor], world: int) -> Iterator[None]:
        """Around what turns gradients into directions, in place: the overflow is seen in the first of them after."""
        overflow = self.overflow(grads, world)
        yield
        if overflow is not None:
            grads[0].add_(overflow)


class Scaler:
    """A `torch.amp.GradScaler` for gradients that no torch optimizer holds: it is told through a tensor of one number,
    infinite where one of theirs is not finite."""

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self.scaler = scaler
        self.good = True
        self._teller: torch.optim.Optimizer | None = None

    def scaled(self, value: torch.Tensor) -> torch.Tensor:
        """The loss to differentiate."""
        if self._teller is None:
            self._teller = torch.optim.SGD([torch.zeros(1, device=value.device, requires_grad=True)], 0.0)
        return self.scaler.scale(value)

    def unscaled(self, grads: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Gradients of the loss itself, in single precision or better; whether all are finite is kept as `good`."""
        self.good = _finite(grads)
        factor = self.scaler.get_scale()
        return [None if g is None else (g.float() if g.dtype in HALF else g) / factor for g in grads]

    def told(self, good: bool) -> None:
        """Whether all gradients were finite: the scaler chooses its next scale."""
        assert self._teller is not None
        (flag,) = self._teller.param_groups[0]["params"]
        flag.grad = torch.full_like(flag, 0.0 if good else math.inf)
        self.scaler.step(self._teller)
        self.scaler.update()


def _finite(grads: Sequence[torch.Tensor | None]) -> bool:
    """Whether all numbers are; one look at the device."""
    each = [g.detach().isfinite().all() for g in grads if g is not None]
    return not each or bool(torch.stack(each).all())
