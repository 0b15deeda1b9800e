"""Resuming: the state as tensors by path, and parameters and state in one file of any adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

import kfaccore as kf
from kfaccore_torch.bridge import ordered
from kfaccore_torch.plan import Plan, unwrapped
from kfaccore_torch.table import Table, read, written


def of_model(model: torch.nn.Module, plan: Plan) -> dict[str, Any]:
    """The model's name, how many numbers of it are trained, and which have no factors, with the reasons."""
    trained = {id(p): p.numel() for p in plan.trained}
    left = {name: [plan.rest[name].numel(), reason] for name, reason in plan.uncovered.items()}
    return {"model": type(unwrapped(model)).__name__, "parameters": sum(trained.values()), "uncovered": left}


class Resumes:
    """What an engine with plan, core and state can be saved to and loaded from."""

    model: torch.nn.Module
    core: kf.Preconditioner
    plan: Plan
    state: Any
    observer: Any
    mixing: set[str]
    new: bool
    namespace: str
    device: torch.device
    matrix: Any
    tensors: Any
    adopt: Any

    def state_dict(self) -> dict[str, Any]:
        """The state as CPU tensors by path, the same on any device, namespace and rank; every rank must call it."""
        with ordered(self.namespace, self.device):
            arrays = kf.flatten(self.core.gather(self.state))
        return {
            "kfaccore": 1,
            "layers": written(self.plan),
            "state": {path: torch.from_numpy(np.array(x)) for path, x in arrays.items()},
        }

    def load_state_dict(self, found: dict[str, Any]) -> None:
        """Continue from `state_dict`. Raises ValueError, changing nothing, if layers, shapes or dtypes differ, or if it
        is damaged."""
        version = found.get("kfaccore") if isinstance(found, Mapping) else None
        if type(version) is not int or version != 1:
            shown = sorted(map(str, found))[:5] if isinstance(found, Mapping) else type(found).__name__
            raise ValueError(f"not a state of kfaccore, which is what state_dict returned: it has the keys {shown}")
        with self._as_saved(found.get("layers")):
            arrays = {path: x.numpy() for path, x in found["state"].items()}
            self.state = kf.unflatten(arrays, self.state)

    def save(self, path: Any, **meta: Any) -> None:
        """Parameters as matrices and the state in one file that every adapter reads; every rank must call it."""
        layers = self.plan.layers
        with ordered(self.namespace, self.device):
            params = {name: self.matrix(layer, layer.parameters) for name, layer in layers.items()}
            tree = {"params": params, "state": self.core.gather(self.state)}
            kf.save(path, tree, **{"torch_layers": written(self.plan), **self.described(), **meta})

    def described(self) -> dict[str, Any]:
        """What the file says of the model and of the run."""
        told = kf.describe(self.core, self.state)
        return {**told, **of_model(self.model, self.plan)}

    def load(self, path: Any) -> None:
        """Continue from a file of any adapter; ValueError, changing nothing, if it is of other layers or sizes."""
        with self._as_saved(kf.metadata(path).get("torch_layers")):
            layers = self.plan.layers
            params = {name: self.matrix(layer, layer.parameters) for name, layer in layers.items()}
            found = kf.load(path, like={"params": params, "state": self.state})
        with torch.no_grad():
            for name, layer in layers.items():
                for role, x in self.tensors(layer, found["params"][name]).items():
                    layer.write(role, layer.parameters[role], x)
        self.state = found["state"]

    @contextmanager
    def _as_saved(self, table: Table | None) -> Iterator[None]:
        """The plan that a state was saved with; what was before if loading fails inside."""
        new = self.new
        with self.unless_damaged():
            if table is not None:
                found = read(table, self.plan)
                if (found.marks, found.odd) != (self.plan.marks, self.plan.odd):
                    self.adopt(found)
            yield
        self.new = new

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
