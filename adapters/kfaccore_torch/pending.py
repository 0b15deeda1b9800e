"""What waits for a step goes with the gradients that it is of: where they are thrown away, so is it.

A loop that skips a batch after its backward pass, or differentiates twice for one step (sharpness-aware minimisation),
says so by `zero_grad`, which tells nobody; but the next backward pass finds the gradients gone. One that keeps copies,
and adds them up itself, does the same, and one that asks for gradients (`torch.autograd.grad`) puts them where it will:
what was set aside comes back where the step's gradients have it in them. A pass that failed has given no gradients.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.utils.hooks import RemovableHandle

from kfaccore_torch.compiled import uncompiled
from kfaccore_torch.early import Early
from kfaccore_torch.gone import Left, doubt, gone, gradients, same
from kfaccore_torch.slopes import Common
from kfaccore_torch.thrown import Sample, Sampler, Taken, Thrown, moves, sampled, used

if TYPE_CHECKING:
    from kfaccore_torch.formed import Formed
    from kfaccore_torch.settle import Layer
    from kfaccore_torch.shots import Shot

_FEW = 4  # passes of one step between which a loop moves its parameters


@dataclass(eq=False)
class Pending:
    """The forwards that count in the next step, and `.grad` as the last backward pass left it.

    said    whether it was told, in any step, that gradients are neither those of the last pass nor sums
    missed  and that there are none at all, of layers that were measured
    idle    and that a rank gave no statistics, where others did
    """

    shots: list[Shot] = field(default_factory=list)
    said: bool = False
    missed: bool = False
    idle: bool = False
    early: Early = field(default_factory=Early)
    common: Common = field(default_factory=Common)
    _heard: list[RemovableHandle] = field(default_factory=list)
    _task: int = -1  # of the backward pass in progress, or the last one
    _firing: list[Formed] = field(default_factory=list)  # by a pass that has not reached its end
    _sampler: Sampler | None = None  # of what that pass hands to who asked
    _trained: Sequence[torch.Tensor] = ()
    _left: Left = field(default_factory=list)  # by the last backward pass
    _thrown: list[Thrown] = field(default_factory=list)
    _last: Sample = field(default_factory=dict)  # of what the last pass left, where others were set aside before
    _doubts: list[tuple[torch.Tensor, int]] = field(default_factory=list)  # and the pass after

    def fresh(self) -> Pending:
        """Where nothing waits; of losses that the loop keeps nothing is heard any more, and nothing kept for them."""
        self._drop_failed()
        for handle in self._heard:
            handle.remove()
        self.early.over()
        return Pending(said=self.said, missed=self.missed, idle=self.idle, early=self.early, common=self.common)

    def hear(self, loss: torch.Tensor, hook: Callable[[torch.Tensor], None]) -> None:
        """Of the differentiation of a loss of this step."""
        self._heard.append(loss.register_hook(hook))

    def follow(self, loss: Formed, into: bool) -> int:
        """A backward pass differentiates a loss, and adds to `.grad` or hands on what it was asked for: what waited for
        gradients that are no more is dropped. Called by hooks, before the loss counts; the number of the pass."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._drop_failed()
            self._task = task
            if into:
                self._compare()
            else:
                self._sampler = Sampler(loss.trained)
            # at the end of the pass, after what DistributedDataParallel does there
            queue = torch.autograd.Variable._execution_engine.queue_callback
            queue(partial(queue, partial(self._mark, loss.trained)))
        self._firing.append(loss)
        return task

    def settle(self) -> None:
        """At a step: `shots` are those that count in its gradients."""
        self._drop_failed()
        for zeros, task in self._doubts:
            if not bool(zeros):
                continue
            if same(gradients(self._trained), self._left):
                taken = [Taken.whole(loss, task).out() for shot in self.shots for loss in shot.losses]
                self._thrown.append(Thrown(taken, None, moves(self._trained)))
            else:
                self._tell()
        self._doubts = []
        if len(self._thrown) == 1 and self._thrown[0].asked and not self._left:
            self._thrown.pop().bring_back()  # whatever the loop made of them
        self._look_back()
        self.shots[:] = [shot for shot in self.shots if not shot.losses or any(loss.counts for loss in shot.losses)]

    def check(self, given: Collection[str], layers: Mapping[str, Layer] | None) -> None:
        """A warning, once, where no layer has a gradient for a step that layers were measured for, or an optimizer has
        used those of `layers`."""
        if layers is not None:
            self.early.check(layers, given)
        without = sorted({name for shot in self.shots for name in shot.found})
        if given or not without or self.missed:
            return
        self.missed = True
        warnings.warn(
            f"step() found no gradient at all, though layers {without} were measured for it by a loss that was "
            f"differentiated: nothing is preconditioned. Call step() after backward, before the optimizer's step and "
            f"its zero_grad; an optimizer that steps inside backward leaves nothing to precondition",
            stacklevel=4,
        )

    def untouched(self) -> bool:
        """Whether the gradients are as the last pass left them."""
        return same(gradients(self._trained), self._left)

    def tell_idle(self, rank: int) -> None:
        """A warning, once, that this rank has no share in the statistics of a step."""
        if self.idle:
            return
        self.idle = True
        warnings.warn(
            f"rank {rank} gave no statistics to this step, which other ranks did: taken for one without data. If it "
            f"had some, run its forward inside capture(), form its loss by pre.loss and differentiate it",
            stacklevel=5,
        )

    def _drop_failed(self) -> None:
        """A pass that never reached its end, as where memory ran out, differentiated nothing."""
        if not self._firing or torch._C._current_graph_task_id() == self._task:
            return
        for loss in self._firing:
            loss.passes.pop(self._task, None)
        self._firing = []
        if self._sampler is not None:
            self._sampler.close()
            self._sampler = None

    def _compare(self) -> None:
        """At the start of a pass: what waits, with what has become of its gradients."""
        into = (loss for shot in self.shots for loss in shot.losses if any(a.into for a in loss.passes.values()))
        # zeros that a batch without labels left are no sign that they were thrown away; the first with some tells
        void = all(loss.void for loss in into) and same(gradients(self._trained), self._left)
        found = set() if void else gone(self._left)
        if found is None:  # a device knows
            self._doubts.append((doubt(self._left), self._task))
        if found and len(found) == len(self._left):
            self._set_aside()
        else:
            if found:
                self._set_aside(found)
                self._last = self._last or sampled(one for one in self._left if id(one[0]) not in found)
            self._look_back()
        self._let_go()
        # gradients that were let go of are not held on to
        self._left = [one for one in self._left if one[0].grad is one[1]]

    def _look_back(self) -> None:
        """What was set aside counts again where the gradients have it in them; what they have not is set aside."""
        if not self._thrown or same(now := gradients(self._trained), self._left):
            return
        before = self._thrown
        last = self._last
        newest = before.pop() if not self._left and before[-1].asked else None
        if newest is not None:
            last = newest.sample or {}
        (there, *back), sure = used(sampled(now), last, [thrown.sample for thrown in before])
        if not sure:
            self._tell()
        if newest is not None:
            before.append(newest)
            back.append(there)
        self._thrown = [thrown for thrown, found in zip(before, back, strict=True) if not found]
        if not there and newest is None:
            self._set_aside()
        for thrown, found in zip(before, back, strict=True):
            if found:
                thrown.bring_back()

    def _tell(self) -> None:
        if self.said:
            return
        self.said = True
        warnings.warn(
            "gradients were zeroed, or asked of torch.autograd.grad, between the backward passes of one step, and what "
            "step() got is neither what the last pass left, nor a sum that has the others in it: taken for what the "
            "loop makes of all of them, so the statistics of all count. Where a batch was skipped, call discard() with "
            "zero_grad()",
            stacklevel=5,
        )

    @uncompiled
    def _mark(self, trained: Sequence[torch.Tensor]) -> None:
        """At the end of a pass."""
        self._trained = trained
        self.early.begin()
        firing = self._firing
        if self._sampler is None:
            self._left = gradients(trained)  # before the pass counts as one that did not fail
            self._firing = []
            self._last = sampled(self._left) if self._thrown else {}
            return
        self._firing = []
        if self._left and not self._last:
            self._last = sampled(self._left)
        taken = [Taken(loss, {self._task: loss.passes[self._task]}).out() for loss in firing]
        self._thrown.append(Thrown(taken, self._sampler.close(), moves(trained), asked=True))
        self._sampler = None

    def _set_aside(self, only: set[int] | None = None) -> None:
        """Losses that were differentiated into `.grad` do not count, in layers whose parameters, by id, are all among
        these alone; those whose gradients the loop asked for are aside."""
        losses = [loss for shot in self.shots for loss in shot.losses]
        taken = [Taken.whole(loss) if only is None else Taken.partly(loss, only) for loss in losses]
        left = [one for one in self._left if only is None or id(one[0]) in only]
        # gradients that were let go of are still there, others were written over
        kept = all(p.grad is not grad for p, grad, _ in left)
        if any(one.passes or one.layers for one in taken):
            sample = sampled(left) if kept else None
            self._thrown.append(Thrown([one.out() for one in taken], sample, moves(self._trained)))

    def _let_go(self) -> None:
        """Of batches that parameters were moved after, but for a few: no step to come is of them, save where a loop
        moves parameters within one, as sharpness-aware minimisation does."""
        if len(self._thrown) <= _FEW:
            return
        now = moves(self._trained)
        stale = [id(one) for one in self._thrown if one.moves != now]
        lost = set(stale[:-_FEW])
        before = self._thrown
        self._thrown = [one for one in before if id(one) not in lost]
        gone = {id(one.loss) for thrown in before if id(thrown) in lost for one in thrown.taken if one.passes}
        gone -= {id(one.loss) for thrown in self._thrown for one in thrown.taken if one.passes}
        emptied = []
        for shot in self.shots:
            kept = [loss for loss in shot.losses if loss.counts or id(loss) not in gone]
            if shot.losses and not kept:
                emptied.append(id(shot))  # one without a loss from the first counts as a forward
            shot.losses[:] = kept
        self.shots[:] = [shot for shot in self.shots if id(shot) not in emptied]
