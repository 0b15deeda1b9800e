"""Do K-FAC and Gauss-Newton solve differential equations to the published accuracy, and what does a step cost?

Float64. `absolute` is the root mean square error on 9,000 held-out points, as in the published logs; `relative` is
that over the root mean square of the solution. Seconds are CPU seconds of one thread: wall seconds of an idle core.
--quick: one seed, KFAC 1,000 steps, KFAC* 2,000, 8 s of the deep network. --minutes 10: heat 1+1d, heat 4+1d and
Poisson 5d with that budget a method, beside the published table; --problems has two more.
"""

import os

for _name in ("OMP", "OPENBLAS", "MKL"):
    os.environ[f"{_name}_NUM_THREADS"] = "1"

import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite
from statistics import median
from typing import Any

import numpy as np
from pinn_rivals import ENGD, HessianFree, lbfgs, matrix_free
from report import Claim, at_least, at_most, claim, finish, interleaved, parser

from kfaccore_numpy import Adam
from kfaccore_numpy.equations.tasks import PINN_TASKS
from kfaccore_numpy.equations.train import Ahead, initial_state, step

SHALLOW, DEEP = "poisson-2d", "poisson-2d-deep"
RIVALS = {"hessian-free": HessianFree(), "engd": ENGD()}
CONTESTED = {"fokker-planck-9d"}  # where the published KFAC is worse than the published Adam: only KFAC* is a claim
PUBLISHED = {  # final absolute errors of the best tuned runs, 1,000 to 6,000 s on a GPU, of the same problem and widths
    "heat-1d": {"adam": 1.2e-4, "hessian-free": 6.2e-7, "lbfgs": 2.7e-4, "pinn-kfac": 1.9e-6, "pinn-kfac-star": 8.8e-7},
    "heat-4d": {"adam": 1.1e-3, "hessian-free": 1.4e-5, "lbfgs": 4.9e-4, "pinn-kfac": 1.7e-4, "pinn-kfac-star": 5.9e-5},
    "poisson-5d": {"adam": 1.1e-3, "hessian-free": 6.1e-6, "lbfgs": 8.9e-4, "pinn-kfac": 4.9e-5,
                   "pinn-kfac-star": 2.7e-6},
    "fokker-planck-9d": {"adam": 1.8e-1, "hessian-free": 2.5e-2, "lbfgs": 5e-2, "pinn-kfac": 4.2e-1,
                         "pinn-kfac-star": 2.6e-2},
    "poisson-10d": {"adam": 1.5e-3, "hessian-free": 2.2e-5, "lbfgs": 7e-4, "pinn-kfac": 2.9e-4,
                    "pinn-kfac-star": 4.7e-5},
}  # fmt: skip


@dataclass
class Trial:
    """One run: steps and CPU seconds, both errors at the end, lowest absolute error, steps to each mark."""

    steps: int = 0
    seconds: float = 0.0
    relative: float = inf
    absolute: float = inf
    best: float = inf
    hits: dict[float, int] = field(default_factory=dict)

    def look(self, pinn: Any, params: Any, x: np.ndarray, marks: Sequence[float]) -> None:
        self.relative, self.absolute = pinn.errors(params, x)
        self.best = min(self.best, self.absolute)
        for mark in marks:
            if self.absolute <= mark:
                self.hits.setdefault(mark, self.steps)


def run(
    name: str, method: str, seed: int, steps: int = 10**9, seconds: float = inf, marks: Sequence[float] = ()
) -> Trial:
    """Train on a task until `steps` or CPU `seconds`, looking at the errors every 20 steps if there are marks.

    method   also adam@3e-3: at another rate than the task's
    """
    task = PINN_TASKS[name]
    pinn = task.pinn()
    params, batches = pinn.init(seed), pinn.batches(*task.counts, task.every, seed)
    x, trial = pinn.problem.inside(np.random.default_rng([seed, 7]), 9000), Trial()
    if method == "lbfgs":
        trial.steps, trial.seconds = lbfgs(pinn, params, next(batches), seconds), seconds
        trial.look(pinn, params, x, marks)
        return trial
    rival, damping = RIVALS.get(method), 1e-2
    kind, _, rate = method.partition("@")
    solver = None if rival else Adam(float(rate)) if rate and kind == "adam" else task.solver(method)
    state = None if rival else initial_state(pinn, params, solver)
    ahead = Ahead(pinn)
    while trial.steps < steps and trial.seconds < seconds:
        batch, begun = next(batches), time.process_time()
        if rival:
            damping = matrix_free(pinn, params, batch, rival, damping)
        else:
            _, state, _ = step(pinn, params, batch, solver, state, trial.steps, task.rows, ahead)
        trial.seconds += time.process_time() - begun
        trial.steps += 1
        if marks and trial.steps % 20 == 0:
            trial.look(pinn, params, x, marks)
    trial.look(pinn, params, x, marks)
    return trial


