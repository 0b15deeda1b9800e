"""How near is each method's block to the exact one along a training run, and what does its update cost?

Relative Frobenius errors of fresh factors (no averages, no damping, iterations run until they stand) on records of 256
examples and one Monte-Carlo draw, along Adam runs: the digits autoencoder, and the published network (ReLU, Bernoulli)
on generated curves, a stand-in for its data. Layers of at most 2,200 weights. The error needs no dense block: ||F||^2
is that of the Gram matrix of the per-example gradients, the cross term a product with each of them. The picture goes to
runs/block_quality.png where matplotlib is installed. Update costs are of the classic autoencoder, batch 512, float32.
"""

import os

for _name in ("OMP", "OPENBLAS", "MKL"):
    os.environ[f"{_name}_NUM_THREADS"] = "1"

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from report import Claim, arguments, at_most, finish, interleaved

import kfaccore as kf
import kfaccore_numpy as kn
from kfaccore.methods import CATALOGUE
from kfaccore_numpy.tasks import autoencoder
from kfaccore_numpy.train import Batch

HYPER = kf.Hyper(0, 0.0, 0.1)
RATE, BATCH, LARGEST = 1e-3, 256, 2200
PUBLISHED = {"kfac": ".35-.5", "kpsvd": ".09-.12", "kfac-corrected": ".10-.12", "deflation": "<=.08"}
ORDERED = [  # never further than
    ("kpsvd", "kfac"),
    ("kpsvd", "tkfac"),
    ("ekfac", "kfac"),
    ("tekfac", "tkfac"),
    ("kfac-corrected", "kfac"),
    ("lanczos", "kpsvd"),
]
CURVES = (784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784)
CLASSIC = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
Curves = dict[str, dict[str, list[float]]]  # errors by layer and method, one a checkpoint


def published() -> kn.Task:
    """The network whose plateaus were published, on generated curves."""
    layers = [layer for size in CURVES[1:-1] for layer in (kn.Dense(size), kn.ReLU())]
    network = kn.Sequential((CURVES[0],), (*layers, kn.Dense(CURVES[-1])))
    return replace(kn.TASKS["curves-autoencoder"], network=network, loss=kf.Bernoulli())


def checkpoints(task: kn.Task, steps: list[int]) -> Any:
    """(step, float64 records of one fixed batch) along an Adam run."""
    (x, y), _ = task.load()
    params = task.network.init(np.random.default_rng(0))
    probe = np.random.default_rng(1).integers(0, len(x), BATCH)
    done, state = 0, None
    for step in steps:
        adam = kn.Adam(RATE)
        for p in kn.fit(
            task.network, params, (x, y), task.loss, adam, batch=BATCH, steps=step, state=state, start=done
        ):
            state = p.state
        done = step
        f, tape = task.network.forward(params, x[probe])
        batch = Batch(f, y[probe], task.loss)
        g = kn.sampled(task.network, params, tape, batch, {}, np.random.default_rng(step))
        yield step, task.network.records(tape, g, float(BATCH))


def small(record: kf.Record) -> kf.Record | None:
    """The record in float64, where its block is small enough."""
    if record.d_out * record.d_in > LARGEST:
        return None
    return kf.Record(record.a.astype(np.float64), record.g.astype(np.float64), record.n)


class Exact:
    """What the error against one record's block needs: its gradients J and ||F||^2."""

    def __init__(self, record: kf.Record) -> None:
        self.J = record.examples().reshape(-1, record.d_out, record.d_in)
        self.n = record.n
        flat = self.J.reshape(len(self.J), -1)
        self.norm2 = float(np.sum((flat @ flat.T / self.n) ** 2))

    def error(self, method: Any, state: Any) -> float:
        """||F~ - F|| / ||F||, ||F~||^2 from its products with the unit vectors, in chunks."""
        cross = float(np.sum(self.J * method.matvec(state, self.J, HYPER))) / self.n
        size = self.J[0].size
        own = 0.0
        for start in range(0, size, 512):
            unit = np.eye(min(512, size - start), size, start).reshape(-1, *self.J.shape[1:])
            own += float(np.sum(method.matvec(state, unit, HYPER) ** 2))
        return max(0.0, (self.norm2 - 2 * cross + own) / self.norm2) ** 0.5


def fitted(method: Any, record: kf.Record, exact: Exact) -> float:
    """Error of fresh factors; an iteration goes on until 20 sweeps move its error by less than 1e-8 of it."""
    if method.cycles == 1:
        return exact.error(method, kf.settle(method, record))
    state, last = method.init(kf.Block.of(record), record.g), np.inf
    for turn in range(1, 2001):
        state = method.update(state, method.measure(state, record, HYPER), HYPER)
        if turn % 20 == 0:
            error = exact.error(method, state)
            if abs(error - last) <= 1e-8 * error:
                break
            last = error
    return last


