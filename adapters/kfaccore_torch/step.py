"""What both shells share: the plan, the core preconditioner and its state, draws of labels, and resuming."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

import kfaccore as kf
from kfaccore_torch.bridge import HALF, chosen, ordered, to_core, to_torch
from kfaccore_torch.capture import Capture
from kfaccore_torch.collect import kept, measured, needs_rows
from kfaccore_torch.compiled import eagerly
from kfaccore_torch.distributed import Distributed
from kfaccore_torch.losses import FISHERS, objective
from kfaccore_torch.masks import Told
from kfaccore_torch.observe import Observed, Observer
from kfaccore_torch.plan import Layer, Plan, plan, unwrapped
from kfaccore_torch.report import Coverage, coverage
from kfaccore_torch.rows import absent, record


@dataclass(frozen=True)
class Settings:
    """How labels are drawn and where the core runs.

    fisher      kfaccore's monte_carlo (default), type2, empirical or forward_only; each draw costs one backward,
                without weight gradients, on steps that update statistics; forward_only takes none, so G = I
    draws       of monte_carlo
    seed        draws are a function of (seed, step, micro-batch, rank)
    namespace   "numpy", "cupy" or "torch"; by default NumPy for a model on the CPU and CuPy for one on CUDA
    samples     size of the dataset, for methods that remember examples
    rows        most rows of a batch, for methods that keep rows; 0 leaves it to the method
    skip        patterns of parameter names to leave uncovered
    strict      ValueError when a trainable parameter is not covered
    """

    fisher: Callable = kf.monte_carlo
    draws: int = 1
    seed: int = 0
    namespace: str | None = None
    samples: int = 0
    rows: int = 0
    skip: tuple[str, ...] = ()
    strict: bool = False

    def __post_init__(self) -> None:
        if self.fisher not in FISHERS:
            raise ValueError(f"fisher is {self.fisher!r}; need one of kfaccore's {[f.__name__ for f in FISHERS]}")
        if self.draws < 1:
            raise ValueError(f"draws is {self.draws}; need at least 1")


@dataclass(frozen=True)
class Batch:
    """A prediction, its target, what the caller tells of its rows, and the examples' places in the dataset."""

    f: Any
    target: Any
    told: Told
    ids: torch.Tensor | None = None