def row(name: str, method: str, trials: list[Trial], marks: Sequence[float] = (), published: float | str = "-") -> list:
    """Medians over seeds."""

    def middle(values: list[float]) -> str:
        value = median(values)
        return f"{value:.3g}" if isfinite(value) else "never"

    hits = [", ".join(f"{m:g}: {middle([t.hits.get(m, inf) for t in trials])}" for m in marks)] if marks else ["-"]
    numbers = [middle([getattr(t, key) for t in trials]) for key in ("steps", "seconds", "absolute", "relative")]
    return [name, method, len(trials), *numbers, *hits, published]


def shallow(rows: list, claims: list[Claim], quick: bool) -> None:
    """2-64-1, 257 parameters, 900 + 120 points."""
    seeds = (0,) if quick else (0, 1, 2)
    plan = {
        "pinn-kfac": (1000 if quick else 3000, {1e-4: 800, 1e-5: 3000}, "1e-4: 446, 1e-5: 2254"),
        "pinn-kfac-star": (2000 if quick else 12000, {1e-4: 2000, 1e-5: 6000, 3e-6: 12000}, "1e-4: 1539, 1e-5: 3000"),
    }
    for method, (steps, marks, published) in plan.items():
        trials = [run(SHALLOW, method, seed, steps, marks=tuple(marks)) for seed in seeds]
        rows.append(row(SHALLOW, method, trials, tuple(marks), published))
        for mark, limit in marks.items():
            label = f"{method}, 257 parameters: median steps to {mark:g}"
            done = quick and limit > steps
            claims.append(at_most(label, None if done else median(t.hits.get(mark, inf) for t in trials), limit))
    label = "adam, 257 parameters: lowest absolute error in 20,000 steps"
    if quick:
        claims.append(at_least(label, None, 1e-4))
        rows.append(row(SHALLOW, "adam", [run(SHALLOW, "adam", 0, 2000, marks=(1e-4,))], (1e-4,), "9.4e-5 at the end"))
        return
    adam = [run(SHALLOW, "adam", 0, 20000, marks=(1e-4,))]
    rows.append(row(SHALLOW, "adam", adam, (1e-4,), "9.4e-5 at the end"))
    claims.append(at_least(label, adam[0].best, 1e-4))
    for method, published in {"gauss-newton": "-", "engd": "6.2e-8 at the end", "hessian-free": "1e-4: 35 s"}.items():
        found = [run(SHALLOW, method, 0, seconds=10, marks=(1e-4, 1e-5, 3e-6))]
        rows.append(row(SHALLOW, method, found, (1e-4, 1e-5, 3e-6), published))


def deep(rows: list, claims: list[Claim], quick: bool) -> None:
    """2-64-64-48-48-1, 9,873 parameters, 600 + 120 points."""
    limits = {"gauss-newton": 5e-5, "pinn-kfac-star": 1.5e-3}
    others = () if quick else ("pinn-kfac", "hessian-free", "lbfgs", "adam")
    for method in (*limits, *others):
        trials = [run(DEEP, method, seed, seconds=8) for seed in ((0,) if quick else (0, 1, 2))]
        rows.append(row(DEEP, method, trials))
        if method in limits:
            error = median(t.relative for t in trials)
            claims.append(at_most(f"{method}, 9,873 parameters: relative error after 8 s", error, limits[method]))
    label = "pinn-kfac-star, 9,873 parameters: relative error after 60 s"
    if quick:
        claims.append(at_most(label, None, 2e-4))
        return
    trial = run(DEEP, "pinn-kfac-star", 0, seconds=60)
    rows.append(row(DEEP, "pinn-kfac-star", [trial], published="7.9e-7 after 1000 s"))
    claims.append(at_most(label, trial.relative, 2e-4))


def cost(claims: list[Claim]) -> None:
    """A whole KFAC* step over one forward and backward of the loss, on the deep network and the published points."""
    task = PINN_TASKS[DEEP]
    pinn = task.pinn()
    params, batch = pinn.init(0), next(pinn.batches(900, 120, 0, 0))

    def stepping(stays: bool) -> Callable[[], None]:
        solver, weights, ahead = task.solver("pinn-kfac-star"), pinn.init(0), Ahead(pinn)
        held = {"state": initial_state(pinn, weights, solver), "index": 0}

        def whole() -> None:
            for _ in range(10):  # a round of the clocks
                points = batch if stays else list(batch)
                _, held["state"], _ = step(pinn, weights, points, solver, held["state"], held["index"], ahead=ahead)
                held["index"] += 1

        return whole

    def plain() -> None:
        for _ in range(10):
            pinn.gradient(params, batch)

    functions = {"stays": stepping(True), "new": stepping(False), "plain": plain}
    times = interleaved(functions, 15, time.process_time)
    label = "KFAC* step over forward and backward of the loss"
    claims.append(at_most(label, times["stays"] / times["plain"], 1.65))
    claims.append(at_most(f"{label}, a new batch every step", times["new"] / times["plain"], 2.0))


