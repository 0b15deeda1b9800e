"""Loss scales: gradients of a scaled loss that overflow are for the scaler to see, not to be mended out of sight."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch

from kfaccore_torch.bridge import HALF

_SCALED: deque[int] = deque(maxlen=64)  # the newest backward passes of what a scaler has multiplied


def watch() -> None:
    """From now on what a `GradScaler` multiplies tells of its backward pass: how much a loss was multiplied by says
    nothing of by whom. `scale` of torch's class, and of those made of it, is wrapped once; it gives what it gave."""
    for kind in (torch.amp.GradScaler, *torch.amp.GradScaler.__subclasses__()):
        scale = vars(kind).get("scale")
        if scale is not None and not hasattr(scale, "__wrapped__"):
            setattr(kind, "scale", _watched(scale))  # noqa: B010


def _watched(scale: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    @wraps(scale)
    def watched(scaler: Any, outputs: Any) -> Any:
        scaled = scale(scaler, outputs)
        return _told(scaled) if scaler.is_enabled() else scaled

    return watched


def _told(scaled: Any) -> Any:
    """The same, with hooks."""
    if not isinstance(scaled, torch.Tensor):
        told = map(_told, scaled)
        return type(scaled)(told) if isinstance(scaled, list | tuple) else told
    if scaled.requires_grad:
        scaled.register_hook(lambda grad: _SCALED.append(torch._C._current_graph_task_id()))
    return scaled


@dataclass
class Scale:
    """Whether a scaler has multiplied what the losses of a step are differentiated for."""

    seen: bool = False

    def note(self, grad: torch.Tensor) -> None:
        """A loss is differentiated, which a hook of it tells, after those of what it goes into."""
        self.seen |= torch._C._current_graph_task_id() in _SCALED

    def overflow(self, grads: Sequence[Any]) -> torch.Tensor | None:
        """NaN where a gradient, or its square, is not finite, else 0; None without a scaler. Added to any gradient, it
        shows the scaler what a direction of zero would hide. Nothing is read on the host."""
        return torch.stack(torch._foreach_norm(grads)).sum() * 0.0 if self.seen and grads else None

    @contextmanager
    def shown(self, grads: Sequence[torch.Tensor]) -> Iterator[None]:
        """Around what turns gradients into directions, in place: the overflow is seen in the first of them after."""
        overflow = self.overflow(grads)
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
