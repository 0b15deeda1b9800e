"""Runs of 5,000 steps, where noise is nearly all that is left: the default step against AdamW with warm-up and cosine.

Digits with dropout and BatchNorm, and without, and a regression (Friedman's first function with noise), batches of 64;
the loss and what held-out data say after 500 and after 5,000 steps. Nothing of ours is set; AdamW has the better of two
rates by its last held-out loss. Figures are reported, none is claimed: this is where a self-tuning step has least to
win.
"""

import os

for _name in ("OMP", "OPENBLAS", "MKL"):
    os.environ[f"{_name}_NUM_THREADS"] = "1"

from collections.abc import Callable
from dataclasses import dataclass

import torch
from report import Claim, arguments, claim, finish
from sklearn.datasets import load_digits, make_friedman1
from torch import nn
from torch_rivals import rival

import kfaccore_torch as kt

SEEDS = (0, 1, 2)
LOOKS = (500, 5000)
RATES = (1e-3, 3e-3)


@dataclass(frozen=True)
class Case:
    """model() -> network; loss; (x, y) to train on and held out."""

    model: Callable[[], nn.Module]
    loss: nn.Module
    train: tuple[torch.Tensor, torch.Tensor]
    held: tuple[torch.Tensor, torch.Tensor]


def classifier(regular: bool) -> nn.Module:
    middle = [
        x
        for i, o in ((64, 128), (128, 128))
        for x in (nn.Linear(i, o), *((nn.BatchNorm1d(o),) if regular else ()), nn.ReLU(), nn.Dropout(0.2 * regular))
    ]
    return nn.Sequential(*middle, nn.Linear(128, 10))


def regressor() -> nn.Module:
    layers = (nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1), nn.Flatten(0))
    return nn.Sequential(*layers)


def cases() -> dict[str, Case]:
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32) / 16
    y = torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    digits = [(x[part], y[part]) for part in (order[:1437], order[1437:])]
    inputs, outputs = make_friedman1(3000, noise=1.0, random_state=0)
    u = torch.tensor(inputs, dtype=torch.float32)
    v = torch.tensor((outputs - outputs.mean()) / outputs.std(), dtype=torch.float32)
    smooth = [(u[part], v[part]) for part in (slice(0, 2000), slice(2000, None))]
    hard = nn.CrossEntropyLoss()
    return {
        "digits": Case(lambda: classifier(False), hard, *digits),
        "digits, dropout and BatchNorm": Case(lambda: classifier(True), hard, *digits),
        "regression": Case(regressor, nn.MSELoss(), *smooth),
    }


def losses(case: Case, seed: int, make: Callable[[nn.Module], Callable], steps: int) -> list[tuple[float, float]]:
    """(training loss, held-out loss) in eval mode at each look."""
    torch.manual_seed(seed)
    model = case.model()
    rng = torch.Generator().manual_seed(100 + seed)
    step = make(model)
    x, y = case.train
    found = []
    for index in range(steps):
        rows = torch.randint(len(x), (64,), generator=rng)
        step(x[rows], y[rows])
        if index + 1 in LOOKS:
            model.eval()
            with torch.no_grad():
                found.append((float(case.loss(model(x), y)), float(case.loss(model(case.held[0]), case.held[1]))))
            model.train()
    return found


def main() -> None:
    given = arguments(__doc__)
    steps = 500 if given.quick else LOOKS[-1]
    seeds = SEEDS[:1] if given.quick else SEEDS
    rows: list = []
    claims: list[Claim] = []
    for name, case in cases().items():
        mine = [losses(case, s, lambda m, c=case: kt.Optimizer(m, c.loss).step, steps) for s in seeds]
        rates = {
            rate: [losses(case, s, lambda m, r=rate, c=case: rival("adamw", r, m, c.loss, steps), steps) for s in seeds]
            for rate in RATES
        }
        rate = min(rates, key=lambda r: sum(found[-1][1] for found in rates[r]))
        for label, runs in (("kfac", mine), (f"adamw {rate:g}", rates[rate])):
            for at, look in enumerate(LOOKS[: len(runs[0])]):
                told = [", ".join(f"{run[at][part]:.3g}" for run in runs) for part in (0, 1)]
                rows.append([name, label, look, *told])
        for part, what in enumerate(("training", "held-out")):
            ratio = sum(run[-1][part] for run in mine) / sum(run[-1][part] for run in rates[rate])
            claims.append(claim(f"{name}: {what} loss over AdamW's after {steps} steps", ratio, "reported", None))
    finish("Long runs", ("task", "optimiser", "steps", "training loss", "held-out loss"), rows, claims, given.json)


if __name__ == "__main__":
    main()
