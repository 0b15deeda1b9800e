"""K-FAC directions for any torch optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

import kfaccore as kf
from kfaccore_torch.agreement import check_same
from kfaccore_torch.collect import counted
from kfaccore_torch.compiled import uncompiled, uncompiled_context
from kfaccore_torch.distributed import over_ranks
from kfaccore_torch.draw import Batch
from kfaccore_torch.formed import Formed, stale
from kfaccore_torch.given import gradients
from kfaccore_torch.grafting import stepped
from kfaccore_torch.masks import Told
from kfaccore_torch.opened import Open, Opened
from kfaccore_torch.outputs import Output, picked
from kfaccore_torch.own import mean_loss, own_apart, taken, weighed
from kfaccore_torch.pending import Pending
from kfaccore_torch.report import Coverage
from kfaccore_torch.scaling import Scale, watch
from kfaccore_torch.settings import Settings
from kfaccore_torch.shots import completed, unit
from kfaccore_torch.step import Engine
from kfaccore_torch.terms import Terms, numbered
from kfaccore_torch.uncounted import standing, zero
from kfaccore_torch.written import Written


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
    loss       nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss (mean or sum), a loss of kfaccore, one's own with
               the methods of `Loss`, or a kfaccore.Joint of them for a dict of predictions
    core       a kfaccore.Preconditioner, or a method; default KFAC() at the default clocks
    output     which of the model's outputs the loss is of: a name ("logits"), a place in a tuple, or a function
    settings   fields of `Settings`

    Several micro-batches before one step are several captures, each with its loss; several losses on one forward add
    their curvatures. Statistics are taken when a loss is formed and count once it is differentiated. A sum loss is one
    sum over micro-batches and ranks: under DistributedDataParallel, which averages, multiply it by the ranks. Clip
    before `step` to bound the gradient, after it to bound the direction. With a GradScaler `step` comes before
    `scaler.step`, after `scaler.unscale_` or without: what overflows is left for it to see.
    """

    def __init__(self, model: nn.Module, loss: Any, core: Any = None, output: Output = None, **settings: Any) -> None:
        core = core if isinstance(core, kf.Preconditioner) else kf.Preconditioner(core or kf.KFAC(), donate=True)
        core = over_ranks(core, model)
        if core.rule.judges:
            raise ValueError(f"{core.rule} looks at the loss after the step: give it to Optimizer instead")
        if core.schedules.weight_decay or core.schedules.penalised:
            raise ValueError("weight decay and l2 are the optimizer's: set them there")
        self.engine = Engine(model, loss, core, Settings.of(settings))
        check_same(self.engine)
        self.output = output
        self._opened = Opened()
        self._pending = Pending()
        self._formed = 0  # losses since the last step, differentiated or not
        self._terms = Terms()
        self._scale = Scale()
        self._written = Written()
        watch()

    @property
    def info(self) -> kf.Info | None:
        """What the last step did."""
        return self.engine.info

    def report(self) -> Coverage:
        """Which parameters are covered, how, at what size; print it."""
        return self.engine.report()

    def memory(self) -> dict[str, kf.Footprint]:
        """{layer: bytes of averages and inverses, and the peak of an update}, before the first step allocates them; of
        what no forward has shown yet, `kfaccore_torch.plan(model, *inputs).memory(core)` knows."""
        return self.engine.memory()

    @uncompiled_context
    def capture(
        self,
        mask: torch.Tensor | None = None,
        masks: Mapping[str, torch.Tensor] | None = None,
        examples: Any = None,
    ) -> Iterator[None]:
        """Around one forward pass; does nothing on steps that need no records.

        mask      (batch, positions), true where a position exists: padding is left out of the factors of every layer
                  whose rows have such positions
        masks     pattern of layer names -> a mask for those layers instead
        examples  the example of each row, (rows,), for layers that have as many, or pattern -> (rows,)
        """
        self._opened.prune()
        made_of = self.engine.plan.made_of
        if self.engine.replan():
            check_same(self.engine)
        if self.engine.plan.made_of is not made_of:
            self._opened.clear()
        if not self.engine.due:
            yield
            return
        with self.engine.captured() as seen, self._opened.inside(seen):
            yield
        self._opened.all.append(Open(seen, Told(mask, masks or {}, examples)))

    @uncompiled
    def loss(self, f: Any, target: Any, weight: float | torch.Tensor = 1.0) -> torch.Tensor:
        """The training loss at the captured prediction times `weight`; more than one on a forward add up, and so do
        their curvatures, each with its weight: on several forwards too, where not each has all parts of the loss.

        Raises ValueError if the forward was not captured, or its capture is not over.
        """
        f = picked(f, self.output)
        self.engine.objective.heads(f)
        return self.attach(self.engine.objective.value(f, target), f, target, weight)

    @uncompiled
    def attach(self, value: torch.Tensor, f: Any, target: Any, weight: float | torch.Tensor = 1.0) -> torch.Tensor:
        """As `loss`, for one formed elsewhere, by a model that is given its labels: `value`, the loss named above at f
        and target up to a factor, is handed back times `weight`, and counts once it is differentiated."""
        number, learned = numbered(weight, self.engine.settings.fisher)
        f = picked(f, self.output)
        weighted = value * weight if learned or number != 1.0 else value
        if weighted.requires_grad:
            weighted.register_hook(self._scale.note)
            self._written.follow(weighted, self.engine.plan.layers)
        if not self.engine.due or not torch.is_grad_enabled():
            return weighted
        opened = self._opened.of(heads := self.engine.objective.heads(f))
        seen = opened.seen
        shot = opened.shot
        seen.check_unspent()
        seen.plan = self.engine.plan  # other forwards of the step may have shown more since
        batch = Batch(f, target, opened.told)
        common = unit(self._opened.before(shot, number), number)
        n = self.engine.share(batch, wait=shot.formed or common is not None) if number else 0.0
        shot.total = self.engine.objective.total
        void = not isinstance(n, torch.Tensor) and n <= 0
        if void:
            shot.void = self.engine.void(batch) if number else "its losses have weight 0"
        if void and (shot.formed or not number or not standing(heads)):
            return counted(weighted, self._pending, shot, seen.let_go)
        times = shot.uncounted(shot.total) if void else shot.joined(n, number, common)
        found, observed = taken(self.engine, seen, batch, self._formed, shot.n, times, zero(heads) if void else value)
        self._formed += 1
        expected = [] if void else [g if g is None else g * number for g in observed.expected]
        formed = Formed.on(self.engine.plan, found, weighed(self.engine, shot.n, weighted), number, void)
        weighted = counted(weighted, self._pending, shot, seen.let_go, formed)
        self._terms.expect(weighted, expected, self.engine.plan.trained, self._pending.hear)
        return self.engine.met(weighted, f)

    def extra(self, term: torch.Tensor) -> torch.Tensor:
        """Declares a term of the loss that has no curvature here, such as a KL divergence or a penalty: it is handed
        back, to be added, and its gradient is preconditioned with the others."""
        self._terms.declared = True
        return self.engine.met(term)

    def discard(self) -> None:
        """Forget what was captured since the last step."""
        self._pending = self._pending.fresh()
        self._opened = Opened()
        self._formed = 0
        self._scale = Scale()
        self.engine.forget()

    @uncompiled
    def step(self, lengths: Mapping[str, float] | None = None) -> None:
        """Replace gradients by directions, in place. Parameters without a gradient are left alone.

        lengths   {layer: norm}, for rescale=Graft(); `graft` fills it from an optimizer
        """
        engine = self.engine
        self._pending.settle()
        error = stale(engine, self._pending.shots)
        if error is not None:
            self.discard()
            raise error
        with torch.no_grad(), engine.working():
            given = gradients(engine)
            self._pending.check(given, engine.plan.layers if lengths is None else None)
            self._written.check(engine.plan.layers, given)
            covered = [g for found in given.values() for g in found.values()]
            with self._scale.undone(engine.plan.layers), self._scale.shown(covered):
                if lengths is not None or not engine.launch.step(engine, given):
                    self._step(engine.matrices(given), lengths)
        self._written.note(engine.plan.layers[name] for name in given)
        self.discard()

    def _step(self, grads: dict[str, Any], lengths: Mapping[str, float] | None) -> None:
        """Gradients into directions, with the statistics that are due."""
        engine, records, n = self.engine, None, 0.0
        if engine.due and grads:
            seen = self._scale.factor, self._formed, self._opened.shots
            records, grads, n = completed(engine, self._pending, grads, *seen)
        self._opened.all = []  # the calls' inputs have done their part
        records, own = own_apart(engine, records)
        if grads:
            shots = self._pending.shots
            before = mean_loss(engine, [value for shot in shots for value in shot.values], n)
            endless = False if engine.objective.nonnegative(None) is False else None  # the loop weighs what it adds up
            told = {"loss": before, "own": own, "lengths": lengths, "nonnegative": endless}
            engine.write(engine.step(records, grads, tuple(shots), **told))

    def graft(self, optimizer: torch.optim.Optimizer) -> None:
        """The whole step of `optimizer`, with K-FAC's direction in the place of its own in every covered layer, which
        stays as long as it would have been; the core's step is Fixed(rescale=Graft()).

        In place of `step` and `optimizer.step`: it is run on the plain gradients, so that its state is its own. Weight
        decay in the gradient (Adam, SGD) is in both; beside the step (AdamW) it stays beside it.
        """
        layers = self._scale.checked(self.engine.plan.layers)
        grafted = stepped(optimizer, layers)
        self.step(grafted.lengths)
        grafted.take(layers)

    def save(self, path: Any, **meta: Any) -> None:
        """Covered parameters and state in one file that every adapter of kfaccore reads."""
        self.engine.save(path, **meta)

    def load(self, path: Any) -> None:
        """Continue from a file of any adapter; ValueError, and no change, if it is another model's."""
        self.engine.load(path)

    def state_dict(self) -> dict[str, Any]:
        """For torch.save; loads on any device, and resumes bit for bit on one of its kind."""
        return self.engine.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`; ValueError, and no change, if it is another model's."""
        self.engine.load_state_dict(state)

    def __getstate__(self) -> dict[str, Any]:
        """Without what waits for a step: it belongs to graphs, which no copy shares."""
        return {**self.__dict__, "_opened": Opened(), "_pending": Pending(), "_formed": 0, "_scale": Scale()}
