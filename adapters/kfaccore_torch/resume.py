"""Resuming: the state as tensors by path, and parameters and state in one file of any adapter."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import kfaccore as kf
from kfaccore_torch.bridge import ordered
from kfaccore_torch.plan import unwrapped


def of_model(model: torch.nn.Module, plan: Any) -> dict[str, Any]:
    """The model's name, how many numbers of it are trained, and which have no factors, with the reasons."""
    trained = {id(p): p.numel() for p in plan.trained}
    left = {name: [plan.rest[name].numel(), reason] for name, reason in plan.uncovered.items()}
    return {"model": type(unwrapped(model)).__name__, "parameters": sum(trained.values()), "uncovered": left}


class Resumes:
    """What an engine with plan, core and state can be saved to and loaded from."""

    model: torch.nn.Module
    core: kf.Preconditioner
    plan: Any
    state: Any
    namespace: str
    device: torch.device
    matrix: Any
    tensors: Any

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
            state = self.core.gather(self.state)
            kf.save(path, {"params": params, "state": state}, **{**self.described(), **meta})

    def described(self) -> dict[str, Any]:
        """What the file says of the model and of the run."""
        told = kf.describe(self.core, self.state)
        return {**told, **of_model(self.model, self.plan)}

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
