"""Steps and seconds to a target in torch: K-FAC untuned, against rivals at the best of five rates.

Digits autoencoder at four batch sizes to 0.23, curves stand-in for 200 steps; digits CNN (256) to 98 and 99 % test
accuracy; character transformer (64 rows of 64) to 2.2 and 1.7 nats on held-out text, and with 16 rows to 2.4; ViT on
digits (2 x 2 patches, 256) to 97 %, expand and reduce; and trained starts: digits networks trained to a loss of .05 go
on for 60 steps, with the same labels and with 5 % of them changed. Ours is the library's default in every task: one
object, no number set. A rival's rate is chosen on seed 0: AdamW with warm-up and a cosine to the end of the task, Muon,
and SOAP where the extra `rivals` is installed. About 90 minutes of one core; `--quick` about 3.
"""

import os

for _name in ("OMP", "OPENBLAS", "MKL"):
    os.environ[f"{_name}_NUM_THREADS"] = "1"

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from draws_on import draws_on
from report import Claim, at_most, claim, finish, parser
from torch import nn
from torch_rivals import RATES, present, rival
from torch_tasks import Task, ViT, cnn, curved, digits, language
from trained_starts import mlp, trained_starts

import kfaccore as kf
import kfaccore_torch as kt
from kfaccore.step.own import Own

SEEDS = (0, 1, 2, 3, 4, 5)
FEW = (0, 1, 2)  # seeds of --quick, of rivals, of longer horizons and of trained starts
LIMITS = {
    "transformer, 16 rows": 50,
    "transformer": 50,
    "autoencoder, 64": 300,
    "autoencoder, 128": 190,
    "autoencoder, 512": 105,
    "autoencoder, full": 70,
    "cnn": 20,
    "vit": 50,
}
LONGER = ("cnn, 99 %", "transformer, 1.7 nats")
QUICK = ("autoencoder, 512", "autoencoder, full", "cnn")
Make = Callable[[nn.Module, nn.Module], Callable]


@dataclass(frozen=True)
class Trial:
    """Steps to the target, infinite if it was not reached; CPU seconds of training, and of own shares; the figure that
    was looked at last."""

    steps: float
    seconds: float
    own: float
    figure: float


def ours(model: nn.Module, loss: nn.Module, sharing: Any = kf.expand) -> Callable:
    """`sharing` reduce leaves out embeddings, which have none, and attention's packed projection; see kf.reduce."""
    blocks = {name: layer.kind.block() for name, layer in kt.plan(model).layers.items()}
    kept = {name for name, block in blocks.items() if block.diagonal_in or name.endswith("self_attn")}
    methods = {name: kf.KFAC(kf.expand if name in kept else sharing) for name in blocks}
    core = kf.Preconditioner(methods, step=kf.SelfTuning(), donate=True)
    optimizer = kt.Optimizer(model, loss, core)
    return optimizer.step


class OwnShares:
    """CPU seconds that own shares take, while it is entered."""

    def __enter__(self) -> "OwnShares":
        self.seconds = 0.0
        self._shares = Own.shares

        def timed(own: Own, *given: Any) -> Any:
            begun = time.process_time()
            found = self._shares(own, *given)
            self.seconds += time.process_time() - begun
            return found

        Own.shares = timed
        return self

    def __exit__(self, *_: object) -> None:
        Own.shares = self._shares


def run(task: Task, seed: int, make: Make, most: float = math.inf) -> Trial:
    """To the target, or until the task or `most` steps end."""
    torch.manual_seed(seed)
    model = task.model()
    rng = torch.Generator().manual_seed(100 + seed)
    step = make(model, task.loss)
    seconds = 0.0
    figure = math.inf
    with OwnShares() as own:
        for index in range(int(min(task.steps, most))):
            x, y = task.batch(rng)
            begun = time.process_time()
            step(x, y)
            seconds += time.process_time() - begun
            if (index + 1) % task.every == 0:
                with torch.no_grad():
                    figure = task.figure(model)
                if task.target is not None and figure <= task.target:
                    return Trial(index + 1, seconds, own.seconds, figure)
                if not math.isfinite(figure):
                    break
    return Trial(math.inf, seconds, own.seconds, figure)


def best(task: Task, kind: str) -> tuple[float, list[Trial]]:
    """The best rate on seed 0, and three seeds at it. A rate that is behind the best so far is not run to its end."""

    def at(rate: float) -> Make:
        return lambda model, loss: rival(kind, rate, model, loss, task.steps)

    first: dict[float, Trial] = {}
    for rate in RATES[kind]:
        most = min((t.steps for t in first.values()), default=math.inf)
        first[rate] = run(task, 0, at(rate), most)
    rate = min(first, key=lambda r: (first[r].steps, first[r].figure))
    return rate, [first[rate], *(run(task, seed, at(rate)) for seed in FEW[1:])]