def dense_methods() -> dict[str, Any]:
    """The catalogue without the exact block and the identity, and without methods that have no F~ of their own."""
    record = kf.Record(np.eye(3), np.ones((3, 2)), 3.0)
    found = {}
    for name, make in CATALOGUE.items():
        if name in ("exact", "identity"):
            continue
        try:
            method = make()
            method.matvec(kf.settle(method, record), np.ones((1, 2, 3)), HYPER)
        except (NotImplementedError, TypeError, ValueError) as why:
            print(f"{name} gives no dense block: {why}", file=sys.stderr)
        else:
            found[name] = method
    return found


def along(task: kn.Task, steps: list[int], methods: dict[str, Any]) -> Curves:
    """Error curves of every small layer of a task."""
    found: Curves = {}
    for _, records in checkpoints(task, steps):
        for layer, given in reversed(records.items()):
            record = small(given)
            if record is None:
                continue
            exact, curves = Exact(record), found.setdefault(layer, {m: [] for m in methods})
            for label, method in methods.items():
                curves[label].append(fitted(method, record, exact))
    return found


def violations(curves: list[Curves]) -> dict[str, int]:
    """How often each ordering fails, with a slack of 1e-6."""
    count = dict.fromkeys((f"{low} <= {high}" for low, high in ORDERED), 0)
    for found in curves:
        for layer in found.values():
            for low, high in ORDERED:
                pairs = zip(layer[low], layer[high], strict=True)
                count[f"{low} <= {high}"] += sum(x > y * (1 + 1e-6) for x, y in pairs)
    return count


def picture(found: dict[str, Curves], steps: dict[str, list[int]]) -> None:
    """A panel a layer, error against step."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(task, layer) for task, curves in found.items() for layer in curves]
    figure, axes = plt.subplots(2, -(-len(panels) // 2), figsize=(16, 7), sharey=True, layout="constrained")
    for axis, (task, layer) in zip(axes.flat, panels, strict=False):
        for label, errors in found[task][layer].items():
            axis.plot(steps[task], errors, label=label, marker=".")
        axis.set(title=f"{task}, {layer}", xlabel="step", yscale="log", ylabel="relative Frobenius error")
        axis.grid(alpha=0.3, which="both")
    axes.flat[0].legend(frameon=False, fontsize="small")
    path = Path("runs/block_quality.png")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


def update_costs(methods: dict[str, Any], repeats: int) -> dict[str, float]:
    """Measure and update of every layer of the classic autoencoder over K-FAC's; Lanczos is not one sweep: left out."""
    rng = np.random.default_rng(0)
    network = autoencoder(CLASSIC)
    params, x = network.init(rng), rng.uniform(size=(512, CLASSIC[0])).astype(np.float32)
    f, tape = network.forward(params, x)
    batch = Batch(f, x, kf.Gaussian())
    records = network.records(tape, kn.sampled(network, params, tape, batch, {}, rng), 512.0)
    hyper, functions = kf.Hyper(0, 0.95, 0.1), {}
    for name, method in methods.items():
        if name in ("lanczos", "diagonal"):
            continue
        states = {layer: method.init(kf.Block.of(r), r.g) for layer, r in records.items()}

        def update(method: Any = method, states: dict[str, Any] = states) -> None:
            for layer, r in records.items():
                states[layer] = method.update(states[layer], method.measure(states[layer], r, hyper), hyper, True)

        functions[name] = update
    times = interleaved(functions, repeats)
    return {name: seconds / times["kfac"] for name, seconds in times.items()}


def main() -> None:
    options = arguments(__doc__)
    methods = dense_methods()
    tasks, steps = {"digits": kn.TASKS["digits-autoencoder"]}, {"digits": [0, 5, 10, 20, 40, 80, 160, 280, 400]}
    if options.quick:
        steps["digits"] = [0, 20, 100]
    else:
        tasks["curves"], steps["curves"] = published(), [0, 10, 20, 40, 80, 120, 160, 240, 320, 400]
    found = {name: along(tasks[name], at, methods) for name, at in steps.items()}
    picture(found, steps)
    rows = []
    for task, curves in found.items():
        for layer, errors in curves.items():
            late = {m: float(np.mean(e[len(e) // 2 :])) for m, e in errors.items()}
            rows.append([task, layer, *late.values()])
    rows.append(["published plateaus", "index 4: dense8", *(PUBLISHED.get(m, "-") for m in methods)])
    costs = update_costs(methods, 5 if options.quick else 15)
    rows.append(["update over K-FAC's", "classic, 512", *(costs.get(m, "-") for m in methods)])
    claims: list[Claim] = [
        at_most(f"{order} violated", float(count), 0) for order, count in violations(list(found.values())).items()
    ]
    layers = [errors for curves in found.values() for errors in curves.values()]
    pairs = [pair for errors in layers for pair in zip(errors["deflation"], errors["lanczos"], strict=True)]
    claims.append(at_most("deflation and lanczos apart by", max(abs(d - z) for d, z in pairs), 1e-6))
    claims.append(at_most("TKFAC's update over K-FAC's", costs["tkfac"], 1.15))
    claims.append(at_most("KPSVD's warm sweep over K-FAC's update", costs["kpsvd"], 3))
    title = "Relative Frobenius error of the block, mean over the second half of the checkpoints"
    finish(title, ["run", "layer", *methods], rows, claims, options.json)


if __name__ == "__main__":
    main()
