"""Do FNGD's later epochs cost what SGD's do, and do its shared coefficients beat one rate a layer? Digits.

Times: steps of SGD and Adam, of FNGD computing and sharing, GlobalFNGD too, and of K-FAC, all with momentum, on a dense
net and a CNN.
Curves: the four ways to share, coefficients at every step, tuned SGD and Adam, with batches replayed and reshuffled;
rate and damping of each from a grid, then three seeds. Rates are in units of damping: |x| <= |gradient| / damping.
"""

import os

for _name in ("OMP", "OPENBLAS", "MKL"):
    os.environ[f"{_name}_NUM_THREADS"] = "1"

import importlib.util
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
from report import arguments, at_least, at_most, claim, finish, interleaved

import kfaccore as kf
import kfaccore_numpy as kn
from kfaccore.methods.rows.fngd import mean_vector, position, sample, scalar_rate
from kfaccore_numpy.tasks import digits

SHARES = {"position": position, "sample": sample, "mean_vector": mean_vector, "scalar": scalar_rate}
NETS = {
    "64-1024-1024-10": kn.Sequential((64,), (kn.Dense(1024), kn.ReLU(), kn.Dense(1024), kn.ReLU(), kn.Dense(10))),
    "cnn": kn.Sequential(
        (8, 8, 1),
        (
            kn.Conv2d(16, kf.Window((3, 3), padding=1)),
            kn.ReLU(),
            kn.Conv2d(48, kf.Window((3, 3), padding=1, stride=2)),
            kn.ReLU(),
            kn.Flatten(),
            kn.Dense(10),
        ),
    ),
}
BATCH, LOSS, MOMENTUM = 256, kf.SoftmaxCrossEntropy(), 0.9
RATES, DAMPINGS = (0.03, 0.1, 0.3, 1.0), (0.03, 0.3)
BASELINES = {"sgd": (kn.SGD, (0.01, 0.03, 0.1, 0.3)), "adam": (kn.Adam, (3e-4, 1e-3, 3e-3, 1e-2))}
PAPER = 2.07  # times faster than K-FAC, ResNet-18 on CIFAR-100


def data(images: bool) -> tuple[np.ndarray, np.ndarray]:
    x, y = digits()
    return (x.reshape(-1, 8, 8, 1) if images else x)[:1437], y[:1437]


class Run:
    """One network under one optimiser, epoch by epoch; the last batch of an epoch is ragged."""

    def __init__(self, net: str, optimiser: Any, seed: int = 0, replayed: bool = True) -> None:
        self.network, self.optimiser, self.seed, self.replayed = NETS[net], optimiser, seed, replayed
        self.x, self.y = data(net == "cnn")
        self.params = self.network.init(np.random.default_rng(seed))
        self.state = kn.initial_state(self.network, self.params, optimiser, len(self.x))
        self.index = 0

    def batches(self) -> list[np.ndarray]:
        """Dataset positions of each batch of the epoch to come."""
        epoch = 0 if self.replayed else self.index
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.x))
        return [order[i : i + BATCH] for i in range(0, len(order), BATCH)]

    def step(self, ids: np.ndarray, at: int) -> None:
        """One step on the examples `ids`."""
        rng, pair = np.random.default_rng([self.seed, at]), (self.x[ids], self.y[ids])
        _, state, _ = kn.step(self.network, self.params, pair, LOSS, self.optimiser, self.state, at, rng, ids=ids)
        self.state = state

    def epoch(self) -> None:
        """All batches once."""
        for ids in self.batches():
            self.step(ids, self.index)
            self.index += 1

    def loss(self) -> float:
        """Mean loss over all examples."""
        return kn.mean_loss(self.network, self.params, (self.x, self.y), LOSS)


