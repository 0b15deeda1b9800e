"""Draws on 1, 1/2 and 1/4 of the batch, for people who keep their optimizer: steps and seconds to the targets with
`Preconditioner` and SGD (momentum 0.9), each share at its best of five rates, which is chosen on seed 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from report import Claim, claim
from torch import nn

import kfaccore as kf
import kfaccore_torch as kt

SHARES = (1.0, 0.5, 0.25)
RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
CLIP = 1.0  # of the directions' norm, so that the first steps of a large rate survive
Run = Callable[[Any, int, Callable[[nn.Module, nn.Module], Callable]], Any]  # steps, seconds, ...


def ours(share: float, rate: float, model: nn.Module, loss: nn.Module) -> Callable:
    """A step of the loop that users write."""
    core = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 5), kf.Schedules(damping=0.01), donate=True)
    pre = kt.Preconditioner(model, loss, core, draws_on=share)
    optimizer = torch.optim.SGD(model.parameters(), rate, 0.9)

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer.zero_grad()
        with pre.capture():
            f = model(x)
        pre.loss(f, y).backward()
        pre.step()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    return step


def draws_on(tasks: Mapping[str, Any], run: Run, seeds: Sequence[int], rows: list, claims: list[Claim]) -> None:
    """A row a task and share; whether a smaller share loses nowhere, which is what would make it the default."""
    worst = 0.0
    for name, task in tasks.items():
        whole = math.inf
        for share in SHARES:
            first = {rate: run(task, 0, lambda m, q, r=rate, s=share: ours(s, r, m, q)) for rate in RATES}
            rate = min(first, key=lambda r: (first[r].steps, first[r].seconds))
            rest = [run(task, seed, lambda m, q, r=rate, s=share: ours(s, r, m, q)) for seed in seeds[1:]]
            found = [first[rate], *rest]
            steps = median(trial.steps for trial in found)
            told = ", ".join(f"{trial.steps:g}" for trial in found)
            seconds = median(trial.seconds for trial in found)
            rows.append([name, f"kfac + sgd {rate:g}, draws on {share:g}", told, seconds])
            whole = steps if share == 1 else whole
            if share == 0.5:
                worst = max(worst, math.inf if math.isinf(steps) else steps / whole)
    text = "draws on half a batch: most steps over those of the whole (the default stays above 1)"
    claims.append(claim(text, worst, "reported", None))
