"""Steps and seconds to a target in torch: K-FAC untuned, against rivals at the best of their constant rates.

Digits autoencoder at four batch sizes to 0.23; digits CNN (256) to 98 % test accuracy; character transformer (64 rows
of 64) to 2.2 nats on held-out text, and with 16 rows to 2.4; ViT on digits (2 x 2 patches, 256) to 97 %, expand and
reduce; and trained starts: digits networks trained to a loss of .05 go on for 60 steps, with the same labels and with
5 % of them changed. Ours is the library's default in every task: one object, no number set. A rival's rate is chosen
on seed 0, then the others; Muon trains matrices and leaves the rest to Adam at a third of its rate. SOAP and Shampoo
are those of the pytorch_optimizer package, if present.
"""

import os

for _name in ("OMP", "OPENBLAS", "MKL"):
    os.environ[f"{_name}_NUM_THREADS"] = "1"

import importlib.util
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from draws_on import draws_on
from report import Claim, at_most, claim, finish, parser
from sklearn.datasets import load_digits
from torch import nn
from trained_starts import mlp, trained_starts

import kfaccore as kf
import kfaccore_torch as kt
from kfaccore_torch.examples.char_transformer import Transformer, text

SEEDS = (0, 1, 2, 3, 4, 5)
FEW = (0, 1, 2)  # seeds of --quick, of rivals and of trained starts
LIMITS = {
    "transformer, 16 rows": 50,
    "transformer": 50,
    "autoencoder, 64": 300,
    "autoencoder, 128": 190,
    "autoencoder": 105,
    "autoencoder, full": 70,
    "cnn": 20,
    "vit": 50,
}
QUICK = ("autoencoder", "autoencoder, full", "cnn")
RATES = {
    "adam": (1e-3, 3e-3, 1e-2),
    "adamw": (1e-3, 3e-3, 1e-2),
    "muon": (0.01, 0.03),
    "soap": (3e-3, 1e-2),
    "shampoo": (1e-2, 1e-1),
}


@dataclass(frozen=True)
class Task:
    """model() -> network; batch(generator) -> (x, y); reached(model) -> whether the target is met."""

    model: Callable[[], nn.Module]
    loss: nn.Module
    batch: Callable[[torch.Generator], tuple]
    reached: Callable[[nn.Module], bool]
    steps: int
    every: int = 5


