"""K-FAC directions for any torch optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import kfaccore as kf
from kfaccore_torch.bridge import ordered
from kfaccore_torch.engine import Batch, Engine, Settings
from kfaccore_torch.report import Coverage


class Preconditioner:
    """Turns `.grad` of the covered parameters into K-FAC directions; everything else in the loop stays.

        pre = Preconditioner(model, nn.CrossEntropyLoss())
        for x, y in data:
            with pre.capture():
                f = model(x)
            loss = pre.loss(f, y)         # the loss given above, at f and y
            loss.backward()
            pre.step()                    # .grad are directions now
            optimizer.step()
            optimizer.zero_grad()

    model      its layers are found by the identity of their parameters; wrapped in DistributedDataParallel or
               torch.compile it may be
    loss       nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss (mean or sum), or a loss of kfaccore
    core       a kfaccore.Preconditioner, or a method; default KFAC() at the default clocks
    settings   fields of `Settings`

    Several micro-batches before one step are several captures, each with its loss. Clip gradients before `step` to
    bound the gradient, after it to bound the direction. With a GradScaler call `step` after `scaler.unscale_`.
    """

    def __init__(self, model: nn.Module, loss: Any, core: Any = None, **settings: Any) -> None:
        core = core if isinstance(core, kf.Preconditioner) else kf.Preconditioner(core or kf.KFAC(), donate=True)
        if core.rule.judges or core.rule.needs_records:
            raise ValueError(f"{core.rule} looks at the loss after the step: give it to Optimizer instead")
        if core.schedules.weight_decay or core.schedules.l2:
            raise ValueError("weight decay and l2 are the optimizer's here: set them there")
        self.engine = Engine(model, loss, core, Settings(**settings))
        self._open: tuple[dict, Any] | None = None
        self._records: dict[str, list[kf.Record]] = {}
        self._turn = 0

    @property
    def info(self) -> kf.Info | None:
        """What the last step did."""
        return self.engine.info

    def report(self) -> Coverage:
        """Which parameters are covered, how, at what size; print it."""
        return self.engine.report()

    @contextmanager
    def capture(self, mask: torch.Tensor | None = None) -> Iterator[None]:
        """Around one forward pass; does nothing on steps that need no records.

        mask   (batch, positions), true where a position exists: padding is left out of the factors
        """
        self._open = None
        if not self.engine.due:
            yield
            return
        with self.engine.captured() as seen:
            yield
        self._open = seen.calls, mask

    def loss(self, f: torch.Tensor, target: Any) -> torch.Tensor:
        """The training loss at the captured prediction. Raises ValueError if the forward was not captured."""
        value = self.engine.objective.value(f, target)
        if not self.engine.due or not torch.is_grad_enabled():
            return value
        if self._open is None:
            raise ValueError("this step updates statistics: run the model inside `with pre.capture():` before loss()")
        calls, mask = self._open
        records = self.engine.records(calls, Batch(f, target, mask), self._turn)
        self._open, self._turn = None, self._turn + 1
        for name, found in records.items():
            self._records.setdefault(name, []).append(found)
        return value

    def step(self) -> None:
        """Replace gradients by directions, in place. Parameters without a gradient are left alone."""
        engine, grads = self.engine, {}
        with torch.no_grad(), ordered(engine.namespace, engine.device):
            for name, layer in engine.plan.layers.items():
                found = {role: p.grad for role, p in layer.parameters.items() if p.grad is not None}
                if len(found) == len(layer.parameters):
                    grads[name] = engine.matrix(layer, found)
            self._check_seen(grads)
            directions = engine.step(self._records if engine.due else None, grads) if grads else {}
            for name, matrix in directions.items():
                layer = engine.plan.layers[name]
                for role, x in engine.tensors(layer, matrix).items():
                    layer.parameters[role].grad.copy_(x)  # type: ignore[union-attr]
        self._records, self._turn, self._open = {}, 0, None

    def _check_seen(self, grads: dict[str, Any]) -> None:
        """A gradient that no captured call explains would be preconditioned by another batch's curvature."""
        if not self.engine.due or not self._records:
            return
        for name in set(grads) - set(self._records):
            if bool((grads[name] != 0).any()):
                raise ValueError(
                    f"layer {name!r} has a gradient but none of its calls was captured: was the model run inside "
                    f"capture(), and is checkpointing non-reentrant (use_reentrant=False)?"
                )

    def save(self, path: Any, **meta: Any) -> None:
        """Covered parameters and state in one file that every adapter of kfaccore reads."""
        self.engine.save(path, **meta)

    def load(self, path: Any) -> None:
        """Continue from a file of any adapter; ValueError, and no change, if it is another model's."""
        self.engine.load(path)

    def state_dict(self) -> dict[str, Any]:
        """For torch.save; resumes bit for bit on any device."""
        return self.engine.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`; ValueError, and no change, if it is another model's."""
        self.engine.load_state_dict(state)