class Engine:
    """Plan, core and state of one model."""

    def __init__(self, model: nn.Module, loss: Any, core: kf.Preconditioner, settings: Settings) -> None:
        self.model, self.core, self.settings = model, core, settings
        self.objective = objective(loss)
        self.observer = Observer()
        self.mixing: set[str] = set()
        self.new = False  # whether layers joined since the last step, which must not wait for the clocks
        if kf.own_gradients(core) and settings.fisher is not kf.empirical:
            method = core.network or core.methods
            raise ValueError(f"{method} takes the loss's own gradients: pass fisher=kfaccore.empirical")
        self.plan = self._planned()
        first = next(iter(next(iter(self.plan.layers.values())).parameters.values()))
        self.device = first.device
        self.namespace = chosen(settings.namespace, self.device)
        self.like = torch.zeros(1, dtype=torch.float32 if first.dtype in HALF else first.dtype, device=self.device)
        self.state = self._first_state()
        self.info: kf.Info | None = None

    def _planned(self) -> Plan:
        """The plan of the model as it is now; ValueError where settings do not allow it."""
        found = plan(self.model, self.settings.skip)
        if self.settings.strict and found.uncovered:
            reasons = "\n".join(f"  {name}: {reason}" for name, reason in found.uncovered.items())
            raise ValueError(f"strict: {len(found.uncovered)} parameters are not covered\n{reasons}")
        if not found.layers:
            name = type(unwrapped(self.model)).__name__
            raise ValueError(f"no parameter of {name} is covered; see kfaccore_torch.plan")
        return found

    def _first_state(self) -> Any:
        with ordered(self.namespace, self.device):
            return self.core.init(self.blocks(), like=_owned(to_core(self.like, self.namespace)))

    def replan(self) -> bool:
        """Follow the model: parameters frozen, thawed or replaced since the plan was made. True if anything changed;
        layers of the same name and sizes keep their state, and new ones are measured and refreshed at once."""
        if self.plan.holds(self.model):
            return False
        old, blocks = self.state, self.blocks()
        self.plan = self._planned()
        self.observer = Observer()
        kept_on = {name for name, block in self.blocks().items() if blocks.get(name) == block}
        self.state = _carried(old, self._first_state(), kept_on)
        self.new = self.new or bool(set(self.plan.layers) - kept_on)
        return True

    def blocks(self) -> dict[str, kf.Block]:
        """Sizes of the layers, with the capacities of the settings."""
        capacity = {"samples": self.settings.samples, "rows": self.settings.rows}
        return {name: replace(layer.kind.block(), **capacity) for name, layer in self.plan.layers.items()}

    def report(self) -> Coverage:
        """Parameter by parameter: rule, factor sizes, bytes, and how the block is approximated."""
        return coverage(self.plan, self.blocks(), self.core, self.mixing)

    @property
    def now(self) -> kf.Preconditioner:
        """The core of the step to come: one that updates and refreshes, where layers are new."""
        if not self.new:
            return self.core
        urgent = copy.copy(self.core)
        object.__setattr__(urgent, "clocks", kf.Clocks(1, 1))
        return urgent

    @property
    def due(self) -> bool:
        """Whether the next step uses records."""
        return self.now.wants_records(self.state)

    def share(self, batch: Batch) -> float:
        """n of a batch, 0 where nothing in it counts."""
        return self.objective.share(batch.f, batch.target)

    def void(self, batch: Batch) -> str:
        """Why nothing in a batch counts."""
        shapes = [tuple(f.shape) for f in self.objective.heads(batch.f)]
        if any(0 in shape for shape in shapes):
            return f"the batch is empty: the prediction has shape {shapes[0]}"
        return "all labels of the batch are ignored (ignore_index), so no example counts and n is 0"

    def records(
        self,
        seen: Capture,
        batch: Batch,
        turn: int,
        n: float,
        exact: bool = False,
        given: Any = None,
        times: float = 1.0,
    ) -> tuple[dict[str, kf.Record], Observed]:
        """One record a layer that was called, from draws backpropagated to the edges; `.grad` is never touched.

        n      of the records
        exact  rows that mix examples make one example, so that `dense` has the right mean; else they stand as their
               shape suggests, which rules that judge a step by examples need
        given  draws (draws, *f.shape) instead of those of the settings, or a list of them a head
        times  factor on the draws
        """
        heads = _checked(self.objective.heads(batch.f))
        layers, fisher = self.plan.layers, self.settings.fisher
        probe, parameters = self._probe(heads, batch)
        observed = self.observer.look(seen, layers, heads, batch.told, probe, parameters)
        rank = [self.core.comm.rank] if self.core.comm.rank else []
        rng = np.random.default_rng([self.settings.seed, self.state.step, turn, *rank])
        draws = given
        if draws is None:
            draws = self.objective.draws(fisher, self.settings.draws, batch.f, batch.target, rng, observed.split)
        draws = list(draws) if isinstance(draws, list | tuple) else [draws]
        draws = draws if times == 1 else [v * times for v in draws]
        if observed.mixing and fisher in (kf.type2, kf.empirical) and given is None:
            self._check_own(observed)
            draws = _signed(draws, observed, rng)
        rows = [_pulled(heads, observed, v) for v in zip(*draws, strict=True)]
        columns = list(zip(*rows, strict=True)) if rows else [()] * len(observed.calls)
        grads = [
            _stacked(column, call, self.like.dtype) for column, (_, call) in zip(columns, observed.calls, strict=True)
        ]
        observed = self.observer.again(observed, layers, heads, grads)
        self.mixing |= observed.mixing
        return self._recorded(observed, grads, batch, n, exact), observed

    def _recorded(
        self, observed: Observed, grads: list[Any], batch: Batch, n: float, exact: bool
    ) -> dict[str, kf.Record]:
        by_layer: dict[str, list[tuple]] = {}
        for (name, call), place, g in zip(observed.calls, observed.places(exact), grads, strict=True):
            if g is not None:
                by_layer.setdefault(name, []).append((call, g, place, batch.told.mask_of(name, place)))
        batch.told.check(set(by_layer))
        found = {}
        with ordered(self.namespace, self.device):
            for name, parts in by_layer.items():
                calls, gs, places, masks = zip(*parts, strict=True)
                layer = self.plan.layers[name]
                found[name] = record(layer, calls, gs, places, n, self.namespace, masks, batch.ids)
        return found

    def _probe(self, heads: list[torch.Tensor], batch: Batch) -> tuple[Any, tuple]:
        """The loss's own gradient as the first draw of a question, if it moves every row: what it gives the parameters
        is then known too. Else nothing, and the question is asked with random numbers."""
        if batch.f is None or self.core.comm.world > 1 or heads[0].dtype in HALF:
            return None, ()
        try:
            own = self.objective.draws(kf.empirical, 1, batch.f, batch.target, None)
        except (ValueError, TypeError, AttributeError):  # soft labels, or none
            return None, ()
        own = [v[0] for v in (own if isinstance(own, list) else [own])]
        n = self.objective.share(batch.f, batch.target)
        if not n or not all(bool((v != 0).all()) and bool(v.isfinite().all()) for v in own):
            return None, ()
        parameters = [p for layer in self.plan.layers.values() for p in layer.parameters.values()]
        return [v / n for v in own], (*parameters, *self.plan.rest.values())

    def _check_own(self, observed: Observed) -> None:
        if kf.own_gradients(self.core):
            raise ValueError(
                f"rows of layers {sorted(observed.mixing)} mix examples or are shared by them, so per-example "
                f"gradients, which {self.core.network or self.core.methods} is made of, do not exist there: give those "
                f"layers another method, or skip them"
            )

    def waiting(self, records: dict[str, kf.Record]) -> dict[str, Any]:
        """What is kept until the step: Stats, or copies of rows where the step needs rows."""
        covered = self.core.network.covers(self.blocks()) if self.core.network is not None else ()
        found = {}
        with torch.no_grad(), ordered(self.namespace, self.device):
            for name, one in records.items():
                whole = needs_rows(self.core, name, covered)
                found[name] = kept(one) if whole else measured(self.core, self.state, name, one)
        return found

    def absent(self, name: str, n: float) -> kf.Record:
        """The record of a layer that a share n of the examples did not reach."""
        with ordered(self.namespace, self.device):
            return absent(self.plan.layers[name], n, self.like, self.namespace)

    def matrix(self, layer: Layer, tensors: dict[str, torch.Tensor]) -> Any:
        """Tensors like a layer's parameters, by role -> its matrix in the core's namespace."""
        return layer.matrix({role: to_core(x, self.namespace) for role, x in tensors.items()})

    def step(self, records: dict[str, list[Any]] | None, grads: dict[str, Any]) -> dict[str, Any]:
        """The core's step; state and info move on."""
        try:
            updates, self.state, info = self.now.step(self.state, records, grads)
        except Exception as error:
            self.leave_word(error)
            raise
        self.new = False
        marks = {name: {**info.layers.get(name, {}), "mixes": np.asarray(True)} for name in self.mixing & set(grads)}
        self.info = replace(info, layers={**info.layers, **marks})
        return updates

    def check_seen(self, records: Mapping[str, Any], grads: dict[str, Any]) -> None:
        """ValueError for a gradient that no captured call explains: it would keep another batch's curvature for ever."""
        missing = [name for name in grads if name not in records and _nonzero(grads[name])]
        if missing:
            error = ValueError(
                f"layer {missing[0]!r} has a gradient but none of its calls was captured"
                f"{f' (nor of {missing[1:]})' if missing[1:] else ''}: was the model run inside capture(), and is "
                f"checkpointing non-reentrant (use_reentrant=False)?"
            )
            self.leave_word(error)
            raise error

    def leave_word(self, error: Exception) -> None:
        """Other ranks, which may lose the connection before they know, can then say why this one stops."""
        if isinstance(self.core.comm, Distributed):
            self.core.comm.failed(error)

    def tensors(self, layer: Layer, matrix: Any) -> dict[str, torch.Tensor]:
        """The inverse of `matrix`."""
        return {role: to_torch(x, layer.parameters[role]) for role, x in layer.arrays(matrix).items()}

    @contextmanager
    def captured(self) -> Iterator[Capture]:
        """Calls inside are seen; compiled models run eagerly meanwhile, as a graph shows no calls."""
        seen = Capture(self.plan)
        with eagerly(self.model), seen:
            yield seen

    def state_dict(self) -> dict[str, Any]:
        """The state as CPU tensors by path, the same on any device, namespace and rank; every rank must call it."""
        with ordered(self.namespace, self.device):
            arrays = kf.flatten(self.core.gather(self.state))
        return {"kfaccore": 1, "state": {path: torch.from_numpy(np.array(x)) for path, x in arrays.items()}}

    def load_state_dict(self, found: dict[str, Any]) -> None:
        """Continue from `state_dict`. Raises ValueError, changing nothing, if layers, shapes or dtypes differ."""
        if found.get("kfaccore") != 1:
            raise ValueError(f"not a state of kfaccore: it has the keys {sorted(found)[:5]}")
        self.state = kf.unflatten({path: x.numpy() for path, x in found["state"].items()}, self.state)

    def save(self, path: Any, **meta: Any) -> None:
        """Parameters as matrices and the state in one file that every adapter reads; every rank must call it."""
        layers = self.plan.layers
        with ordered(self.namespace, self.device):
            params = {name: self.matrix(layer, layer.parameters) for name, layer in layers.items()}
            kf.save(path, {"params": params, "state": self.core.gather(self.state)}, **meta)

    def load(self, path: Any) -> None:
        """Continue from a file of any adapter; ValueError, changing nothing, if it is of other layers or sizes."""
        layers = self.plan.layers
        params = {name: self.matrix(layer, layer.parameters) for name, layer in layers.items()}
        found = kf.load(path, like={"params": params, "state": self.state})
        with torch.no_grad():
            for name, layer in layers.items():
                for role, x in self.tensors(layer, found["params"][name]).items():
                    layer.parameters[role].copy_(x)
        self.state = found["state"]


