"""What does a K-FAC step cost over a plain SGD step of the same network? The classic autoencoder, float32, NumPy.

Clocks a/b: statistics every a steps, inverses every b. Amortised figures are computed from the three kinds of step
(plain, with statistics, with statistics and inverses); one is also run directly.
"""

import os

for _name in ("OMP", "OPENBLAS", "MKL"):
    os.environ[f"{_name}_NUM_THREADS"] = "1"

import tracemalloc
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import scipy.linalg
from report import Claim, arguments, at_least, at_most, finish, interleaved

import kfaccore as kf
import kfaccore_numpy as kn
from kfaccore import tree
from kfaccore_numpy.tasks import autoencoder

SIZES = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
NETWORK, LOSS = autoencoder(SIZES), kf.Gaussian()
DAMPING = 0.1


class Training:
    """Runs of one rule at clocks 1/5 from the same start, to time whole cycles of refresh."""

    def __init__(self, x: np.ndarray, rule: Any) -> None:
        self.x, self.params, self.at = x, NETWORK.init(np.random.default_rng(0)), 0
        schedules = kf.Schedules(damping=DAMPING)
        self.pre = kf.Preconditioner(kf.KFAC(), schedules=schedules, step=rule, donate=True)
        self.state = self.pre.init(NETWORK.blocks(), x)
        self.cycle()

    def cycle(self) -> None:
        """Five steps, judged where the rule judges."""
        for _ in range(5):
            pair, rng = (self.x, self.x), np.random.default_rng(self.at)
            _, self.state, _ = kn.step(NETWORK, self.params, pair, LOSS, self.pre, self.state, self.at, rng)
            self.at += 1


class Bench:
    """The network at one batch size, a plain SGD step and K-FAC steps of each kind, as functions to time."""

    def __init__(self, batch: int) -> None:
        rng = np.random.default_rng(0)
        self.batch = batch
        self.x = rng.uniform(size=(batch, SIZES[0])).astype(np.float32)
        self.params = NETWORK.init(rng)
        schedules = kf.Schedules(damping=DAMPING)
        self.pre = kf.Preconditioner(kf.KFAC(), clocks=kf.Clocks(10, 100), schedules=schedules, donate=True)
        self.state = self.pre.init(NETWORK.blocks(), self.x)
        self.kfac(0)

    def sgd(self) -> None:
        """Plain SGD at rate 0: its cost, with the parameters left alone."""
        kn.step(NETWORK, self.params, (self.x, self.x), LOSS, kn.SGD(0.0, 0.0), {}, 0, np.random.default_rng(0))

    def kfac(self, at: int, fisher: Any = kn.sampled) -> Any:
        """A K-FAC step as the clocks 10/100 have it at step `at`, on a copy of the parameters' names."""
        state = replace(self.state, step=at)
        params = dict(self.params)
        quiet = kf.Preconditioner(
            self.pre.methods, clocks=self.pre.clocks, schedules=self.pre.schedules, step=kf.Fixed(1e-9), donate=True
        )
        pair, rng = (self.x, self.x), np.random.default_rng(at)
        _, state, info = kn.step(NETWORK, params, pair, LOSS, quiet, state, at, rng, fisher)
        self.state = state
        return info

    def kinds(self) -> dict[str, Any]:
        """What is timed together: SGD and the kinds of K-FAC step."""
        return {
            "sgd": self.sgd,
            "plain": lambda: self.kfac(1),
            "mc": lambda: self.kfac(10),
            "mc refresh": lambda: self.kfac(100),
            "empirical": lambda: self.kfac(10, kn.true_labels),
            "empirical refresh": lambda: self.kfac(100, kn.true_labels),
        }

    def direct(self, steps: int) -> None:
        """A run of `steps` with clocks 10/100."""
        for at in range(1, steps + 1):
            self.kfac(at)

    def factored(self) -> tuple[dict[str, kf.Factored], dict[str, kf.Record]]:
        """Gradients not multiplied out, and records, of the batch."""
        f, tape = NETWORK.forward(self.params, self.x)
        g = NETWORK.backward(self.params, tape, LOSS.gradient(f, self.x))
        rows = {name: kf.Factored(tape.saved[name], gy, self.batch) for name, gy in g.items()}
        return rows, NETWORK.records(tape, g, float(self.batch))