def steps_an_epoch() -> int:
    return -(-1437 // BATCH)


def fngd(share: Any, damping: float, rate: float, steps: int | None = None, whole: bool = False) -> kf.Preconditioner:
    """FNGD, or GlobalFNGD, with momentum at rate x damping; steps 0 computes coefficients at every step."""
    method = (kf.GlobalFNGD if whole else kf.FNGD)(share, steps_an_epoch() if steps is None else steps)
    given = {"clocks": kf.Clocks(1, 1), "schedules": kf.Schedules(damping), "donate": True}
    return kf.Preconditioner(
        **{"network" if whole else "methods": method}, step=kf.Fixed(rate * damping, MOMENTUM), **given
    )


def kfac(update: int, refresh: int) -> kf.Preconditioner:
    """K-FAC on its clocks, at a rate that moves nothing."""
    return kf.Preconditioner(
        kf.KFAC(), kf.Clocks(update, refresh), kf.Schedules(0.1), step=kf.Fixed(1e-9, MOMENTUM), donate=True
    )


def seconds(net: str, repeats: int) -> dict[str, float]:
    """Median seconds of a step of each kind, at rates that move nothing."""
    sgd = kn.SGD(1e-9, MOMENTUM)
    plain = {"cold": sgd, "sgd": sgd, "adam": kn.Adam(1e-12)}  # the first of a round finds K-FAC's factors in the cache
    runs = {name: Run(net, optimiser) for name, optimiser in plain.items()}
    runs |= {name: Run(net, fngd(share, 1.0, 1e-9)) for name, share in SHARES.items()}
    runs["global"] = Run(net, fngd(mean_vector, 1.0, 1e-9, whole=True))
    runs["computing"] = Run(net, fngd(mean_vector, 1.0, 1e-9, 0))
    runs["global computing"] = Run(net, fngd(mean_vector, 1.0, 1e-9, 0, True))
    for run in runs.values():
        run.epoch()
    ids = runs["sgd"].batches()[0]
    functions = {name: lambda r=run: r.step(ids, steps_an_epoch()) for name, run in runs.items()}
    for name, (update, refresh) in {"kfac 10/100": (10, 100), "kfac 1/10": (1, 10)}.items():
        run = Run(net, kfac(update, refresh))
        run.step(ids, 0)
        for kind, at in (("plain", 1), ("update", update), ("refresh", refresh)):

            def one(r: Run = run, at: int = at) -> None:
                r.state = replace(r.state, step=at)
                r.step(ids, at)

            functions[f"{name} {kind}"] = one
    found = interleaved(functions, repeats)
    found.pop("cold")
    for name, (update, refresh) in {"kfac 10/100": (10, 100), "kfac 1/10": (1, 10)}.items():
        shares = {"refresh": 1 / refresh, "update": 1 / update - 1 / refresh, "plain": 1 - 1 / update}
        found[name] = sum(share * found.pop(f"{name} {kind}") for kind, share in shares.items())
    return found


def torch_share(repeats: int) -> float:
    """A torch step of a later epoch over plain SGD's, dense net; the coefficient is on the weight path."""
    import torch
    from torch import nn

    import kfaccore_torch as kt

    torch.set_num_threads(1)

    def net() -> nn.Module:
        sizes = ((64, 1024), (1024, 1024), (1024, 10))
        return nn.Sequential(*[layer for i, o in sizes for layer in (nn.Linear(i, o), nn.ReLU())][:-1])

    x, y = (torch.from_numpy(part[:BATCH]) for part in data(False))
    x, loss, plain = x.float(), nn.CrossEntropyLoss(), net()
    sgd = torch.optim.SGD(plain.parameters(), 1e-9, MOMENTUM)
    core = kf.Preconditioner(kf.FNGD(steps=1), kf.Clocks(1, 1), step=kf.Fixed(1e-9, MOMENTUM), donate=True)
    ours = kt.Optimizer(net(), loss, core, fisher=kf.empirical, rows=BATCH)
    ours.step(x, y)

    def step() -> None:
        sgd.zero_grad()
        loss(plain(x), y).backward()
        sgd.step()

    found = interleaved({"sgd": step, "fngd": lambda: ours.step(x, y)}, repeats)
    return found["fngd"] / found["sgd"]


def final(optimiser: Any, epochs: int, seed: int, replayed: bool) -> float:
    """Training loss after `epochs`; infinite if it is not finite."""
    run = Run("64-1024-1024-10", optimiser, seed, replayed)
    with np.errstate(all="ignore"):
        for _ in range(epochs):
            run.epoch()
        loss = run.loss()
    return loss if np.isfinite(loss) else np.inf


def curves(epochs: int, replayed: bool, quick: bool) -> dict[str, tuple[float, str]]:
    """Mean final loss over seeds of each method at the best of its grid, and that setting."""
    rates, seeds = (RATES[1:3], 1) if quick else (RATES, 3)
    found = {}
    for name in ("scalar", "position", "sample") if quick else (*SHARES, "every step"):
        share, steps = SHARES.get(name, mean_vector), 0 if name == "every step" else None
        grid = product(rates, DAMPINGS[1:] if quick else DAMPINGS)
        tried = [(final(fngd(share, d, r, steps), epochs, 0, replayed), r, d) for r, d in grid]
        _, r, d = min(tried)
        losses = [final(fngd(share, d, r, steps), epochs, seed, replayed) for seed in range(seeds)]
        found[name] = (float(np.mean(losses)), f"{r:g} x {d:g}")
    for name, (kind, tried) in BASELINES.items():
        _, rate = min((final(kind(rate), epochs, 0, replayed), rate) for rate in (tried[1:3] if quick else tried))
        mean = float(np.mean([final(kind(rate), epochs, seed, replayed) for seed in range(seeds)]))
        found[name] = (mean, f"{rate:g}")
    return found


def main() -> None:
    options = arguments(__doc__)
    rows, claims = [], []
    for net in NETS:
        t = seconds(net, 7 if options.quick else 25)
        rows += [[net, name, value * 1e3, value / t["sgd"], "", ""] for name, value in t.items()]
        worst = max(t[name] for name in SHARES)
        claims += [
            at_least(f"{net}: SGD step, ms", t["sgd"] * 1e3, 5.0),
            at_most(f"{net}: step of a later epoch over SGD's, worst way to share", worst / t["sgd"], 1.10),
            at_most(f"{net}: the same of GlobalFNGD", t["global"] / t["sgd"], 1.10),
            at_least(f"{net}: K-FAC at 10/100 over FNGD later (the paper: {PAPER})", t["kfac 10/100"] / worst, PAPER),
            at_least(f"{net}: K-FAC at 1/10 over FNGD later (the paper: {PAPER})", t["kfac 1/10"] / worst, PAPER),
        ]
    epochs = 4 if options.quick else 8
    for replayed in (True, False):
        kind = "replayed" if replayed else "reshuffled"
        found = curves(epochs, replayed, options.quick)
        rows += [[f"{kind}, {epochs} epochs", name, "", "", loss, at] for name, (loss, at) in found.items()]
        best = min((loss, name) for name, (loss, _) in found.items() if name in SHARES and name != "scalar")
        shown = f"{best[0] / found['scalar'][0]:.3g} ({best[1]})"
        claims += [
            claim(f"{kind}: best shared loss over `scalar`'s", shown, "< 0.9", best[0] < 0.9 * found["scalar"][0]),
            at_most(f"{kind}: best shared loss over tuned Adam's", best[0] / found["adam"][0], 1.0),
        ]
    torch = importlib.util.find_spec("torch") and torch_share(7 if options.quick else 25)
    claims.append(at_most("64-1024-1024-10 in torch: step of a later epoch over SGD's", torch or None, 1.10))
    columns = ("net", "method", "ms a step", "x SGD", "final loss", "rate x damping")
    finish("FNGD: steps and losses", columns, rows, claims, options.json)


if __name__ == "__main__":
    main()
