"""Do the costs that `kfaccore advise` plans with come true? Bytes and seconds a step at clocks 1/5, per method.

Predicted from one record a layer; measured as a Preconditioner over all layers of the digits autoencoder.
"""

import os

for _name in ("OMP", "OPENBLAS", "MKL"):
    os.environ[f"{_name}_NUM_THREADS"] = "1"

import statistics
import time

import numpy as np
from report import arguments, at_most, finish

import kfaccore as kf
import kfaccore_numpy as kn
from kfaccore import tree
from kfaccore.analysis import compare

TASK = kn.TASKS["digits-autoencoder"]
METHODS = {"kfac": kf.KFAC(), "ekfac": kf.EKFAC(), "diagonal": kf.Diagonal()}
CYCLE = 5


def batch() -> tuple[dict[str, kf.Record], dict[str, np.ndarray]]:
    """Records and gradients of one batch at the start of training."""
    x, params = TASK.load()[0][0][: TASK.batch], TASK.network.init(np.random.default_rng(0))
    f, tape = TASK.network.forward(params, x)
    g = TASK.network.backward(params, tape, TASK.loss.gradient(f, x))
    n = float(len(x))
    return TASK.network.records(tape, g, n), TASK.network.gradients(tape, g, n, factored=False)


def measured(method: object, records: dict, grads: dict, cycles: int) -> tuple[int, float]:
    """(bytes of the layers' states, seconds a step: medians of steps with and without a refresh, weighted)."""
    pre = kf.Preconditioner(method, clocks=kf.Clocks(1, CYCLE))
    state, times = pre.init(TASK.network.blocks(), next(iter(grads.values()))), {True: [], False: []}
    for _ in range(CYCLE * cycles):
        start = time.perf_counter()
        _, state, info = pre.step(state, records, grads)
        times[info.refreshed].append(time.perf_counter() - start)
    seconds = (statistics.median(times[True]) + (CYCLE - 1) * statistics.median(times[False])) / CYCLE
    return sum(np.asarray(leaf).nbytes for leaf in tree.leaves(state.layers)), seconds


def main() -> None:
    """Run, print, exit 1 if a claim falls short."""
    options = arguments(__doc__)
    records, grads = batch()
    figures = compare(records, METHODS, grads, repeats=5 if options.quick else 15)
    rows, claims = [], []
    for name, method in METHODS.items():
        mine = [f for f in figures if f.method == name]
        size, seconds = measured(method, records, grads, 5 if options.quick else 25)
        planned = sum(f.bytes for f in mine), sum(f.per_step(1, CYCLE) for f in mine)
        rows.append([name, planned[0], size, planned[1] * 1e3, seconds * 1e3])
        claims.append(at_most(f"{name}: planned bytes off by, %", 100 * abs(planned[0] / size - 1), 5.0))
        claims.append(at_most(f"{name}: planned seconds off by, %", 100 * abs(planned[1] / seconds - 1), 30.0))
    columns = ("method", "planned bytes", "bytes", "planned ms a step", "ms a step")
    finish("advise, planned against measured", columns, rows, claims, options.json)


if __name__ == "__main__":
    main()