def amortised(t: dict[str, float], update: int, refresh: int, fisher: str) -> float:
    """Mean cost over SGD of clocks update/refresh from the kinds of step."""
    refreshes, updates = 1 / refresh, 1 / update - 1 / refresh
    total = refreshes * t[f"{fisher} refresh"] + updates * t[fisher] + (1 - 1 / update) * t["plain"]
    return total / t["sgd"]


def flops(batch: int) -> float:
    """Of a plain SGD step: three products a layer, two in the first."""
    sizes = [(o, i + 1) for i, o in pairwise(SIZES)]
    return 6.0 * batch * sum(o * i for o, i in sizes) - 2.0 * batch * sizes[0][0] * sizes[0][1]


def kernels(bench: Bench, repeats: int) -> dict[str, float]:
    """Rates of measure, measure + update and refresh over their floors, on the network's own rows."""
    method, hyper = bench.pre.methods, kf.Hyper(0, 0.95, DAMPING)
    _, records = bench.factored()
    states = {name: method.init(kf.Block.of(r), bench.x) for name, r in records.items()}

    def update(donate: bool) -> dict[str, Any]:
        for name, r in records.items():
            states[name] = method.update(states[name], method.measure(states[name], r, hyper), hyper, donate)
        return states

    update(False)
    damped = [np.asarray(m[0]) for s in states.values() for m in (s.A, s.G)]
    damped = [m + np.float32(DAMPING) * np.eye(len(m), dtype=np.float32) for m in damped]
    pairs = [(r.a[0, :, 0], r.g[0, 0, :, 0]) for r in records.values()]
    times = interleaved(
        {
            "syrk": lambda: [(a.T @ a, g.T @ g) for a, g in pairs],
            "measure": lambda: [method.measure(states[name], r, hyper) for name, r in records.items()],
            "update": lambda: update(True),
            "refresh": lambda: [method.refresh(s, hyper) for s in states.values()],
            "inv": lambda: [scipy.linalg.inv(m, assume_a="pos", check_finite=False) for m in damped],
        },
        repeats,
    )
    return {
        "measure": times["syrk"] / times["measure"],
        "update": times["syrk"] / times["update"],
        "refresh": times["refresh"] / times["inv"],
    }


def self_tuning(bench: Bench, repeats: int) -> float:
    """SGD steps that a self-tuning step costs above a fixed one, both at clocks 1/5, its judging forward included."""
    fixed, tuned = Training(bench.x, kf.Fixed(1e-6)), Training(bench.x, kf.SelfTuning(tolerance=np.inf))
    pair = {"sgd": bench.sgd, "fixed": fixed.cycle, "tuned": tuned.cycle}
    t = interleaved(pair, repeats)
    return (t["tuned"] - t["fixed"]) / (5 * t["sgd"])