def hundred(rows: list, claims: list[Claim], quick: bool) -> None:
    """Peak memory of one K-FAC step in 100 dimensions, the batch and the state aside: all at once, in chunks of points,
    and in chunks on twice the points."""
    name = "poisson-100d"
    labels = (f"{name}: peak memory of a step in chunks over all at once", f"{name}: the same on twice the points")
    if quick:
        claims.extend(at_most(label, None, target) for label, target in zip(labels, (0.5, 1.1), strict=True))
        return
    task = PINN_TASKS[name]
    pinn, peaks = task.pinn(), []
    for points, parts in ((1, 0), (1, 1024), (2, 1024)):
        counts = tuple(points * count for count in task.counts)
        batch = next(pinn.batches(*counts, 0, 0))
        params, solver = pinn.init(0), task.solver("pinn-kfac")
        state = initial_state(pinn, params, solver)
        tracemalloc.start()
        held, begun = tracemalloc.get_traced_memory()[0], time.process_time()
        step(pinn, params, batch, solver, state, 0, parts)
        peaks.append(tracemalloc.get_traced_memory()[1] - held)
        tracemalloc.stop()
        how = f"one step, {counts[0]} + {counts[1]} points, {'in chunks' if parts else 'at once'}"
        spent = time.process_time() - begun
        rows.append([name, "pinn-kfac", 1, 1, spent, "-", "-", how, f"peak {peaks[-1] / 2**20:.0f} MiB"])
    claims.append(at_most(labels[0], peaks[1] / peaks[0], 0.5))
    claims.append(at_most(labels[1], peaks[2] / peaks[1], 1.1))


def budgets(rows: list, claims: list[Claim], minutes: float, problems: Sequence[str], methods: Sequence[str]) -> None:
    """The same time for every method, beside the published errors; which order held."""
    for name in problems:
        published, found = PUBLISHED[name], {}
        for method in methods if minutes else ():
            rated = f"adam@{PINN_TASKS[name].adam[1]:g}" if method == "adam" else method  # of a long run
            trial = found[method] = run(name, rated, 0, seconds=60 * minutes)
            shown = published.get(method.partition("@")[0])
            rows.append(row(name, rated, [trial], published=f"{shown:.1e} absolute" if shown else "-"))
            print(*rows[-1], sep="  ", file=sys.stderr, flush=True)  # hours pass
        ours = ("pinn-kfac-star",) if name in CONTESTED else ("pinn-kfac", "pinn-kfac-star")
        who = "KFAC*" if name in CONTESTED else "worse of KFAC and KFAC*"
        if not found:
            claims.append(claim(f"{name}: {who} below Adam and L-BFGS", None, "--minutes 10", None))
            continue
        worst = max(found[m].absolute for m in ours)
        best = min(trial.absolute for m, trial in found.items() if m.startswith(("adam", "lbfgs")))
        claims.append(at_most(f"{name}, {minutes:g} min: {who} over better of Adam and L-BFGS", worst / best, 1.0))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--minutes", type=float, default=0.0, help="budget a method and problem of the long table")
    options.add_argument("--only", default="", help="sections, of: shallow,deep,cost,hundred,budgets")
    options.add_argument("--problems", default="heat-1d,heat-4d,poisson-5d",
                         help=f"rows of the long table, of: {','.join(PUBLISHED)}")  # fmt: skip
    options.add_argument("--methods", default="pinn-kfac,pinn-kfac-star,adam,lbfgs,hessian-free,gauss-newton",
                         help="columns of the long table; needs the first four; adam@3e-3: at that rate")  # fmt: skip
    given = options.parse_args()
    rows: list = []
    claims: list[Claim] = []
    only = set(filter(None, given.only.split(","))) or {"shallow", "deep", "cost", "hundred", "budgets"}
    with np.errstate(all="ignore"):
        if "cost" in only:
            cost(claims)
        if "shallow" in only:
            shallow(rows, claims, given.quick)
        if "deep" in only:
            deep(rows, claims, given.quick)
        if "hundred" in only:
            hundred(rows, claims, given.quick)
        if "budgets" in only:
            minutes = 0.0 if given.quick else given.minutes
            budgets(rows, claims, minutes, given.problems.split(","), given.methods.split(","))
    columns = ("problem", "method", "seeds", "steps", "CPU s", "absolute", "relative", "steps to absolute", "published")
    finish("Differential equations, float64, medians", columns, rows, claims, given.json)


if __name__ == "__main__":
    main()
