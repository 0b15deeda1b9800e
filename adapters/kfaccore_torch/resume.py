"""Resuming: the state as tensors by path, and parameters and state in one file of any adapter."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

import kfaccore as kf
from kfaccore_torch.bridge import ordered
from kfaccore_torch.columns import check_columns
from kfaccore_torch.distributed import Distributed
from kfaccore_torch.follow import carried, left_out
from kfaccore_torch.plan import Layer, Plan, unwrapped
from kfaccore_torch.table import Table, as_saved, read, with_held


def of_model(model: torch.nn.Module, plan: Plan) -> dict[str, Any]:
    """The model's name, how many numbers of it are trained, and which have no factors, with the reasons."""
    trained = {id(p): p.numel() for p in plan.trained}
    left = {name: [p.numel(), plan.uncovered[name]] for name, p in plan.rest.items()}  # what has no diagonal either
    return {"model": type(unwrapped(model)).__name__, "parameters": sum(trained.values()), "uncovered": left}


class Resumes:
    """What an engine with plan, core and state can be saved to and loaded from."""

    model: torch.nn.Module
    core: kf.Preconditioner
    plan: Plan
    away: dict[str, Layer]
    state: Any
    observer: Any
    mixing: set[str]
    new: bool
    namespace: str
    device: torch.device
    matrix: Any
    tensors: Any
    adopt: Any
    held: Any
    sized: Any
    filled: Any
    core_of: Any
    first_state: Any
    settle: Any

    def _together(self, what: str) -> AbstractContextManager[None]:
        """Around what every rank must call."""
        comm = self.core.comm
        return comm.during(what) if isinstance(comm, Distributed) else nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """The state as CPU tensors by path, the same on any device, namespace and rank; every rank must call it."""
        state = self.state  # which may settle where it is
        with ordered(self.namespace, self.device), self._together("state_dict()"):
            arrays = kf.flatten(self.core.gather(state))
        return {
            "kfaccore": 1,
            "layers": self._table(),
            "state": {path: torch.from_numpy(np.array(x)) for path, x in arrays.items()},
        }

    def load_state_dict(self, found: dict[str, Any]) -> None:
        """Continue from `state_dict`: what is frozen here waits with what the state has of it, what was frozen then
        begins anew. Raises ValueError, changing nothing, if layers, shapes or dtypes differ, or if it is damaged."""
        version = found.get("kfaccore") if isinstance(found, Mapping) else None
        if type(version) is not int or version != 1:
            shown = sorted(map(str, found))[:5] if isinstance(found, Mapping) else type(found).__name__
            raise ValueError(f"not a state of kfaccore, which is what state_dict returned: it has the keys {shown}")
        with self._as_saved(found.get("layers")) as whole:
            arrays = {path: x.numpy() for path, x in found["state"].items()}
            self._take(kf.unflatten(arrays, self._like(whole.layers)), whole)

    def save(self, path: Any, **meta: Any) -> None:
        """Parameters as matrices and the state in one file that every adapter reads; every rank must call it."""
        layers = {**self.away, **self.plan.layers}
        state = self.state
        with ordered(self.namespace, self.device), self._together("save()"):
            params = {name: self.matrix(layer, layer.parameters) for name, layer in layers.items()}
            tree = {"params": params, "state": self.core.gather(state)}
            kf.save(path, tree, **{"torch_layers": self._table(), **self.described(), **meta})

    def described(self) -> dict[str, Any]:
        """What the file says of the model and of the run."""
        told = kf.describe(self.core, self.state)
        return {**told, **of_model(self.model, self.plan)}

    def load(self, path: Any) -> None:
        """Continue from a file of any adapter; ValueError, changing nothing, if it is of other layers or sizes."""
        with self._as_saved(kf.metadata(path).get("torch_layers")) as whole:
            layers = whole.layers
            params = {name: self.matrix(layer, layer.parameters) for name, layer in layers.items()}
            found = kf.load(path, like={"params": params, "state": self._like(layers)})
            check_columns(path, layers, self.model)
            self._take(found["state"], whole)
        absent = sorted(self.plan.layers.keys() - layers.keys())
        if absent:
            warnings.warn(
                f"{path} has no parameters of layers {absent}, which were frozen when it was saved: they stay as they "
                f"are here; load them from the model's own state_dict",
                stacklevel=3,
            )
        with torch.no_grad():
            for name, layer in layers.items():
                for role, x in self.tensors(layer, found["params"][name]).items():
                    layer.write(role, layer.parameters[role], x)

    def _table(self) -> Table:
        return with_held(self.plan, [*self.away.values(), *self.plan.layers.values()])

    @contextmanager
    def _as_saved(self, table: Table | None) -> Iterator[Plan]:
        """The plan of the model as a state was saved, once the plan has seen what that had seen; what was before if
        loading fails inside."""
        new = self.new
        self.settle()
        with self.unless_damaged():
            whole = self.plan
            if table is not None:
                found = read(table, self.plan)
                if (found.marks, found.odd, found.shown) != (self.plan.marks, self.plan.odd, self.plan.shown):
                    self.adopt(found)
                whole = self.filled(as_saved(table, self.plan))
            self.new = new
            yield whole

    def _like(self, layers: Mapping[str, Layer]) -> Any:
        """A state of these layers."""
        blocks = self.sized(layers)
        if blocks == self.held():
            return self.state
        if self.core.network is not None:
            raise ValueError(
                f"{self.core.network} has one state of all its layers: the state was saved with {sorted(layers)}, and "
                f"{sorted(self.plan.layers)} are trained here; freeze and thaw as then, load, and change that after"
            )
        return self.first_state(self.core_of(layers), blocks)

    def _take(self, state: Any, whole: Plan) -> None:
        """Continue from a state of a plan's layers."""
        if self.sized(whole.layers) != self.held():
            self.away = left_out(whole.layers, self.plan)
            self.core = self.core_of({**self.away, **self.plan.layers})
            blocks = dict(state.blocks)
            fresh = {name for name, block in self.held().items() if blocks.get(name) != block}
            same = {name: name for name in self.held().keys() - fresh}
            state = carried(state, self.first_state(self.core, self.held()), same)
            self.new = self.new or bool(fresh & self.plan.layers.keys())
        self.state = state

    @contextmanager
    def unless_damaged(self) -> Iterator[None]:
        """The old plan and state, and all that goes with them, if loading fails inside; then ValueError."""
        names = ("plan", "away", "core", "_state", "observer", "new")
        before = {name: getattr(self, name) for name in names}
        try:
            yield
        except Exception as error:
            for name, value in before.items():
                setattr(self, name, value)
            if isinstance(error, ValueError | OSError):
                raise
            raise ValueError(f"the state is damaged: {type(error).__name__}: {error}") from error