def gemm_rate(repeats: int) -> float:
    """Flops a second of a product of the network's size."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(s).astype(np.float32) for s in ((512, 1000), (1000, 1000)))
    return 2 * 512e6 / interleaved({"gemm": lambda: a @ b}, repeats)["gemm"]


def accuracy(bench: Bench) -> tuple[float, float, float]:
    """Worst-layer float32 errors of dense and factored solves at damping 1e-4 of the mean eigenvalue, over the layers
    where a side is factored, and the error of the timed directions; all against the same inverses in float64."""
    method = kf.KFAC(split=kf.Relative(kf.pi, kf.mean_eigenvalue))
    grads, records = bench.factored()
    hyper, found = kf.Hyper(0, 0.0, 1e-4), {"dense": 0.0, "factored": 0.0}
    for name, grad in grads.items():
        if bench.batch >= max(grad.a.shape[-1], grad.g.shape[-1]):
            continue
        state = kf.settle(method, records[name], damping=1e-4)
        exact = _float64(state, grad)
        for kind, given in (("dense", grad.dense()), ("factored", grad)):
            found[kind] = max(found[kind], _error(method.solve(state, given, hyper).direction, exact))
    timed = 0.0
    for name, state in bench.state.layers.items():
        direction = bench.pre.methods.solve(state, grads[name], hyper).direction
        timed = max(timed, _error(direction, _float64(state, grads[name])))
    return found["dense"], found["factored"], timed


def _float64(state: Any, grad: kf.Factored) -> np.ndarray:
    inverse = tree.map(lambda x: np.asarray(x, np.float64), state.inverse)
    a, g = (np.asarray(x, np.float64)[0, :, 0] for x in (grad.a, grad.g))
    return inverse.G[0] @ (g.T @ a / grad.n) @ inverse.A[0]


def _error(direction: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(direction[0] - exact) / np.linalg.norm(exact))


def memory(bench: Bench) -> tuple[float, float, float]:
    """MB: state by the formula 2 (d_in^2 + d_out^2), state as estimated before a run, extra peak of one full step."""
    formula = sum(8.0 * ((i + 1) ** 2 + o**2) for i, o in pairwise(SIZES)) / 2**20
    estimate = sum(bench.pre.memory(NETWORK.blocks()).values()) / 2**20
    tracemalloc.start()
    bench.kfac(100)
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return formula, estimate, peak


def main() -> None:
    options = arguments(__doc__)
    repeats = 5 if options.quick else 15
    rows, cost = [], {}
    for batch in (128, 512) if options.quick else (128, 512, 2048):
        bench = Bench(batch)
        t = interleaved(bench.kinds(), repeats)
        slow = {f"{f} {u}/{r}": amortised(t, u, r, f) for f in ("mc", "empirical") for u, r in ((10, 100), (1, 10))}
        cost[batch] = {**slow, "sgd": t["sgd"]}
        rows.append([batch, t["sgd"] * 1e3, *(t[k] / t["sgd"] for k in t if k != "sgd"), *slow.values()])
    bench = Bench(512)
    rates = kernels(bench, repeats)
    pair = {"sgd": lambda: [bench.sgd() for _ in range(10)], "run": lambda: bench.direct(100)}
    run = interleaved(pair, 1 if options.quick else 3)
    direct = run["run"] / run["sgd"] / 10
    extra = self_tuning(bench, 3 if options.quick else 9)
    dense, factored, timed = accuracy(bench)
    formula, estimate, peak = memory(bench)
    large = cost.get(2048, {})
    claims: list[Claim] = [
        at_most("10/100, batch 512, Monte-Carlo, x SGD", cost[512]["mc 10/100"], 2.05),
        at_most("10/100, batch 512, run directly, x SGD", direct, 2.05),
        at_most("10/100, batch 128, Monte-Carlo, x SGD", cost[128]["mc 10/100"], 2.2),
        at_most("10/100, batch 2048, Monte-Carlo, x SGD", large.get("mc 10/100"), 1.5),
        at_most("1/10, batch 512, Monte-Carlo, x SGD", cost[512]["mc 1/10"], 3.1),
        at_most("1/10, batch 512, empirical, x SGD", cost[512]["empirical 1/10"], 2.6),
        at_most("self-tuning step above a fixed one at 1/5, batch 512, in SGD steps", extra, 1.25),
        at_least("measure, share of the rate of X.T @ X", rates["measure"], 0.9),
        at_least("measure + update with donate, share of that rate", rates["update"], 0.85),
        at_most("refresh over scipy.linalg.inv(assume_a='pos')", rates["refresh"], 1.25),
        at_most("SGD step over its flops at the GEMM rate", cost[512]["sgd"] * gemm_rate(9) / flops(512), 1.35),
        at_least("float32 at damping 1e-4 of the mean: dense error over factored error", dense / factored, 10),
        at_most("float32 error of the timed directions against float64", timed, 1e-4),
        at_most("state in MB over the formula 2 (d_in^2 + d_out^2)", estimate / formula, 1.01),
    ]
    kinds = ("plain", "mc", "mc+inv", "emp", "emp+inv")
    columns = ("batch", "sgd ms", *kinds, *(f"{f} {c}" for f in ("mc", "emp") for c in ("10/100", "1/10")))
    title = f"K-FAC step over SGD step; state {formula:.0f} MB, extra peak of a step with everything {peak:.0f} MB"
    finish(title, columns, rows, claims, options.json)


if __name__ == "__main__":
    main()