def middle(found: list[Trial]) -> float:
    return median(t.steps for t in found)


def row(task: str, label: str, found: list[Trial], limit: int) -> list:
    reached = [t for t in found if math.isfinite(t.steps)]
    told = ", ".join(f"{t.steps:g}" if math.isfinite(t.steps) else f"({t.figure:.3g})" for t in found)
    each = median(1e3 * t.seconds / min(t.steps, limit) for t in found)
    part = median(t.own / t.seconds for t in found)
    return [task, label, told, median(t.seconds for t in reached or found), each, part]


def against(name: str, task: Task, mine: list[Trial], rows: list, claims: list[Claim], quick: bool) -> None:
    """Steps over those of the best rival, and seconds over Muon's for the transformer."""
    share = f"{name}: median steps over the best rival's"
    seconds = f"{name}: seconds over Muon's"
    if quick:
        claims.append(at_most(share, None, 1))
        return
    found = {kind: best(task, kind) for kind in present()}
    rows += [row(name, f"{kind} {rate:g}", trials, task.steps) for kind, (rate, trials) in found.items()]
    fewest = min(middle(trials) for _, trials in found.values())
    claims.append(at_most(share, middle(mine) / fewest if math.isfinite(middle(mine)) else math.inf, 1))
    if "soap" not in found:
        claims.append(claim(f"{name}: SOAP among the rivals", None, "extra `rivals`", None))
    if name == "transformer":
        taken = [median(t.seconds for t in trials) for trials in (mine, found["muon"][1])]
        claims.append(at_most(seconds, taken[0] / taken[1], 2.0))


def vit(task: Task, mine: list[Trial], rows: list, claims: list[Claim]) -> None:
    """Against AdamW, whose steps the published figures are shares of; with reduce too."""
    reduced = [run(task, seed, lambda m, q: ours(m, q, kf.reduce)) for seed in FEW]
    rows.append(row("vit", "kfac, reduce", reduced, task.steps))
    rate, rivals = best(task, "adamw")
    rows.append(row("vit", f"adamw {rate:g}", rivals, task.steps))
    for label, found in (("expand", mine), ("reduce", reduced)):
        share = middle(found) / middle(rivals)
        claims.append(claim(f"vit, {label}: steps over AdamW's (published 0.5-0.75)", share, "<= 0.75", share <= 0.75))


def curves(rows: list, claims: list[Claim], quick: bool) -> None:
    """The loss after 200 steps over that of the best rival."""
    label = "curves: loss after 200 steps over Muon's"
    if quick:
        claims.append(at_most(label, None, 1))
        return
    task = curved()["curves"]
    mine = [run(task, seed, ours) for seed in FEW]
    rate, muon = best(task, "muon")
    rows += [row("curves", "kfac", mine, task.steps), row("curves", f"muon {rate:g}", muon, task.steps)]
    claims.append(at_most(label, median(t.figure for t in mine) / median(t.figure for t in muon), 1))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--draws-on", action="store_true", help="instead: draws on parts of the batch, see draws_on")
    given = options.parse_args()
    rows: list = []
    claims: list[Claim] = []
    if given.draws_on:
        tasks = digits() | language()
        chosen = {name: task for name, task in tasks.items() if not given.quick or name == "cnn"}
        draws_on(chosen, run, FEW, rows, claims)
        columns = ("task", "optimiser", "steps, or ends, of the seeds", "median CPU seconds, or largest batch loss")
        finish("Steps to the target by the share that is drawn on", columns, rows, claims, given.json)
        return
    for name, task in (digits() | language()).items():
        limit = f"{name}: median steps"
        if given.quick and name not in QUICK:
            claims += [at_most(limit, None, LIMITS[name])] if name in LIMITS else []
            claims.append(at_most(f"{name}: median steps over the best rival's", None, 1))
            claims += [at_most(f"{name}: seconds over Muon's", None, 2.0)] if name == "transformer" else []
            continue
        seeds = FEW if given.quick or name in LONGER else SEEDS
        mine = [run(task, seed, ours) for seed in seeds]
        rows.append(row(name, "kfac", mine, task.steps))
        if name in LIMITS:
            claims.append(at_most(limit, middle(mine), LIMITS[name]))
        claims.append(at_most(f"{name}: seeds that fail", sum(math.isinf(t.steps) for t in mine), 0))
        if name == "vit":
            vit(task, mine, rows, claims)
        else:
            against(name, task, mine, rows, claims, given.quick)
    curves(rows, claims, given.quick)
    trained = trained_starts({"mlp": mlp, "cnn": cnn, "vit": ViT}, FEW, claims, given.quick)
    rows += [[*cells, "", ""] for cells in trained]
    columns = ("task", "optimiser", "steps, or (last figure) or ends", "CPU s, or top", "ms a step", "own shares' part")
    finish("Steps to the target", columns, rows, claims, given.json)


if __name__ == "__main__":
    main()
