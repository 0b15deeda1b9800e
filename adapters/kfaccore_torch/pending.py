"""What waits for a step goes with the gradients that it is of: where they are thrown away, so is it.

A loop that skips a batch after its backward pass, or differentiates twice for one step (sharpness-aware minimisation),
says so by `zero_grad`, which tells nobody; but the next backward pass finds the gradients gone. One that keeps copies,
and adds them up itself, does the same: what was set aside comes back where the step's gradients have it in them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch

from kfaccore_torch.thrown import Sample, Thrown, sampled, used

if TYPE_CHECKING:
    from kfaccore_torch.collect import Shot

Left = list[tuple[torch.Tensor, torch.Tensor, int]]  # parameters, their gradients, and versions of these


@dataclass(eq=False)
class Pending:
    """The forwards that count in the next step, and `.grad` as the last backward pass left it.

    said  whether it was told, in any step, that gradients are neither those of the last pass nor sums
    """

    shots: list[Shot] = field(default_factory=list)
    said: bool = False
    _task: int = -1  # of the backward pass in progress, or the last one
    _trained: Sequence[torch.Tensor] = ()
    _left: Left = field(default_factory=list)  # by the last backward pass
    _thrown: list[Thrown] = field(default_factory=list)
    _last: Sample = field(default_factory=dict)  # of what the last pass left, where others were thrown away before

    def follow(self, trained: Sequence[torch.Tensor]) -> None:
        """A backward pass adds to the gradients of `trained`: what waited for gradients that are no more is dropped.
        Called by hooks, once for each loss that it differentiates, before that counts."""
        task = torch._C._current_graph_task_id()
        if task == self._task:
            return
        self._task = task
        if self.shots and self._gone():
            self._set_aside()
        else:
            self._look_back()
        self._left = []  # gradients that were let go of are not held on to
        # at the end of the pass, after what DistributedDataParallel does there
        queue = torch.autograd.Variable._execution_engine.queue_callback
        queue(partial(queue, partial(self._mark, trained)))

    def settle(self) -> None:
        """At a step: `shots` are those that count in its gradients."""
        self._look_back()
        self.shots[:] = [shot for shot in self.shots if not shot.losses or any(loss.counts for loss in shot.losses)]

    def _look_back(self) -> None:
        """What was set aside counts again where the gradients have it in them; what they have not is set aside."""
        if not self._thrown or _same(now := _gradients(self._trained), self._left):
            return
        before = self._thrown
        (last, *back), sure = used(sampled(now), self._last, [thrown.sample for thrown in before])
        if not sure:
            self._tell()
        self._thrown = [thrown for thrown, there in zip(before, back, strict=True) if not there]
        if not last:
            self._set_aside()
        for thrown, there in zip(before, back, strict=True):
            if there:
                thrown.bring_back()

    def _tell(self) -> None:
        if self.said:
            return
        self.said = True
        warnings.warn(
            "gradients were zeroed between the backward passes of one step, and those that step() got are neither what "
            "the last pass left, nor a sum that has the others in it: taken for what the loop makes of all of them, so "
            "the statistics of all count. Where a batch was skipped, call discard() with zero_grad()",
            stacklevel=5,
        )

    def _mark(self, trained: Sequence[torch.Tensor]) -> None:
        self._trained = trained
        self._left = _gradients(trained)
        if self._thrown:
            self._last = sampled(self._left)

    def _set_aside(self) -> None:
        """Losses that were differentiated into `.grad` do not count; those whose gradients the loop asked for do."""
        losses = [loss for shot in self.shots for loss in shot.losses if loss.counts and loss.into]
        # gradients that were let go of are still there, others were written over
        whole = all(p.grad is not grad for p, grad, _ in self._left)
        self._thrown.append(Thrown([(loss, loss.drop()) for loss in losses], sampled(self._left) if whole else None))

    def _gone(self) -> bool:
        """Whether all gradients were let go of or set to zero; read on the host where all were written to since."""
        kept = [(p.grad, grad, version) for p, grad, version in self._left if p.grad is not None]
        if any(now is grad and now._version == version for now, grad, version in kept):
            return False
        return bool(self._left) and not any(bool(now.any()) for now, _, _ in kept)


def _gradients(trained: Sequence[torch.Tensor]) -> Left:
    return [(p, p.grad, p.grad._version) for p in trained if p.grad is not None]


def _same(now: Left, left: Left) -> bool:
    """Whether these are the tensors that there were, and nothing has written to them."""
    return len(now) == len(left) and all(
        grad is old and version == before for (_, grad, version), (_, old, before) in zip(now, left, strict=True)
    )
