"""A term of the loss that no `pre.loss` explains is noticed once: it has no curvature, and one should know."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch

import kfaccore as kf
from kfaccore_torch.compiled import uncompiled
from kfaccore_torch.unusual import dense, unusual

Hear = Callable[[torch.Tensor, Callable[[torch.Tensor], None]], None]
Expected = Sequence[torch.Tensor | None]


@dataclass
class Terms:
    """Whether terms without curvature were declared, and whether that was looked at."""

    declared: bool = False
    looked: bool = False
    _fired: list[tuple[torch.Tensor, Expected]] = field(default_factory=list)  # losses of one backward pass
    _task: int = -1  # that pass

    def expect(
        self, value: torch.Tensor, expected: Expected, parameters: Sequence[torch.nn.Parameter], hear: Hear
    ) -> None:
        """Look, at the end of the backward pass of `value`, whether the gradient is that of such losses alone.

        expected   the loss's own gradient of each of `parameters`; empty where it is not known
        hear       what puts a hook on it until the step is over
        """
        if self.declared or self.looked or not value.requires_grad:
            return
        fresh = bool(expected) and all(p.grad is None or not bool(dense(p.grad).any()) for p in parameters)
        hear(value, partial(self._fire, expected if fresh else (), parameters))

    @uncompiled
    def _fire(self, expected: Expected, parameters: Sequence[torch.nn.Parameter], grad: torch.Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if task != self._task:  # what is left of a pass before is of one that failed
            self._task = task
            self._fired = []
            torch.autograd.Variable._execution_engine.queue_callback(partial(self._compare, parameters))
        self._fired.append((grad.detach(), expected))  # not read: a device would be waited for

    @uncompiled
    def _compare(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        fired, self._fired = self._fired, []
        if self.declared or self.looked or not all(expected for _, expected in fired):
            return
        self.looked = True
        slopes = [(float(grad), expected) for grad, expected in fired]
        if not _parallel([p.grad for p in parameters], [_sum(slopes, i) for i in range(len(parameters))]):
            warnings.warn(
                "the gradient is not that of pre.loss alone: a term of the loss has no curvature here. Declare it, "
                "loss = pre.loss(f, y) + pre.extra(term), or form it by pre.loss",
                stacklevel=2,
            )

    def __getstate__(self) -> dict[str, Any]:
        """Without what a backward pass in progress has seen."""
        return {**self.__dict__, "_fired": [], "_task": -1}


def numbered(weight: Any, fisher: object) -> tuple[float, bool]:
    """A loss's weight as a number, and whether it is learned: then it has a gradient, also where it is 1. ValueError
    where it is negative, not one number, or the `fisher` takes no draws that it could scale."""
    tensor = isinstance(weight, torch.Tensor)
    many = weight.shape if tensor else np.shape(weight)
    if prod(many) != 1:
        raise ValueError(
            f"weight has shape {tuple(many)}; need one number a loss. For a weight an example form the loss by "
            f"kfaccore_torch.ExampleLoss, of the examples' losses times their weights"
        )
    number = float(weight.detach() if tensor else weight)
    if not number >= 0:
        raise ValueError(f"weight is {number}; need a number that is not negative")
    learned = tensor and weight.requires_grad
    if (learned or number != 1.0) and fisher is kf.forward_only:
        raise ValueError(
            f"weight is {number}; a weight scales draws, and fisher=forward_only takes none: multiply the loss "
            f"instead, as in weight * pre.loss(f, y), and G stays I"
        )
    return number, learned


def _sum(fired: Sequence[tuple[float, Expected]], i: int) -> torch.Tensor | None:
    """The gradient of one parameter that the losses explain."""
    known = [scale * e for scale, expected in fired if (e := expected[i]) is not None]
    return sum(known[1:], known[0]) if known else None


def _parallel(found: Sequence[torch.Tensor | None], expected: Expected) -> bool:
    """Whether a gradient is a multiple of the one expected, to rounding; where none is expected nothing is known."""
    known = ((g, e) for g, e in zip(found, expected, strict=True) if e is not None)
    pairs = [(torch.zeros_like(e) if g is None else g, e) for g, e in known if not unusual(e)]
    products = torch.zeros(3, dtype=torch.float64)
    for g, e in pairs:
        flat = [x.detach().double().reshape(-1).cpu() for x in (g, e)]
        products += torch.stack([flat[0] @ flat[0], flat[0] @ flat[1], flat[1] @ flat[1]])
    gg, ge, ee = products.tolist()
    if not gg or not ee or gg != gg:
        return True
    return gg - ge * ge / ee <= 1e-4 * gg
