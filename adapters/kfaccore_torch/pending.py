"""What waits for a step goes with the gradients that it is of: where they are thrown away, so is it.

A loop that skips a batch after its backward pass, or differentiates twice for one step (sharpness-aware minimisation),
says so by `zero_grad`, which tells nobody; but the next backward pass finds the gradients gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kfaccore_torch.collect import Shot


@dataclass(eq=False)
class Pending:
    """The forwards that count in the next step, and `.grad` as the last backward pass left it."""

    shots: list[Shot] = field(default_factory=list)
    _task: int = -1  # of the backward pass in progress, or the last one
    _left: list[tuple[torch.Tensor, int]] = field(default_factory=list)  # parameters, versions of their gradients

    def follow(self, trained: Sequence[torch.Tensor]) -> None:
        """A backward pass adds to the gradients of `trained`: what waited for gradients that are no more is dropped.
        Called by hooks, once for each loss that it differentiates."""
        task = torch._C._current_graph_task_id()
        if task == self._task:
            return
        self._task = task
        if self.shots and self._gone():
            # those whose gradients the loop holds itself stay
            self.shots[:] = [shot for shot in self.shots if not any(loss.into for loss in shot.losses)]
        torch.autograd.Variable._execution_engine.queue_callback(partial(self._mark, trained))

    def _mark(self, trained: Sequence[torch.Tensor]) -> None:
        self._left = [(p, p.grad._version) for p in trained if p.grad is not None]

    def _gone(self) -> bool:
        """Whether all gradients were let go of or set to zero; read on the host where all were written to since."""
        kept = [(p.grad, version) for p, version in self._left if p.grad is not None]
        if any(grad._version == version for grad, version in kept):
            return False
        return bool(self._left) and not any(bool(grad.any()) for grad, _ in kept)
