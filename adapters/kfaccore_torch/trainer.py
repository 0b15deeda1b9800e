"""K-FAC under `transformers.Trainer`: a callback that makes gradients directions before each optimizer step."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import nn

from kfaccore_torch.compiled import eagerly, uncompiled
from kfaccore_torch.preconditioner import Preconditioner

Read = Callable[[Mapping[str, Any], Any], tuple[torch.Tensor, torch.Tensor]]
_FILE = "kfaccore.pt"
_LOSSES = (
    "Under the Trainer a step's loss is the model's own, of labels among its inputs, or what a compute_loss or "
    "compute_loss_func forms by callback.pre.loss(outputs.logits, labels), of labels taken out of the inputs. A label "
    "smoother takes them out too: CrossEntropyLoss(label_smoothing=...) is one"
)


class KFACCallback(importlib.import_module("transformers").TrainerCallback):
    """Directions for the optimizer of a `transformers.Trainer`.

        trainer = Trainer(model, TrainingArguments(out, optim="sgd", learning_rate=0.1), train_dataset=data,
                          callbacks=[KFACCallback()])

    loss      what the model makes of its labels: CrossEntropyLoss by default, MSELoss for a regression
    core      a kfaccore.Preconditioner or a method, as `Preconditioner` takes it
    read      (inputs, outputs) -> prediction and target of the loss. Without it the ways of transformers are tried, of
              shifted labels, a label a token or one a sequence: the one whose loss is the model's own is taken, and a
              loss that none explains is an error
    clip      largest norm of the direction; `max_grad_norm` of the Trainer bounds the gradient before
    settings  fields of `Settings`

    Micro-batches of `gradient_accumulation_steps` are one update, each with its share of the labels, as the Trainer
    divides them. Evaluation is not seen. Checkpoints of the Trainer get the state beside the optimizer's.

    A `compute_loss` of one's own, or a `compute_loss_func`, takes the labels out of the inputs, so that the model forms
    no loss, and forms it by `pre.loss` of the callback:

        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = callback.pre.loss(outputs.logits, labels)
    """

    def __init__(
        self, loss: Any = None, core: Any = None, read: Read | None = None, clip: float | None = None, **settings: Any
    ) -> None:
        self.made_of = (nn.CrossEntropyLoss() if loss is None else loss, core)
        self.read = read
        self.clip = clip
        self.settings = settings
        self.pre: Preconditioner | None = None
        self._way = 0  # which of the ways explained the last loss
        self._inside: AbstractContextManager | None = None
        self._hooks: list[Any] = []
        self._eager = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **more: Any) -> None:
        """Plan the model, and go on from the checkpoint that the Trainer goes on from."""
        self.pre = Preconditioner(model, *self.made_of, **self.settings)
        saved = os.path.join(args.output_dir, f"checkpoint-{state.global_step}", _FILE)
        if state.global_step and not os.path.exists(saved):
            raise ValueError(f"training goes on at step {state.global_step}, but there is no {saved} to go on from")
        if state.global_step:
            self.pre.load_state_dict(torch.load(saved, weights_only=True))
        self._hooks = [
            model.register_forward_pre_hook(self._enter),
            model.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
        ]

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """A model that the Trainer compiles runs as it was written where it is captured: its hooks are inside."""
        self._eager.close()
        if args.torch_compile and self.pre is not None and self.pre.engine.due:
            self._eager.enter_context(eagerly())  # until the forward begins, and no longer where the step fails

    on_substep_end = on_step_begin  # before the next micro-batch

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **more: Any) -> None:
        """Gradients, clipped if the Trainer clips, become directions."""
        assert self.pre is not None
        try:
            self.pre.step()
        except ValueError as error:
            error.add_note(_LOSSES)
            raise
        if self.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), self.clip)

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """The state, in the checkpoint that the Trainer has just written."""
        assert self.pre is not None
        found = self.pre.state_dict()
        if state.is_world_process_zero:
            torch.save(found, os.path.join(args.output_dir, f"checkpoint-{state.global_step}", _FILE))

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Leave the model as it was."""
        self._eager.close()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @uncompiled
    def _enter(self, model: nn.Module, args: Any) -> None:
        self._eager.close()
        if model.training and torch.is_grad_enabled() and self.pre is not None:
            self._inside = self.pre.capture()
            self._inside.__enter__()

    @uncompiled
    def _leave(self, model: nn.Module, args: tuple, given: dict[str, Any], output: Any) -> None:
        if self._inside is None or self.pre is None:
            return
        inside, self._inside = self._inside, None
        inside.__exit__(None, None, None)
        if output is None:  # the forward raised
            return
        value: Any = output.get("loss") if isinstance(output, Mapping) else output[0]
        if not isinstance(value, torch.Tensor) or value.ndim or not value.requires_grad:
            return  # it is the loop's to form
        self.pre.attach(value, *self._read(given, output, value.detach()))

    def _read(self, given: Mapping[str, Any], output: Any, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Prediction and target of the loss that the model has formed."""
        if self.read is not None:
            return self.read(given, output)
        logits = output["logits"] if isinstance(output, Mapping) else output[1]
        ways = list(_ways(logits, given["labels"]))
        items = given.get("num_items_in_batch")
        for way in (self._way, *range(len(ways))):
            if way < len(ways) and self._explains(*ways[way], value, items):
                self._way = way
                return ways[way]
        raise ValueError(
            f"no way of transformers makes the loss {float(value):.6g} of {type(self.made_of[0]).__name__}, logits "
            f"{tuple(logits.shape)} and labels {tuple(given['labels'].shape)}: pass loss= for another, or "
            f"read=(inputs, outputs) -> (prediction, target); one that compute_loss forms is callback.pre.loss(logits, "
            f"labels), of labels taken out of the inputs"
        )

    def _explains(self, f: torch.Tensor, target: torch.Tensor, value: torch.Tensor, items: Any) -> bool:
        """Whether the loss at f and target is the model's: a mean, or a sum over the items of all micro-batches."""
        assert self.pre is not None
        objective = self.pre.engine.objective
        with torch.no_grad():
            try:
                mine = objective.value(f.float(), target)
                whole = mine if items is None else mine * objective.share(f, target) / items
            except (ValueError, RuntimeError, IndexError):  # shapes or types that this way is not for
                return False
        slack = 2e-2 if f.dtype in (torch.float16, torch.bfloat16) else 1e-4
        return any(bool((x - value).abs() <= slack * value.abs() + 1e-12) for x in (whole, mine)) or bool(value.isnan())


def _ways(logits: torch.Tensor, labels: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Predictions and targets as models of transformers form losses of them."""
    if logits.ndim == 3 and labels.ndim == 2:
        yield logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        yield logits.flatten(0, 1), labels.flatten()
    else:
        yield logits, labels
        if logits.shape == (*labels.shape, 1):
            yield logits.squeeze(-1), labels