def _owned(x: Any) -> Any:
    """`like` of a state, whose NumPy view must be writable."""
    return np.array(x) if isinstance(x, np.ndarray) else x


def _checked(heads: list[torch.Tensor]) -> list[torch.Tensor]:
    """ValueError for predictions without a batch axis or without a graph."""
    for f in heads:
        if f.ndim < 2 or not f.requires_grad:
            raise ValueError(
                f"the prediction has shape {tuple(f.shape)}, requires_grad={f.requires_grad}; need (batch, ...) with a "
                f"graph behind it"
            )
    return heads


def _pulled(heads: list[torch.Tensor], observed: Observed, v: tuple) -> tuple:
    """One draw at the outputs of all calls."""
    edges = [call.edge for _, call in observed.calls]
    given = [x.to(f) for x, f in zip(v, heads, strict=True)]
    return torch.autograd.grad(heads, edges, given, retain_graph=True, allow_unused=True)


def _stacked(column: tuple, call: Any, dtype: torch.dtype) -> torch.Tensor | None:
    """Draws of one call, (draws, *shape); None where it does not reach the prediction."""
    if not column:
        return torch.zeros((0, *call.shape), dtype=dtype, device=call.x.device)
    if column[0] is None:
        return None
    return column[0][None] if len(column) == 1 else torch.stack(column)


