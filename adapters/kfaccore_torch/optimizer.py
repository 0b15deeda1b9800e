"""One object that takes the whole step: forward, backward, direction, update, and the look back at the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

import kfaccore as kf
from kfaccore_torch.agreement import check_same
from kfaccore_torch.atomic import kept, whole_or_none
from kfaccore_torch.batch import mean, met, summed
from kfaccore_torch.compiled import uncompiled
from kfaccore_torch.distributed import over_ranks
from kfaccore_torch.draw import Batch
from kfaccore_torch.gradients import Backward
from kfaccore_torch.handed import Handed
from kfaccore_torch.kept import again as once_more
from kfaccore_torch.look import Look
from kfaccore_torch.masks import Told
from kfaccore_torch.moves import move_by, moves, penalty
from kfaccore_torch.outputs import Output, picked
from kfaccore_torch.own import recorded
from kfaccore_torch.records import called
from kfaccore_torch.remaining import Remaining
from kfaccore_torch.report import Coverage
from kfaccore_torch.scaling import Scaler
from kfaccore_torch.settings import Settings
from kfaccore_torch.step import Engine
from kfaccore_torch.uncounted import share_of_none, zero


class Optimizer:
    """Trains a model by K-FAC; by default it sets its own rate, momentum and damping.

        optimizer = Optimizer(model, nn.CrossEntropyLoss())
        for x, y in data:
            loss = optimizer.step(x, y)

    core       a kfaccore.Preconditioner with the step wanted; default KFAC() with SelfTuning()
    rest       parameters -> a torch optimizer, for parameters that are not covered; without it they have a diagonal
               curvature, `uncovered=kfaccore.Diagonal()`
    scaler     a GradScaler, for float16: the loss is scaled by it; where a gradient overflows no step is taken, and the
               scaler is told either way and updated
    output     which of the model's outputs the loss is of: a name ("logits"), a place in a tuple, or a function
    settings   fields of `Settings`

    `.grad` of covered parameters stays None: where a batch has fewer rows than a layer is wide, autograd is asked for
    the output gradients alone and the direction is built from them.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Any,
        core: kf.Preconditioner | None = None,
        rest: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        output: Output = None,
        **settings: Any,
    ) -> None:
        core = core or kf.Preconditioner(kf.KFAC(), step=kf.SelfTuning(), donate=True)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise TypeError("Optimizer sums gradients over ranks itself: give it the module without the wrapper")
        self.model = model
        if rest is None and settings.get("fisher") is not kf.forward_only and not kf.own_gradients(core):
            settings = {"uncovered": kf.Diagonal(), **settings}
        core = kept(over_ranks(core, model))
        self.engine = Engine(model, loss, core, Settings.of(settings))
        check_same(self.engine, parameters=True)
        self.output = output
        self.scaler = Scaler(scaler) if scaler is not None and scaler.is_enabled() else None
        self._handed = Handed()
        self._remaining = Remaining(rest)
        self._remaining.follow(self.engine.plan)

    @property
    def rest(self) -> torch.optim.Optimizer | None:
        """The optimizer of parameters that are not covered, one for the whole run; None where there are none."""
        return self._remaining.optimizer

    @property
    def info(self) -> kf.Info | None:
        """What the last step did; `info.step` has rate, momentum, damping and reduction ratio."""
        return self.engine.info

    def report(self) -> Coverage:
        """Which parameters are covered, how, at what size; print it."""
        return self.engine.report()

    def memory(self) -> dict[str, kf.Footprint]:
        """{layer: bytes of averages and inverses, and the peak of an update}, before the first step allocates them; of
        what no forward has shown yet, `kfaccore_torch.plan(model, *inputs).memory(core)` knows."""
        return self.engine.memory()

    @uncompiled
    def step(
        self,
        inputs: Any,
        target: Any,
        mask: torch.Tensor | None = None,
        ids: torch.Tensor | None = None,
        masks: Mapping[str, torch.Tensor] | None = None,
        examples: Any = None,
    ) -> float:
        """One update on a batch; the loss before it, penalty included.

        inputs   a tensor, a tuple of positional or a mapping of keyword arguments of the model
        mask     (batch, positions), true where a position exists
        ids      (batch,) places of the examples in the dataset, for methods that remember examples
        masks, examples   as `Preconditioner.capture` takes them
        """
        engine = self.engine
        if engine.replan():
            check_same(engine)
            self._remaining.follow(engine.plan)
        look = Look(engine, self._handed, {"inputs": inputs, "target": target})
        with torch.enable_grad():
            with engine.captured() as seen:
                look.watch(seen.span)
                f = self._predicted(inputs)
            batch = Batch(f, target, Told(mask, masks or {}, examples), ids)
            value, n = self._loss(batch)
            l2 = engine.core.schedules.penalties(engine.plan.layers, engine.state.step)
            with torch.autocast(engine.device.type, enabled=False):  # backward is not for it
                backward = Backward(engine, value, seen, batch, l2, self.scaler)
                records, own, observed = self._recorded(seen, batch, backward, n)
                with engine.working():
                    grads, rest = backward.gradients(observed)
        if self._overflowed():
            return mean(engine, float(value.detach()), n) + penalty(engine, l2)
        before, share, grads = met(engine, float(value.detach()), grads, n)
        if records is not None:
            missing = {*grads} - {*records}
            records, grads = engine.completed(records, grads, n or share_of_none(engine))
            own |= {name: records[name] for name in missing & {*records} - engine.mixing}  # J = 0: no share either
        grads, rest = summed(engine, grads, rest, share)
        before += penalty(engine, l2)

        def again() -> float:
            with look.again(grads, rest):
                value = float(once_more(engine.objective, self._predicted(inputs), target).detach())
            return mean(engine, value, n) + penalty(engine, l2)

        self._applied(records, grads, rest, before, again, own, (inputs, target))
        return before

    def _predicted(self, inputs: Any) -> Any:
        return picked(called(self.model, inputs), self.output)

    def _recorded(self, seen: Any, batch: Batch, backward: Backward, n: float) -> tuple:
        """As `recorded`; the plan then is that of all ranks."""
        found = recorded(self.engine, seen, batch, backward, n)
        self.engine.met(backward.value, batch.f)
        if self.engine.due:
            self.engine.agree(found[0] or ())
        if self.engine.due or seen.span.changed:
            self._remaining.follow(self.engine.plan)
        return found

    def _loss(self, batch: Batch) -> tuple[torch.Tensor, float]:
        """The training loss of a batch, and its share n: 0 where nothing counts but other ranks have examples."""
        engine = self.engine
        heads = engine.objective.heads(batch.f)
        if self.scaler is None and any(head.dtype == torch.float16 for head in heads):
            raise ValueError(
                "the prediction is float16, whose gradients underflow: pass scaler=torch.amp.GradScaler(), or use "
                "bfloat16"
            )
        n = engine.share(batch)
        world = engine.core.comm.world
        if n <= 0 and world == 1:
            raise ValueError(f"no step was taken: {engine.void(batch)}; skip such a batch")
        if n <= 0:
            return zero(heads), 0.0
        # a sum is one sum over all ranks
        return engine.objective.value(batch.f, batch.target), n / world if engine.objective.total else n

    def _applied(
        self,
        records: Any,
        grads: dict[str, Any],
        rest: tuple,
        before: float,
        again: Callable[[], float],
        own: dict[str, kf.Record],
        batch: tuple[Any, Any],
    ) -> None:
        """Take the core's step, and back what its rule judges too long by the loss `again`, and that of the rest."""
        engine = self.engine
        with whole_or_none(engine) as old:
            with torch.no_grad(), engine.working():
                batches = {name: [r] for name, r in records.items()} if records else None
                told = {"loss": before, "nonnegative": engine.objective.nonnegative(batch[1])}
                found = moves(engine, engine.step(batches, grads, batch, own=own, **told))
                old += [(p, p.detach().clone()) for p, _ in found] if engine.core.rule.judges else []
                move_by(found)
                torch.clear_autocast_cache()  # which has the old weights, while the caller's autocast is open

                def place(share: float) -> None:
                    for (_, move), (p, values) in zip(found, old, strict=True):
                        p.copy_(values - share * move if share else values)
                    torch.clear_autocast_cache()

                _, engine.state = engine.core.judge(engine.state, before, place, again)
            self._remaining.step(engine.plan, rest)

    def _overflowed(self) -> bool:
        """Whether a gradient of the scaled loss was not finite on any rank; the scaler is told."""
        if self.scaler is None:
            return False
        comm, good = self.engine.core.comm, self.scaler.good
        if comm.world > 1:
            good = not float(comm.all_reduce([torch.tensor(float(not good))])[0])
        self.scaler.told(good)
        if not good:
            self.engine.forget()
        return not good

    def save(self, path: Any, **meta: Any) -> None:
        """Covered parameters and state, without that of `rest`, in one file that every adapter of kfaccore reads."""
        self.engine.save(path, **meta)

    def load(self, path: Any) -> None:
        """Continue from a file of any adapter; ValueError, and no change, if it is another model's."""
        self.engine.load(path)

    def state_dict(self) -> dict[str, Any]:
        """For torch.save; loads on any device, and resumes bit for bit on one of its kind."""
        return self.engine.state_dict() | self._remaining.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`; ValueError, and no change, if it is another model's. What is frozen here waits
        with what the state has of it, what was frozen then begins anew."""
        if self._remaining.make is None and isinstance(state, Mapping) and "rest" in state:
            raise ValueError("one of the state and this optimizer has parameters outside K-FAC and the other has not")
        with self.engine.unless_damaged(), self._remaining.unless_damaged():
            self.engine.load_state_dict(state)
            self._remaining.follow(self.engine.plan)
            self._remaining.load_state_dict(state, self.engine.plan)
