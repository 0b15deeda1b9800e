"""What both shells share: the plan, the core preconditioner and its state, draws of labels, and resuming."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

import kfaccore as kf
from kfaccore_torch.bridge import HALF, chosen, ordered, to_core, to_torch
from kfaccore_torch.capture import Call, Capture
from kfaccore_torch.distributed import Distributed
from kfaccore_torch.losses import FISHERS, objective
from kfaccore_torch.report import Coverage, coverage
from kfaccore_torch.rows import examples, record
from kfaccore_torch.table import Layer, Plan, plan, unwrapped


@dataclass(frozen=True)
class Settings:
    """How labels are drawn and where the core runs.

    fisher      kfaccore's monte_carlo (default), type2 or empirical; each costs one backward a draw, without weight
                gradients, on steps that update statistics
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
    """A prediction, its target, which positions exist, and the examples' places in the dataset."""

    f: torch.Tensor
    target: Any
    mask: torch.Tensor | None = None
    ids: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.f.ndim < 2 or not self.f.requires_grad:
            raise ValueError(
                f"the prediction has shape {tuple(self.f.shape)}, requires_grad={self.f.requires_grad}; need "
                f"(batch, ...) with a graph behind it"
            )


class Engine:
    """Plan, core and state of one model."""

    def __init__(self, model: nn.Module, loss: Any, core: kf.Preconditioner, settings: Settings) -> None:
        self.model, self.core, self.settings = model, core, settings
        self.plan: Plan = plan(model, settings.skip)
        self.objective = objective(loss)
        if kf.own_gradients(core) and settings.fisher is not kf.empirical:
            method = core.network or core.methods
            raise ValueError(f"{method} takes the loss's own gradients: pass fisher=kfaccore.empirical")
        if settings.strict and self.plan.uncovered:
            reasons = "\n".join(f"  {name}: {reason}" for name, reason in self.plan.uncovered.items())
            raise ValueError(f"strict: {len(self.plan.uncovered)} parameters are not covered\n{reasons}")
        if not self.plan.layers:
            raise ValueError(f"no parameter of {type(unwrapped(model)).__name__} is covered; see kfaccore_torch.plan")
        first = next(iter(next(iter(self.plan.layers.values())).parameters.values()))
        self.device = first.device
        self.namespace = chosen(settings.namespace, self.device)
        like = torch.zeros(1, dtype=torch.float32 if first.dtype in HALF else first.dtype, device=self.device)
        with ordered(self.namespace, self.device):
            self.state = core.init(self.blocks(), like=_owned(to_core(like, self.namespace)))
        self.info: kf.Info | None = None

    def blocks(self) -> dict[str, kf.Block]:
        """Sizes of the layers, with the capacities of the settings."""
        capacity = {"samples": self.settings.samples, "rows": self.settings.rows}
        return {name: replace(layer.kind.block(), **capacity) for name, layer in self.plan.layers.items()}

    def report(self) -> Coverage:
        """Parameter by parameter: rule, factor sizes, bytes, and how the block is approximated."""
        return coverage(self.plan, self.blocks(), self.core)

    @property
    def due(self) -> bool:
        """Whether the next step uses records."""
        return self.core.wants_records(self.state)

    def records(self, calls: dict[str, list[Call]], batch: Batch, turn: int) -> dict[str, kf.Record]:
        """One record a layer that was called, from draws backpropagated to the edges; `.grad` is never touched."""
        rank = [self.core.comm.rank] if self.core.comm.rank else []
        rng = np.random.default_rng([self.settings.seed, self.state.step, turn, *rank])
        draws = self.objective.draws(self.settings.fisher, self.settings.draws, batch.f, batch.target, rng)
        flat = [(name, call) for name, found in calls.items() for call in found]
        edges = [call.edge for _, call in flat]
        rows = [torch.autograd.grad(batch.f, edges, v.to(batch.f), retain_graph=True, allow_unused=True) for v in draws]
        n = self.objective.share(batch.f, batch.target)
        found: dict[str, tuple[list[Call], list[torch.Tensor]]] = {}
        for (name, call), column in zip(flat, zip(*rows, strict=True), strict=True):
            if column[0] is None:  # the call does not reach the prediction
                continue
            kept = found.setdefault(name, ([], []))
            kept[0].append(call)
            kept[1].append(column[0][None] if len(column) == 1 else torch.stack(column))
        layers, size = self.plan.layers, examples(batch.f, calls)
        with ordered(self.namespace, self.device):
            return {
                name: record(layers[name], seen, gs, size, n, self.namespace, batch.mask, batch.ids)
                for name, (seen, gs) in found.items()
            }

    def matrix(self, layer: Layer, tensors: dict[str, torch.Tensor]) -> Any:
        """Tensors like a layer's parameters, by role -> its matrix in the core's namespace."""
        return layer.matrix({role: to_core(x, self.namespace) for role, x in tensors.items()})

    def step(self, records: dict[str, list[kf.Record]] | None, grads: dict[str, Any]) -> dict[str, Any]:
        """The core's step; state and info move on."""
        try:
            updates, self.state, self.info = self.core.step(self.state, records, grads)
        except Exception as error:
            self.leave_word(error)
            raise
        return updates

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
        with torch.compiler.set_stance("force_eager"), seen:
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
