"""Loss scales: the step is that of the loss itself, whether its gradients were unscaled before or will be after; those
that overflow are for the scaler to see, not to be mended out of sight."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from itertools import count
from typing import TYPE_CHECKING, Any

import torch

from kfaccore_torch.bridge import HALF
from kfaccore_torch.compiled import uncompiled

if TYPE_CHECKING:
    from kfaccore_torch.settle import Layer

Wrapped = Callable[..., Any]
_SCALED: deque[tuple[int, torch.Tensor]] = deque(maxlen=64)  # the newest backward passes of scaled losses, and factors
_UNSCALED: deque[tuple[int, frozenset[int]]] = deque(maxlen=64)  # when, and the parameters
_now = count().__next__  # orders backward passes and what unscales


def watch() -> None:
    """From now on what a `GradScaler` multiplies tells of its backward pass: how much a loss was multiplied by says
    nothing of by whom; and it tells whose gradients it has divided. `scale` and `unscale_` of torch's class, and of
    those made of it, are wrapped once; they give what they gave."""
    for kind in (torch.amp.GradScaler, *torch.amp.GradScaler.__subclasses__()):
        for name, wrapper in (("scale", _watched), ("unscale_", _noted)):
            given = vars(kind).get(name)
            if given is not None and not hasattr(given, "__wrapped__"):
                setattr(kind, name, wrapper(given))


def _watched(scale: Wrapped) -> Wrapped:
    @wraps(scale)
    def watched(scaler: Any, outputs: Any) -> Any:
        scaled = scale(scaler, outputs)
        return _told(scaled, partial(scale, scaler)) if scaler.is_enabled() else scaled

    return watched


def _noted(unscale: Wrapped) -> Wrapped:
    @wraps(unscale)
    def noted(scaler: Any, optimizer: Any) -> Any:
        found = unscale(scaler, optimizer)
        if scaler.is_enabled():
            own = frozenset(id(p) for group in optimizer.param_groups for p in group["params"])
            _UNSCALED.append((_now(), own))
        return found

    return noted


def _told(scaled: Any, scale: Wrapped) -> Any:
    """The same, with hooks that know the factor, which `scale` tells without a read on the host."""
    if not isinstance(scaled, torch.Tensor):
        told = (_told(x, scale) for x in scaled)
        return type(scaled)(told) if isinstance(scaled, list | tuple) else told
    if scaled.requires_grad:
        factor = scale(torch.ones((), device=scaled.device))
        scaled.register_hook(lambda grad: _SCALED.append((torch._C._current_graph_task_id(), factor)))
    return scaled


@dataclass
class Scale:
    """What a scaler has multiplied that the losses of a step are differentiated for, if one has.

    factor   by how much
    when     the newest backward pass was
    """

    factor: torch.Tensor | None = None
    when: int = -1

    @uncompiled
    def note(self, grad: torch.Tensor) -> None:
        """A loss is differentiated, which a hook of it tells, after those of what it goes into."""
        task = torch._C._current_graph_task_id()
        found = [factor for number, factor in _SCALED if number == task]
        if found:
            self.factor = found[-1]
            self.when = _now()

    def _scaled(self, layers: Mapping[str, Layer]) -> list[torch.Tensor]:
        """Gradients of layers that nothing has unscaled since the newest backward pass, each once."""
        if self.factor is None:
            return []
        own = frozenset[int]().union(*(own for when, own in _UNSCALED if when > self.when))
        parameters = {id(p): p for layer in layers.values() for p in layer.parameters.values() if id(p) not in own}
        return [p.grad for p in parameters.values() if p.grad is not None]

    @contextmanager
    def undone(self, layers: Mapping[str, Layer]) -> Iterator[None]:
        """Around what turns gradients into directions, in place: they are those of the loss itself meanwhile. Bounds
        are in its units, and buffers outlive a scale."""
        grads = self._scaled(layers)
        if self.factor is None or not grads:
            yield
            return
        factor = self.factor.to(grads[0].device)
        torch._foreach_div_(grads, factor)
        try:
            yield
        finally:
            torch._foreach_mul_(grads, factor)

    def checked(self, layers: Mapping[str, Layer]) -> Mapping[str, Layer]:
        """The layers; ValueError where gradients of theirs are scaled, for a step that no scaler takes."""
        if self._scaled(layers):
            raise ValueError(
                "the gradients are of a loss that a GradScaler has scaled, and graft takes the optimizer's whole step "
                "on them: call scaler.unscale_(optimizer) before graft, and scaler.update() after"
            )
        return layers

    def overflow(self, grads: Sequence[Any]) -> torch.Tensor | None:
        """NaN where a gradient, or its square, is not finite, else 0; None without a scaler. Added to any gradient, it
        shows the scaler what a direction of zero would hide. Nothing is read on the host."""
        return torch.stack(torch._foreach_norm(grads)).sum() * 0.0 if self.factor is not None and grads else None

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