class ViT(nn.Module):
    """8 x 8 digits as 16 patches of 2 x 2."""

    def __init__(self, d: int = 48) -> None:
        super().__init__()
        self.patches, self.places = nn.Linear(4, d), nn.Embedding(16, d)
        block = nn.TransformerEncoderLayer(d, 4, 2 * d, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.reshape(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        return self.head(self.norm(self.blocks(self.patches(x) + self.places(torch.arange(16)))).mean(1))


def autoencoder() -> nn.Module:
    layers = [x for i, o in pairwise((64, 128, 64, 32, 10, 32, 64, 128, 64)) for x in (nn.Linear(i, o), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Module:
    convs = (nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU())
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *convs, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10))


def tasks() -> dict[str, Task]:
    found = load_digits(return_X_y=True)
    x, y = torch.tensor(found[0], dtype=torch.float32) / 16, torch.tensor(found[1])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    data, characters = text()
    held, data = data[-8192:].reshape(128, 64), data[:-8192]

    def images(rows: torch.Tensor, size: int, target: torch.Tensor) -> Callable:
        def batch(rng: torch.Generator) -> tuple:
            chosen = rows[torch.randint(len(rows), (size,), generator=rng)]
            return x[chosen], target[chosen]

        return batch

    def characters_batch(size: int) -> Callable:
        def batch(rng: torch.Generator) -> tuple:
            rows = data[torch.randint(len(data) - 65, (size, 1), generator=rng) + torch.arange(65)]
            return rows[:, :-1], rows[:, 1:]

        return batch

    def accuracy(share: float) -> Callable:
        return lambda model: float((model(x[test]).argmax(1) == y[test]).float().mean()) >= share

    def halved(model: nn.Module) -> bool:
        return float(((model(x) - x) ** 2).sum() / len(x) / 2) <= 0.23

    def nats(most: float) -> Callable:
        return lambda model: float(nn.functional.cross_entropy(model(held[:, :-1]), held[:, 1:])) <= most

    hard = nn.CrossEntropyLoss()
    every = torch.arange(len(x))
    return {
        "autoencoder": Task(autoencoder, nn.MSELoss(), images(every, 512, x), halved, 2500),
        "autoencoder, 64": Task(autoencoder, nn.MSELoss(), images(every, 64, x), halved, 800),
        "autoencoder, 128": Task(autoencoder, nn.MSELoss(), images(every, 128, x), halved, 600),
        "autoencoder, full": Task(autoencoder, nn.MSELoss(), lambda rng: (x, x), halved, 200),
        "cnn": Task(cnn, hard, images(train, 256, y), accuracy(0.98), 300),
        "transformer": Task(lambda: Transformer(characters), hard, characters_batch(64), nats(2.2), 200),
        "transformer, 16 rows": Task(lambda: Transformer(characters), hard, characters_batch(16), nats(2.4), 300),
        "vit": Task(ViT, hard, images(train, 256, y), accuracy(0.97), 600),
    }


def ours(model: nn.Module, loss: nn.Module, sharing: Any = kf.expand) -> Callable:
    """`sharing` reduce leaves out embeddings, which have none, and attention's packed projection; see kf.reduce."""
    blocks = {name: layer.kind.block() for name, layer in kt.plan(model).layers.items()}
    kept = {name for name, block in blocks.items() if block.diagonal_in or name.endswith("self_attn")}
    methods = {name: kf.KFAC(kf.expand if name in kept else sharing) for name in blocks}
    core = kf.Preconditioner(methods, step=kf.SelfTuning(), donate=True)
    optimizer = kt.Optimizer(model, loss, core)
    return optimizer.step


def rival(kind: str, rate: float, model: nn.Module, loss: nn.Module) -> Callable:
    parameters = list(model.parameters())
    if kind == "muon":
        inner = [p for n, p in model.named_parameters() if p.ndim == 2 and "token" not in n and "position" not in n]
        others = [p for p in parameters if all(p is not q for q in inner)]
        optimizers = [torch.optim.Muon(inner, lr=rate), torch.optim.Adam(others, lr=rate / 3)]
    elif kind in ("soap", "shampoo"):
        import pytorch_optimizer

        make = {"soap": pytorch_optimizer.SOAP, "shampoo": pytorch_optimizer.Shampoo}[kind]
        optimizers = [make(parameters, lr=rate)]
    else:
        optimizers = [{"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind](parameters, lr=rate)]

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        model.zero_grad()
        loss(model(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()

    return step


def run(task: Task, seed: int, make: Callable[[nn.Module, nn.Module], Callable]) -> tuple[float, float]:
    """(steps, CPU seconds of training) to the target; infinite steps if it was not reached."""
    torch.manual_seed(seed)
    model, rng = task.model(), torch.Generator().manual_seed(100 + seed)
    step, seconds = make(model, task.loss), 0.0
    for index in range(task.steps):
        x, y = task.batch(rng)
        begun = time.process_time()
        step(x, y)
        seconds += time.process_time() - begun
        if (index + 1) % task.every == 0:
            with torch.no_grad():
                if task.reached(model):
                    return index + 1, seconds
    return math.inf, seconds


def best(task: Task, kind: str) -> tuple[float, list[tuple[float, float]]]:
    """The best rate on seed 0, and three seeds at it."""
    first = {rate: run(task, 0, lambda m, q, r=rate: rival(kind, r, m, q)) for rate in RATES[kind]}
    rate = min(first, key=lambda r: first[r])
    return rate, [first[rate], *(run(task, s, lambda m, q: rival(kind, rate, m, q)) for s in FEW[1:])]


def middle(found: list[tuple[float, float]]) -> float:
    return median(steps for steps, _ in found)


def row(name: str, label: str, found: list[tuple[float, float]]) -> list:
    return [name, label, ", ".join(f"{steps:g}" for steps, _ in found), median(seconds for _, seconds in found)]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--draws-on", action="store_true", help="instead: draws on parts of the batch, see draws_on")
    given = options.parse_args()
    rows: list = []
    claims: list[Claim] = []
    columns = ("task", "optimiser", "steps, or ends, of the seeds", "median CPU seconds, or largest batch loss")
    if given.draws_on:
        chosen = {name: task for name, task in tasks().items() if not given.quick or name == "cnn"}
        draws_on(chosen, run, FEW, rows, claims)
        finish("Steps to the target by the share that is drawn on", columns, rows, claims, given.json)
        return
    package = importlib.util.find_spec("pytorch_optimizer") is not None
    kinds = ("adam", "muon", *(("soap", "shampoo") if package else ()))
    for name, task in tasks().items():
        limit = f"{name}: median steps"
        share = f"{name}: median steps over the best rival's"
        if given.quick and name not in QUICK:
            claims += [at_most(limit, None, LIMITS[name]), at_most(share, None, 1)]
            continue
        seeds = FEW if given.quick else SEEDS
        mine = [run(task, seed, ours) for seed in seeds]
        rows.append(row(name, "kfac", mine))
        claims.append(at_most(limit, middle(mine), LIMITS[name]))
        claims.append(at_most(f"{name}: seeds that fail", sum(math.isinf(steps) for steps, _ in mine), 0))
        if name == "vit":
            vit(task, mine, rows, claims)
            continue
        if given.quick:
            claims.append(at_most(share, None, 1))
            continue
        found = {kind: best(task, kind) for kind in kinds}
        rows += [row(name, f"{kind} {rate:g}", trials) for kind, (rate, trials) in found.items()]
        fewest = min(middle(trials) for _, trials in found.values())
        claims.append(at_most(share, middle(mine) / fewest, 1))
    trained_starts({"mlp": mlp, "cnn": cnn, "vit": ViT}, FEW, rows, claims, given.quick)
    finish("Steps to the target", columns, rows, claims, given.json)


def vit(task: Task, mine: list[tuple[float, float]], rows: list, claims: list[Claim]) -> None:
    """Against AdamW, whose steps the published figures are shares of; with reduce too."""
    reduced = [run(task, seed, lambda m, q: ours(m, q, kf.reduce)) for seed in FEW]
    rows.append(row("vit", "kfac, reduce", reduced))
    rate, rivals = best(task, "adamw")
    rows.append(row("vit", f"adamw {rate:g}", rivals))
    for label, found in (("expand", mine), ("reduce", reduced)):
        share = middle(found) / middle(rivals)
        claims.append(claim(f"vit, {label}: steps over AdamW's (published 0.5-0.75)", share, "<= 0.75", share <= 0.75))


if __name__ == "__main__":
    main()
