"""Ranks that train models of their own, though their curvature is summed as that of one: nothing but their numbers
tells. Few of these are compared, at the first, second, fourth, eighth and so on step that uses records."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from kfaccore_torch.step import Engine

_MOST = 1 << 12  # numbers of a tensor that are looked at
_SAME = {"parameters": 1e-4, "gradients": 1e-2}  # of their norm, by which other machines may round otherwise


def check_together(model: nn.Module) -> None:
    """ValueError where ranks may leave off before others: those that do answer what DistributedDataParallel sends, by
    its `join`, and nothing of what is sent here."""
    while isinstance(model, nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
        config = getattr(model, "_join_config", None)
        if config is not None and config.enable and not config.throw_on_early_termination:
            raise ValueError(
                "the model is under the `join` of DistributedDataParallel, in which ranks that have no more data do "
                "not take part in step(): pass join(throw_on_early_termination=True), which ends all ranks with the "
                "first, or give all ranks as many batches (drop_last=True of a DistributedSampler and DataLoader)"
            )
        wrapped = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model._orig_mod
        assert isinstance(wrapped, nn.Module)
        model = wrapped


@dataclass(eq=False)
class Separate:
    """How many steps used records, and whether a warning was given."""

    turn: int = 0
    said: bool = False

    def check(self, engine: Engine) -> None:
        """A warning, once and on all ranks, where covered parameters are not the same on all of them; or gradients,
        where a direction is sent from the rank that solves for it. Every rank must ask, at each step with records."""
        comm = engine.core.comm
        self.turn += 1
        if self.said or self.turn & (self.turn - 1):
            return
        layers = engine.plan.layers.values()
        found = {path: layer.parameters[role] for layer in layers for role, path in layer.paths.items()}
        paths = sorted(found)
        fraction = getattr(comm, "fraction", 1.0)
        looks = {"parameters": [_looked(found[path].detach()) for path in paths]}
        if fraction < 1:
            looks["gradients"] = [_looked(found[path].grad) for path in paths]
        numbers = torch.stack([x for look in looks.values() for x in look]).cpu().numpy()
        sums = np.asarray(comm.all_reduce([np.concatenate([numbers, numbers[:, :1] ** 2], 1)])[0])
        for what, told in zip(looks, np.split(sums, len(looks)), strict=True):
            odd = [path for path, numbers in zip(paths, told, strict=True) if _differ(numbers, comm.world, _SAME[what])]
            if odd:
                self._tell(what, odd, fraction)
                return

    def _tell(self, what: str, paths: list[str], fraction: float) -> None:
        self.said = True
        if what == "parameters":
            why = "curvature is summed over ranks as that of one model"
            instead = (
                "put the model under DistributedDataParallel, or begin all ranks with the same parameters and average "
                "gradients before each step; comm=kfaccore.Serial() is for a model of its own on each rank"
            )
        else:
            why = f"directions are sent from the ranks that solve for a layer (fraction {fraction})"
            instead = "average gradients before step(), as DistributedDataParallel does in backward"
        warnings.warn(f"{what} {paths} are not the same on all ranks, though {why}: {instead}", stacklevel=6)


def _looked(x: torch.Tensor | None) -> torch.Tensor:
    """(a weighted sum of some numbers, the square of their norm, whether there are any), (3,)."""
    if x is None or x.is_sparse or x.is_complex() or not x.numel():
        return torch.zeros(3, dtype=torch.float64)
    every = -(-x.numel() // _MOST)
    some = x.detach().reshape(-1)[::every].double()
    weights = torch.arange(len(some), dtype=some.dtype, device=some.device).cos()
    return torch.stack([some @ weights, some @ some, torch.ones_like(some[0])])


def _differ(sums: np.ndarray, world: int, tolerance: float) -> bool:
    """Whether weighted sums were others on some ranks, by the sums of them, norms, counts and squares over ranks."""
    total, norms, ranks, squares = sums.tolist()
    return ranks == world and squares / world - (total / world) ** 2 > tolerance**2 * norms / world
