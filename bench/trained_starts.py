"""Fine-tuning: where a network that was trained goes in 60 steps of 64 rows, by the default step and by AdamW."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from report import Claim, at_most
from sklearn.datasets import load_digits
from torch import nn

import kfaccore_torch as kt

TRAINED = {
    "loss over AdamW's, worst seed": 1.05,
    "largest batch loss over its": 1.2,
    "promises beyond the loss": 0,
}


@dataclass(frozen=True)
class End:
    """Of 60 steps from a trained start: loss on all examples, largest batch loss, promises beyond the loss."""

    loss: float
    largest: float
    beyond: int = 0


def trained_start(make: Callable[[], nn.Module], seed: int, changed: bool) -> tuple[End, End]:
    """(ours, AdamW at the better of two rates) from a network trained to .05, on its own labels or with 5 % changed."""
    found = load_digits(return_X_y=True)
    x, y = torch.tensor(found[0], dtype=torch.float32) / 16, torch.tensor(found[1])
    loss = nn.CrossEntropyLoss()
    torch.manual_seed(seed)
    net, rng = make(), torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam(net.parameters(), 3e-3)

    def whole(model: nn.Module, labels: torch.Tensor) -> float:
        with torch.no_grad():
            return float(loss(model(x), labels))

    while whole(net, y) > 0.05:
        rows = torch.randint(len(x), (64,), generator=rng)
        adam.zero_grad()
        loss(net(x[rows]), y[rows]).backward()
        adam.step()
    flip = torch.rand(len(y), generator=rng) < (0.05 if changed else 0.0)
    labels = y.clone()
    labels[flip] = torch.randint(10, (int(flip.sum()),), generator=rng)

    def going_on(step: Callable[[nn.Module], Callable]) -> End:
        model, draw = copy.deepcopy(net), torch.Generator().manual_seed(100 + seed)
        one, values, beyond = step(model), [], 0
        for _ in range(60):
            rows = torch.randint(len(x), (64,), generator=draw)
            value, promise = one(x[rows], labels[rows])
            values.append(value)
            beyond += promise > value
        return End(whole(model, labels), max(values), beyond)

    def default(model: nn.Module) -> Callable:
        optimizer = kt.Optimizer(model, loss)

        def step(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
            value = float(optimizer.step(a, b))
            return value, -float(optimizer.info.step["predicted"])

        return step

    def adamw(rate: float) -> Callable:
        def made(model: nn.Module) -> Callable:
            optimizer = torch.optim.AdamW(model.parameters(), rate)

            def step(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
                optimizer.zero_grad()
                value = loss(model(a), b)
                value.backward()
                optimizer.step()
                return float(value.detach()), 0.0

            return step

        return made

    return going_on(default), min((going_on(adamw(rate)) for rate in (3e-4, 3e-3)), key=lambda end: end.loss)


def mlp() -> nn.Module:
    layers = (nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    return nn.Sequential(*layers)


def trained_starts(
    nets: dict[str, Callable[[], nn.Module]], seeds: Sequence[int], claims: list[Claim], quick: bool
) -> list[list]:
    """Of several networks, on their own labels and on changed ones: rows of a table, (task, optimiser, ends, top)."""
    rows: list[list] = []
    for name, make in nets.items():
        for what, changed in (("same labels", False), ("5 % changed", True)):
            label = f"{name} from a trained start, {what}"
            if quick and name != "mlp":
                claims += [at_most(f"{label}: {figure}", None, limit) for figure, limit in TRAINED.items()]
                continue
            pairs = [trained_start(make, seed, changed) for seed in seeds]
            for who, ends in (("kfac", [p[0] for p in pairs]), ("adamw, better of two", [p[1] for p in pairs])):
                rows.append([label, who, ", ".join(f"{end.loss:.3g}" for end in ends), max(e.largest for e in ends)])
            figures = (
                max(ours.loss / theirs.loss for ours, theirs in pairs),
                max(ours.largest / theirs.largest for ours, theirs in pairs),
                sum(ours.beyond for ours, _ in pairs),
            )
            for (figure, limit), value in zip(TRAINED.items(), figures, strict=True):
                claims.append(at_most(f"{label}: {figure}", value, limit))
    return rows
