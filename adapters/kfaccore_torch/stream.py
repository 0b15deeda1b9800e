"""Records of a trained model over a dataset, for `kfaccore.fit` and what is made of it: one backward a draw and no
weight gradient; the model is in eval mode meanwhile unless told, and its buffers stay as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import array_api_compat as aac
import torch
from torch import nn

import kfaccore as kf
from kfaccore_torch.draw import Batch
from kfaccore_torch.handed import kept
from kfaccore_torch.held import Undo, as_it_was
from kfaccore_torch.known_losses import TABLE
from kfaccore_torch.masks import Told
from kfaccore_torch.moved import Moved
from kfaccore_torch.plan import Plan, unwrapped
from kfaccore_torch.records import called
from kfaccore_torch.report import Coverage
from kfaccore_torch.rows import absent
from kfaccore_torch.settings import Settings
from kfaccore_torch.step import Engine

Array = Any


class Stream:
    """{layer: Record} of each batch, as often as it is asked for, the same draws every time.

    model, loss   a loss of torch, reduction mean or sum, or one of kfaccore
    batches       anything that can be iterated again and gives (inputs, target), such as a DataLoader that does not
                  shuffle; inputs are a tensor, a tuple of positional or a dict of keyword arguments
    fisher        kfaccore's monte_carlo, type2, empirical or forward_only
    train         leave the model in the mode it is in
    settings      fields of `Settings`: draws, seed, namespace, skip, ...

    n is a batch's share of the MEAN loss whatever the loss's reduction, so shares add up over batches of any sizes; of
    a sum of one's own, and of a Joint of sums, that is the mean over the prediction's first axis. A layer that a batch
    does not reach has J = 0 there. ValueError for a batch in which nothing counts.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Any,
        batches: Iterable[Any],
        fisher: Callable = kf.monte_carlo,
        train: bool = False,
        **settings: Any,
    ) -> None:
        self.model = model
        self.batches = batches
        self.train = train
        self.engine = _engine(model, _mean(loss), Settings.of({"fisher": fisher, **settings}))

    @property
    def coverage(self) -> Coverage:
        """Which parameters the records cover; print it."""
        return self.engine.report()

    @property
    def plan(self) -> Plan:
        """Which parameters make which layers, by the batches so far; the first is looked at where there was none."""
        if not self.engine.plan.seen:
            next(iter(self))
        return self.engine.plan

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[dict[str, kf.Record]]:
        for number, batch in enumerate(self.batches):
            inputs, target = _pair(batch)
            yield self._records(inputs, target, number)

    def _records(self, inputs: Any, target: Any, number: int) -> dict[str, kf.Record]:
        engine = self.engine
        given = {"inputs": inputs, "target": target}
        with torch.enable_grad(), _still(self.model, self.train, given) as undo:
            moved = Moved(self.model, engine.plan)
            undo.append(moved.undo)
            with engine.captured() as seen:
                seen.span.watch = moved.note
                f = called(self.model, inputs)
            f, target, draws = self._asked(f, target)
            batch = Batch(f, target, Told(None, {}, None))
            n = float(len(f)) if draws is not None else engine.share(batch)
            if n <= 0:
                raise ValueError(f"batch {number} has no records: {engine.void(batch)}; leave it out")
            if engine.objective.total:  # draws of a sum are on the examples' own scale
                n = float(min(len(head) for head in engine.objective.heads(f)))
            found, *_ = engine.records(seen, batch, number, n, True, given=draws)
        return _completed(engine, found, n, len(f) if isinstance(f, torch.Tensor) else 1)

    def _asked(self, f: Any, target: Any) -> tuple[Any, Any, torch.Tensor | None]:
        """What is differentiated, its target, and draws (draws, *shape) in place of the loss's own."""
        engine = self.engine
        engine.objective.heads(f)
        return f, target, None


class _Pulled(Stream):
    """Draws that are given: those of `units(prediction, target)`, each of whose numbers is pulled back for itself."""

    def __init__(
        self, model: nn.Module, units: Callable[[Any, Any], torch.Tensor], batches: Iterable[Any], **options: Any
    ) -> None:
        super().__init__(model, kf.Gaussian(), batches, **options)
        self.units = units

    def _records(self, inputs: Any, target: Any, number: int) -> dict[str, kf.Record]:
        """ValueError where no layer has a gradient of one example: others tell layers apart by their batch."""
        found = super()._records(inputs, target, number)
        if found and found.keys() <= self.engine.mixing:
            raise ValueError(
                f"batch {number}: rows of layers {sorted(found)} are shared by examples, or mix them (batch "
                f"statistics, message passing), so that no layer has a gradient of one example: hand over one at a "
                f"time, or take a layer behind what mixes them"
            )
        return found

    def _asked(self, f: Any, target: Any) -> tuple[Any, Any, torch.Tensor | None]:
        chosen = self.units(f, target)
        count = chosen[0].numel()
        eye = torch.eye(count, dtype=chosen.dtype, device=chosen.device)
        return chosen, None, eye.reshape(count, 1, *chosen.shape[1:]).expand(count, *chosen.shape)


