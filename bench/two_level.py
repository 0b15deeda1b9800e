"""What does a coarse correction between layers gain, cost and change? Every coarse space of TwoLevel against K-FAC.

gain        E(z) - E(z0), the change of the squared distance to F_d^-1 g in the norm of F_d, along runs of K-FAC
loss        final loss of five seeds against K-FAC's, mean of the differences with its standard error, at the
            coefficient c of a grid that was best in the mean of three other seeds (c = 1 there beside it); the
            self-tuning step for all: no fixed rate or clip suits every correction's directions
overhead    time of a step at clocks 10/100 on the classic autoencoder, K-FAC's = 1, with the Fisher drawn for the whole
            batch and for a quarter of it; K-FAC needs no records between updates, a coarse correction at every step.
            Nothing is kept from step to step but what K-FAC keeps: images and coarse matrix are this step's. The powers
            of krylov-residual are taken in M's eigenvectors, KFAC(inverse=eigh); K-FAC and the others use Cholesky

--only overhead measures nothing else
"""

import os

for _name in ("OMP", "OPENBLAS", "MKL"):
    os.environ[f"{_name}_NUM_THREADS"] = "1"

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from statistics import fmean
from typing import Any

import numpy as np
from report import at_least, at_most, claim, finish, interleaved, parser

import kfaccore as kf
import kfaccore_numpy as kn
from kfaccore.network import Directions, Krylov, Nicolaides, Residual, Spectral
from kfaccore_numpy.tasks import autoencoder
from kfaccore_numpy.train import Batch

SPACES = {
    "nicolaides": Nicolaides(),
    "spectral": Spectral(),
    "krylov-nicolaides": Krylov(Nicolaides()),
    "residual": Residual(),
    "krylov-residual": Krylov(Residual()),
    "directions": Directions(),
}
TURNED = {"krylov-residual": kf.KFAC(inverse=kf.eigh)}
LIMITS = {"nicolaides": 1.6, "spectral": 1.6, "krylov-nicolaides": 1.6, "residual": 2.4, "krylov-residual": 3.1}
LIMITS |= {"directions": 1.6}
RANKED = ("krylov-residual", "residual", "krylov-nicolaides", "nicolaides", "spectral")
CLASSIC, LOSS, SIZE = autoencoder((784, 1000, 500, 250, 30, 250, 500, 1000, 784)), kf.Gaussian(), 512
TASK, DAMPING = kn.TASKS["digits-autoencoder"], 0.1
COEFFICIENTS = (1.0, 0.1, 0.01)
SCHEDULES = kf.Schedules(damping=DAMPING)
CLIPPED = kf.Fixed(1.0, 0.9, kf.KLClip(1e-3))


def gains(steps: int, every: int) -> dict[str, float]:
    """Median gain of each space on the same states, gradients and records along a run of K-FAC."""
    x = TASK.load()[0][0].astype(np.float64)
    network, params = TASK.network, TASK.network.init(np.random.default_rng(0), np.float64)
    pre = kf.Preconditioner(kf.KFAC(), schedules=SCHEDULES, step=CLIPPED)
    found: dict[str, list[float]] = {name: [] for name in SPACES}
    for p in kn.fit(network, params, (x, x), TASK.loss, pre, batch=TASK.batch, steps=steps):
        if p.step % every:
            continue
        rng = np.random.default_rng([1, p.step])
        pair = x[rng.integers(0, len(x), TASK.batch)]
        f, tape = network.forward(p.params, pair)
        g = network.backward(p.params, tape, TASK.loss.gradient(f, pair))
        drawn = kn.sampled(network, p.params, tape, Batch(f, pair, TASK.loss), g, rng)
        records = network.records(tape, drawn, float(len(pair)))
        grads = network.gradients(tape, g, float(len(pair)), factored=False)
        hypers = {name: kf.Hyper(p.step, 0.95, DAMPING) for name in grads}
        for name, space in SPACES.items():
            method = kf.TwoLevel(space=space)
            state = replace(method.init(network.blocks(), pair), layers=p.state.layers)
            solution = method.solve(method.refresh(state, hypers), grads, hypers, records)
            found[name].append(float(solution.info["gain"]))
    worst = max(max(values) for values in found.values())
    return {name: float(np.median(values)) for name, values in found.items()} | {"worst": worst}


def final_losses(method: dict[str, Any], seeds: Iterable[int], steps: int) -> list[float]:
    """Loss over all data after a run of each seed."""
    data, found = TASK.load()[0], []
    for seed in seeds:
        params = TASK.network.init(np.random.default_rng(seed))
        pre = kf.Preconditioner(**method, step=kf.SelfTuning(), donate=True)
        for _ in kn.fit(TASK.network, params, data, TASK.loss, pre, batch=TASK.batch, steps=steps, seed=seed):
            pass
        found.append(kn.mean_loss(TASK.network, params, data, TASK.loss))
    return found


