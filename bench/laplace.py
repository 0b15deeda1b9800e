"""What do a Laplace posterior's predictions and its tuned prior cost, and what is the prior worth?

The GLM predictive of an MLP on 1,000 inputs and the exact tuning of its precisions, against the fit; claims against
laplace-torch are not run where it is not installed (the extra `rivals`). Precisions tuned online from l2 1e-4, against
a grid of fixed ones, on digits.
"""

import os

for _name in ("OMP", "OPENBLAS", "MKL"):
    os.environ[f"{_name}_NUM_THREADS"] = "1"

import resource
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from posterior_rivals import laplace_torch
from report import arguments, at_most, finish

import kfaccore as kf
import kfaccore_numpy as kn
from kfaccore.posterior import probit

LOSS = kf.SoftmaxCrossEntropy()
MLP = kn.Sequential((784,), (kn.Dense(256), kn.ReLU(), kn.Dense(256), kn.ReLU(), kn.Dense(10)))
SMALL = kn.Sequential((64,), (kn.Dense(32), kn.ReLU(), kn.Dense(10)))
GRID = tuple(10.0**-k for k in range(7))


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of one call, and what it gave."""
    start = time.process_time()
    found = function()
    return time.process_time() - start, found


def costs(count: int) -> dict[str, float]:
    """CPU seconds of the fit, the tuning and the predictions."""
    rng = np.random.default_rng(0)
    params = MLP.init(rng)
    x = rng.normal(size=(count, 784)).astype(np.float32)
    data = [(x[i : i + 250], rng.integers(0, 10, len(x[i : i + 250]))) for i in range(0, count, 250)]
    fit, curvature = seconds(lambda: kf.fit(kf.KFAC(), kn.Stream(MLP, params, LOSS, data, kf.type2)))
    tune, (P, _) = seconds(lambda: kf.tuned(kf.Posterior(params, curvature, 1.0, count)))

    def predicted() -> list[np.ndarray]:
        pairs = zip(data, kn.outputs(MLP, params, data), strict=True)
        return [probit(MLP.forward(params, x)[0], P.covariance(records)) for (x, _), records in pairs]

    found = {"fit": fit, "tuning three precisions": tune, "probit": seconds(predicted)[0]}
    theirs = laplace_torch(x, np.concatenate([y for _, y in data]))
    return found | {f"laplace-torch: {name}": took for name, took in theirs.items()}


def digits() -> tuple[tuple, tuple]:
    """400 training examples with a tenth of the labels random, and the rest."""
    x, y = kn.tasks.digits()
    rng = np.random.default_rng(0)
    order = rng.permutation(len(x))
    labels = y.copy()
    wrong = order[:400][rng.random(400) < 0.1]
    labels[wrong] = rng.integers(0, 10, len(wrong))
    return (x[order[:400]], labels[order[:400]]), (x[order[400:]], y[order[400:]])


def accuracy(l2: float, online: bool, rounds: int, steps: int = 20) -> float:
    """Of the test set after rounds of full-batch steps; online: precisions tuned between two rounds."""
    data, held = digits()
    params = SMALL.init(np.random.default_rng(0))
    pre = kf.Preconditioner(kf.KFAC(), schedules=kf.Schedules(l2=l2), step=kf.SelfTuning())
    task = kn.Task(SMALL, LOSS, digits, len(data[0]), rounds * steps, {})
    run = kn.Online(pre, task, l2, steps)
    taken = (
        run.fit(params, data, steps=task.steps)
        if online
        else kn.fit(SMALL, params, data, LOSS, pre, batch=task.batch, steps=task.steps)
    )
    last = params
    for progress in taken:
        last = progress.params
    return float((SMALL.forward(last, held[0])[0].argmax(1) == held[1]).mean())


def online_cost(steps: int) -> dict[str, float]:
    """CPU seconds of a CNN's training with penalties tuned every epoch, by how positions are shared; best of five,
    by turns."""
    task = kn.TASKS["digits-cnn"]
    data, _ = task.load()

    def trained(method: kf.KFAC) -> None:
        params = task.network.init(np.random.default_rng(0), lambda w: w.astype(np.float32))
        run = kn.Online(kf.Preconditioner(method, step=kf.SelfTuning(), donate=True), task, 1e-4, 6)
        for _ in run.fit(params, data, steps=steps):
            pass

    kinds = {"expand": kf.KFAC(), "reduce": kf.KFAC(sharing=kf.reduce)}
    turns = [{name: seconds(partial(trained, method))[0] for name, method in kinds.items()} for _ in range(5)]
    return {name: min(turn[name] for turn in turns) for name in kinds}


def main() -> None:
    args = arguments(__doc__)
    found = costs(250 if args.quick else 1000)
    rows: list[tuple] = [(f"{name} [CPU s]", value) for name, value in found.items()]
    rows.append(("peak MiB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))

    def over(mine: str, theirs: str) -> float | None:
        other = found.get(f"laplace-torch: {theirs}")
        return found[mine] / other if other else None

    rounds = 3 if args.quick else 15
    grid = {l2: accuracy(l2, False, rounds) for l2 in (GRID[2:4] if args.quick else GRID)}
    online = accuracy(1e-4, True, rounds)
    rows += [(f"test accuracy at l2 {l2:g}", value) for l2, value in grid.items()]
    rows.append(("test accuracy, l2 tuned online", online))
    shared = online_cost(7 if args.quick else 25)
    rows += [(f"CNN trained with --tune-l2, {name} [CPU s]", value) for name, value in shared.items()]
    claims = [
        at_most(
            "online tuning of a CNN: reduce over expand",
            None if args.quick else shared["reduce"] / shared["expand"],
            1.0,
        ),
        at_most("fit: seconds over laplace-torch's", over("fit", "fit"), 1.0),
        at_most("GLM probit: seconds over laplace-torch's", over("probit", "probit"), 1 / 200),
        at_most("tuning the prior: seconds over laplace-torch's", over("tuning three precisions", "tuning"), 1.0),
        at_most("tuning: seconds over the fit's", found["tuning three precisions"] / found["fit"], 1.0),
        at_most("best of the grid minus online", None if args.quick else max(grid.values()) - online, 0.015),
    ]
    finish("laplace", ("what", "figure"), rows, claims, args.json)


if __name__ == "__main__":
    main()
