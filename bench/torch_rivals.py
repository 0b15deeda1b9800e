"""Optimizers to compare with, each at the best of five rates: AdamW with warm-up and cosine, Muon, SOAP."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable

import torch
from torch import nn

RATES = {
    "adamw": (1e-3, 2e-3, 5e-3, 1e-2, 2e-2),
    "muon": (3e-3, 1e-2, 2e-2, 3e-2, 1e-1),
    "soap": (1e-3, 3e-3, 5e-3, 1e-2, 3e-2),
}


def present() -> list[str]:
    """The kinds that can run: SOAP is that of the package pytorch_optimizer, in the extra `rivals`."""
    package = importlib.util.find_spec("pytorch_optimizer") is not None
    return [kind for kind in RATES if kind != "soap" or package]


def rival(kind: str, rate: float, model: nn.Module, loss: nn.Module, steps: int) -> Callable:
    """step(x, y); AdamW's rate rises over a twentieth of the `steps` and falls to 0 with a cosine at their end. Muon
    trains inner matrices and leaves the rest to Adam at a third of its rate."""
    optimizers = _optimizers(kind, rate, model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, _cosine(steps)) for o in optimizers] if kind == "adamw" else []

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        model.zero_grad()
        loss(model(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()
        for schedule in schedules:
            schedule.step()

    return step


def _cosine(steps: int) -> Callable[[int], float]:
    """The share of the rate at a step."""
    warm = max(1, steps // 20)

    def share(at: int) -> float:
        if at < warm:
            return (at + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (at - warm) / max(1, steps - warm))))

    return share


def _optimizers(kind: str, rate: float, model: nn.Module) -> list[torch.optim.Optimizer]:
    parameters = list(model.parameters())
    if kind == "adamw":
        return [torch.optim.AdamW(parameters, rate)]
    if kind == "muon":
        names = dict(model.named_parameters())
        inner = [p for name, p in names.items() if p.ndim == 2 and "token" not in name and "position" not in name]
        others = [p for p in parameters if all(p is not q for q in inner)]
        return [torch.optim.Muon(inner, lr=rate), torch.optim.Adam(others, lr=rate / 3)]
    import pytorch_optimizer

    return [pytorch_optimizer.SOAP(parameters, lr=rate)]