class Stepper:
    """Steps of one method on the classic autoencoder, of any kind the clocks 10/100 know."""

    def __init__(self, method: dict[str, Any], share: int) -> None:
        rng = np.random.default_rng(0)
        self.x = rng.uniform(size=(SIZE, 784)).astype(np.float32)
        self.params, self.share = CLASSIC.init(rng), share
        self.pre = kf.Preconditioner(**method, clocks=kf.Clocks(10, 100), schedules=SCHEDULES, donate=True)
        self.state = self.pre.init(CLASSIC.blocks(), self.x)
        self.at(0)

    def at(self, step: int) -> None:
        """What step number `step` does; the parameters stay."""
        x, few, rng = self.x, self.x[: SIZE // self.share], np.random.default_rng(step)
        state = replace(self.state, step=step)
        f, tape = CLASSIC.forward(self.params, x)
        g = CLASSIC.backward(self.params, tape, LOSS.gradient(f, x))
        grads, records = CLASSIC.gradients(tape, g, float(SIZE)), None
        if self.pre.wants_records(state):
            if self.share > 1:
                f, tape = CLASSIC.forward(self.params, few)
            drawn = kn.sampled(CLASSIC, self.params, tape, Batch(f, few, LOSS), g, rng)
            records = CLASSIC.records(tape, drawn, float(len(few)))
        _, self.state, _ = self.pre.step(state, records, grads)


def overheads(share: int, repeats: int, names: tuple[str, ...]) -> dict[str, float]:
    """Seconds of a step at clocks 10/100, amortised over its three kinds."""
    steppers = {"kfac": Stepper({"methods": kf.KFAC()}, share)}
    for name in names:
        steppers[name] = Stepper({"network": kf.TwoLevel(TURNED.get(name, kf.KFAC()), SPACES[name])}, share)
    times = {}
    for kind, step in (("plain", 1), ("update", 10), ("refresh", 100)):
        functions = {name: (lambda s=stepper, step=step: s.at(step)) for name, stepper in steppers.items()}
        times[kind] = interleaved(functions, repeats if kind == "plain" else max(1, repeats // 2))
    shares = {"plain": 0.9, "update": 0.09, "refresh": 0.01}
    return {name: sum(shares[kind] * times[kind][name] for kind in shares) for name in steppers}


def compared(options: Any) -> tuple[list[list], dict[str, Any]]:
    """Rows of the table and every figure."""
    names = ("nicolaides", "residual") if options.quick else tuple(SPACES)
    whole = {} if options.quick else overheads(1, 6, names)
    quarter = overheads(4, 2 if options.quick else 6, names)
    if options.only:
        rows = [[n, *["-"] * 5, *(t[n] / t["kfac"] if t else "-" for t in (whole, quarter))] for n in names]
        return rows, {"gain": {}, "loss": {}, "whole": whole, "quarter": quarter}
    gain = gains(10, 5) if options.quick else gains(100, 10)
    seeds, steps = (range(1), 10) if options.quick else (range(5), 50)
    plain, loss, best, full = final_losses({"methods": kf.KFAC()}, seeds, steps), {}, {}, {}
    for name in names:
        tried = {c: {"network": kf.TwoLevel(space=SPACES[name], coefficient=c)} for c in COEFFICIENTS}
        others = {c: fmean(final_losses(tried[c], [5] if options.quick else [5, 6, 7], steps)) for c in COEFFICIENTS}
        best[name], full[name] = min(others, key=lambda c: others[c]), others[1.0]
        loss[name] = final_losses(tried[best[name]], seeds, steps)
    gaps = {name: 100 * (np.array(values) / np.array(plain) - 1) for name, values in loss.items()}
    shown = {n: (float(g.mean()), float(g.std(ddof=1) / len(g) ** 0.5) if len(g) > 1 else 0.0) for n, g in gaps.items()}
    rows = [["kfac", 0.0, "", float(np.mean(plain)), "", "", 1.0, 1.0]]
    for name in names:
        mean, error = shown[name]
        ratios = [t[name] / t["kfac"] if t else "-" for t in (whole, quarter)]
        losses = float(np.mean(loss[name])), f"{mean:+.2f} % ± {error:.2f}", full[name]
        rows.append([name, gain[name], best[name], *losses, *ratios])
    return rows, {"gain": gain, "loss": shown, "whole": whole, "quarter": quarter}


def main() -> None:
    """Run, print, exit 1 if a claim falls short."""
    options = parser(__doc__)
    options.add_argument("--only", choices=["overhead"], help="measure nothing else")
    options = options.parse_args()
    rows, found = compared(options)
    gain = found["gain"]
    ranked = None if options.quick or options.only else all(gain[a] < gain[b] for a, b in pairwise(RANKED))
    order = " < ".join(sorted(RANKED, key=lambda name: gain[name])) if gain else None
    claims = [
        at_most("largest gain of any space at any measured step", gain.get("worst"), 0.0),
        claim("ranking of the median gains", order, " < ".join(RANKED), ranked),
    ]
    own = gain["directions"] / gain["residual"] if ranked is not None else None
    claims.append(at_least("gain of the layers' own directions, x the residual's", own, 1.0))
    for name in SPACES:
        mean = found["loss"][name][0] if ranked is not None else None
        claims.append(at_most(f"final loss, {name} at the best c, above K-FAC's, %", mean, 2.0))
    for what in ("whole", "quarter"):
        times = found[what]
        for name, limit in LIMITS.items():
            ratio = times[name] / times["kfac"] if name in times else None
            claims.append(at_most(f"a step, {name}, {what} batch for the Fisher, x K-FAC", ratio, limit))
    columns = ("method", "median gain", "c", "loss", "from K-FAC", "other seeds, c = 1", "step, whole", "step, quarter")
    finish("coarse spaces, K-FAC = 1", columns, rows, claims, options.json)


if __name__ == "__main__":
    main()