def _signed(draws: list[torch.Tensor], observed: Observed, rng: Any) -> list[torch.Tensor]:
    """Each example of each draw with a random sign of its own: products of two examples vanish in expectation."""
    signs = torch.from_numpy(rng.choice([-1.0, 1.0], (len(draws[0]), observed.split.examples)))
    found = []
    for v in draws:
        own = signs[:, observed.split.owner(v.shape[1])].to(v)
        found.append(v * own.reshape(*own.shape, *(1,) * (v.ndim - 2)))
    return found


def _nonzero(grad: Any) -> bool:
    return bool((getattr(grad, "g", grad) != 0).any())


def _carried(old: Any, new: Any, names: set[str]) -> Any:
    """A new state with what `old` has of the layers `names`, and its step."""
    layers = {name: old.layers[name] if name in names and name in old.layers else x for name, x in new.layers.items()}
    motion = _motion(old.motion, new.motion, names)
    same = [name for name, _ in old.blocks] == [name for name, _ in new.blocks] and names >= {n for n, _ in new.blocks}
    return replace(new, step=old.step, layers=layers, motion=motion, network=old.network if same else new.network)


def _motion(old: Any, new: Any, names: set[str]) -> Any:
    """A rule's buffers: numbers are kept, and what it has of the layers `names`."""
    if isinstance(new, dict):
        return {name: old[name] if name in names and name in old else x for name, x in new.items()}
    if not is_dataclass(new) or isinstance(new, type):
        return old
    fresh = {f.name: _motion(getattr(old, f.name), getattr(new, f.name), names) for f in fields(new)}
    return replace(new, **fresh)