def outputs(
    model: nn.Module,
    batches: Iterable[Any],
    select: Callable[[Any], torch.Tensor] | None = None,
    **options: Any,
) -> Stream:
    """A stream whose draws are the units of the prediction, for `P.covariance`: one backward each.

    batches   inputs, or (inputs, target); a tuple of positional arguments must come with a target, which may be None
    select    prediction -> (batch, units), such as `lambda f: f.logits[:, -1]` of a language model
    options   `train` and fields of `Settings`
    """

    def units(f: Any, target: Any) -> torch.Tensor:
        chosen = f if select is None else select(f)
        if not isinstance(chosen, torch.Tensor) or chosen.ndim < 2:
            shape = tuple(chosen.shape) if isinstance(chosen, torch.Tensor) else type(chosen).__name__
            raise ValueError(f"outputs got a prediction of {shape}; need (batch, units): give `select`")
        return chosen

    return _Pulled(model, units, batches, **options)


def measured(
    model: nn.Module, measure: Callable[[Any, Any], torch.Tensor], batches: Iterable[Any], **options: Any
) -> Stream:
    """A stream of one draw, the gradient of measure(prediction, target) -> (batch,), such as a margin; n = batch."""

    def units(f: Any, target: Any) -> torch.Tensor:
        values = measure(f, target)
        if values.ndim != 1 or not values.requires_grad:
            raise ValueError(
                f"measure gave shape {tuple(values.shape)}, requires_grad={values.requires_grad}; need (batch,), one "
                f"number an example, with a graph behind it"
            )
        return values[:, None]

    return _Pulled(model, units, batches, **options)


def _engine(model: nn.Module, loss: Any, settings: Settings) -> Engine:
    return Engine(model, loss, kf.Preconditioner(kf.Identity()), settings)


def _mean(loss: Any) -> Any:
    """A loss of torch with reduction "mean": a sum's share would not grow with its batch."""
    if type(loss) in TABLE and loss.reduction == "sum":
        loss = copy.copy(loss)
        loss.reduction = "mean"
    return loss


def _pair(batch: Any) -> tuple[Any, Any]:
    """(inputs, target); a batch that is no pair is inputs alone."""
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    return batch, None


def _completed(engine: Engine, found: dict[str, kf.Record], n: float, examples: int) -> dict[str, kf.Record]:
    """All layers in the order of the plan; J = 0 where the batch did not reach one."""
    draws = next(iter(found.values())).draws if found else 1
    every = {}
    with engine.working():
        for name, layer in engine.plan.layers.items():
            nothing = absent(layer, n, engine.like, engine.namespace)
            every[name] = found[name] if name in found else _empty(nothing, draws, examples)
    return every


def _empty(record: kf.Record, draws: int, examples: int) -> kf.Record:
    """A record without valid rows, of as many draws and examples as the other layers have."""
    a = record.a
    g = _zeros(record.g, (draws, record.blocks, examples, 1, record.d_out))
    if isinstance(a, kf.Ids):
        return kf.Record(kf.Ids(_zeros(a.index, (examples, 1)), a.size), g, record.n)
    return kf.Record(_zeros(a, (record.blocks, examples, 1, record.d_in)), g, record.n)


def _zeros(like: Array, shape: tuple[int, ...]) -> Array:
    return aac.array_namespace(like).zeros(shape, dtype=like.dtype, device=aac.device(like))


@contextmanager
def _still(model: nn.Module, train: bool, given: dict[str, Any]) -> Iterator[list[Undo]]:
    """In eval mode unless `train`; modes, what modules hold and what they are `given` are as they were afterwards, and
    what else is put back by what joins those handed out."""
    inner = unwrapped(model)
    modes = {module: module.training for module in inner.modules()}
    undo = kept(given)
    try:
        with as_it_was(inner):
            if not train:
                inner.eval()
            yield undo
    finally:
        with torch.no_grad():
            for put in undo:
                put()
        for module, mode in modes.items():
            module.training = mode
