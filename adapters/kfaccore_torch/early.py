"""Optimizers that step before `step()` does: they have used plain gradients, and directions come too late."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

if TYPE_CHECKING:
    from kfaccore_torch.settle import Layer


@dataclass(eq=False)
class Early:
    """The parameters of optimizers that have stepped since the last backward pass of a step.

    said  whether a warning was given
    """

    said: bool = False
    _used: set[int] = field(default_factory=set)

    def begin(self) -> None:
        """A backward pass has left gradients."""
        self._used = set()
        if not self.said:
            _WAITING.add(self)

    def over(self) -> None:
        """The step is over: optimizers may step."""
        _WAITING.discard(self)

    def note(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer has stepped."""
        self._used.update(id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None)

    def check(self, layers: Mapping[str, Layer], given: Iterable[str]) -> None:
        """A warning, once, where it has used the gradients of layers `given`."""
        if not self._used or self.said:
            return
        paths = ((path, layers[name].parameters[role]) for name in given for role, path in layers[name].paths.items())
        names = sorted({path for path, p in paths if id(p) in self._used})
        if not names:
            return
        self.said = True
        warnings.warn(
            f"an optimizer stepped between backward and step(), by the plain gradients of {names}: the directions that "
            f"step() writes come too late for it. Call step() first, then the optimizer's step",
            stacklevel=4,
        )


_WAITING: WeakSet[Early] = WeakSet()  # those between a backward pass and its step


def _note(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():  # a compiled step is not looked into
        return
    for early in list(_WAITING):
        early.note(optimizer)


register_optimizer_step_post_hook(_note)
