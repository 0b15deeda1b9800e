"""What a K-FAC step costs inside Keras `fit`, in steps of plain SGD in `fit`: CPU, float32, one thread.

Times are of whole epochs of `fit` in graph mode, so Keras's own overhead is in both. Kinds of step: plain (directions
only), Monte-Carlo (records measured too) and with a refresh of every inverse; clocks u/r are their mean. `bare` is the
plain step of Identity(): what reading the layers and crossing to NumPy and back cost without any curvature. Keras
compiles plain `fit` with XLA where it can; a step that leaves TensorFlow for the core cannot be, so SGD without XLA is
shown too. The first step traces the graph: its CPU seconds stand beside those of plain SGD. OPENBLAS_CORETYPE, which
would force the kernels of NumPy's side only, is dropped.
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.update(TF_NUM_INTRAOP_THREADS="1", TF_NUM_INTEROP_THREADS="1", CUDA_VISIBLE_DEVICES="-1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
FORCED = os.environ.pop("OPENBLAS_CORETYPE", None)

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
from report import Claim, arguments, at_most, finish, interleaved, kernels

import kfaccore as kf
import kfaccore_tensorflow as kt

L = keras.layers
STEPS = {"autoencoder": 5, "cnn": 10, "transformer": 15}
ROWS = ("autoencoder", "cnn", "transformer")


@dataclass(frozen=True)
class Task:
    """A fresh model, its loss and one batch."""

    model: Callable[[], Any]
    loss: Any
    batch: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]


def autoencoder() -> Any:
    """The classic deep one, 784-1000-500-250-30 and back."""
    sizes = (1000, 500, 250, 30, 250, 500, 1000)
    layers = [L.Dense(size, "linear" if size == 30 else "tanh") for size in sizes]
    return keras.Sequential([keras.Input((784,)), *layers, L.Dense(784)])


def cnn() -> Any:
    """Three convolutions on 32 x 32 colour images."""
    image = keras.Input((32, 32, 3))
    x = L.Conv2D(32, 3, padding="same", activation="relu")(image)
    x = L.Conv2D(64, 3, strides=2, padding="same", activation="relu")(x)
    x = L.Conv2D(64, 3, strides=2, padding="same", activation="relu")(x)
    return keras.Model(image, L.Dense(10)(L.GlobalAveragePooling2D()(x)))


def transformer() -> Any:
    """Two blocks of width 128 over 32 tokens of 256 kinds."""
    ids = keras.Input((32,), dtype="int32")
    x = L.Embedding(256, 128)(ids)
    for _ in range(2):
        y = L.LayerNormalization()(x)
        x = x + L.MultiHeadAttention(4, 32)(y, y)
        x = x + L.Dense(128)(L.Dense(512, "gelu")(L.LayerNormalization()(x)))
    return keras.Model(ids, L.Dense(256)(x))


CROSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
TASKS = {
    "autoencoder": Task(autoencoder, keras.losses.MeanSquaredError(), lambda rng: (x := rng.random((512, 784)), x)),
    "cnn": Task(cnn, CROSS, lambda rng: (rng.random((64, 32, 32, 3)), rng.integers(0, 10, 64))),
    "transformer": Task(
        transformer, CROSS, lambda rng: (rng.integers(0, 256, (32, 32)), rng.integers(0, 256, (32, 32)))
    ),
}
KINDS = {
    "bare": (kf.Identity(), kf.Clocks(10**6, 10**6)),
    "plain": (kf.KFAC(), kf.Clocks(10**6, 10**6)),
    "mc": (kf.KFAC(), kf.Clocks(1, 10**6)),
    "refresh": (kf.KFAC(), kf.Clocks(1, 1)),
}


def epochs(task: Task, steps: int) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """One epoch of `fit` of plain SGD, Adam and each kind of step, at rate 0, and the seconds of each one's first step,
    with what it traces."""
    x, y = task.batch(np.random.default_rng(0))
    x, y = (np.concatenate([v.astype("f4") if v.dtype.kind == "f" else v] * steps) for v in (x, y))
    size = len(x) // steps
    found: dict[str, Callable[[], Any]] = {}
    first: dict[str, float] = {}

    def add(kind: str, model: Any, optimizer: Any, **options: Any) -> None:
        model.compile(optimizer, task.loss, **options)
        begun = time.process_time()
        model.fit(x[:size], y[:size], batch_size=size, verbose=0)  # step 0 refreshes whatever the clocks
        first[kind] = time.process_time() - begun

        def run() -> None:
            if isinstance(model, kt.KFACModel) and model.engine is not None:
                model.engine.state = replace(model.engine.state, step=1)
            model.fit(x, y, batch_size=size, epochs=1, shuffle=False, verbose=0)

        found[kind] = run

    add("sgd", task.model(), keras.optimizers.SGD(0.0))
    add("adam", task.model(), keras.optimizers.Adam(0.0))
    add("no xla", task.model(), keras.optimizers.SGD(0.0), jit_compile=False)
    for kind, (method, clocks) in KINDS.items():
        settings = {"method": method, "clocks": clocks, "schedules": kf.Schedules(damping=1e-2)}
        add(kind, kt.KFACModel(task.model(), **settings), keras.optimizers.SGD(0.0))
    return found, first


def own_loop(task: Task, repeats: int) -> float:
    """Steps of `Optimizer` at 10/100 over steps of Keras's own train_on_batch with SGD."""
    x, y = task.batch(np.random.default_rng(0))
    x = x.astype("f4") if x.dtype.kind == "f" else x
    plain, model = task.model(), task.model()
    plain.compile(keras.optimizers.SGD(0.0), task.loss)
    settings = {"clocks": kf.Clocks(10, 100), "schedules": kf.Schedules(damping=1e-2)}
    ours = kt.Optimizer(model, task.loss, keras.optimizers.SGD(0.0), **settings)
    ours.step(x, y)

    def run() -> None:
        ours.engine.state = replace(ours.engine.state, step=91)
        for _ in range(20):
            float(ours.step(x, y))

    pair = {"sgd": lambda: [plain.train_on_batch(x, y) for _ in range(20)], "ours": run}
    t = interleaved(pair, repeats)
    return t["ours"] / t["sgd"]


def amortised(t: dict[str, float], update: int, refresh: int) -> float:
    """Mean cost over SGD of clocks update/refresh from the kinds of step."""
    total = t["refresh"] / refresh + (1 / update - 1 / refresh) * t["mc"] + (1 - 1 / update) * t["plain"]
    return total / t["sgd"]


def main() -> None:
    options = arguments(__doc__)
    repeats, share = (2, 2) if options.quick else (5, 1)
    names = ("cnn", "transformer") if options.quick else ROWS
    rows, cost = [], {}
    for name in names:
        timed, first = epochs(TASKS[name], STEPS[name] // share)
        t = interleaved(timed, repeats)
        cost[name] = {"bare": t["bare"] / t["sgd"], **{c: amortised(t, *c) for c in ((10, 100), (1, 10))}}
        ratios = (t[k] / t["sgd"] for k in ("adam", "no xla", *KINDS))
        shown = [cost[name][10, 100], cost[name][1, 10], first["sgd"], first["refresh"]]
        rows.append([name, 1e3 * t["sgd"] / (STEPS[name] // share), *ratios, *shown])
    claims: list[Claim] = []
    for name, fast, slow in (("autoencoder", 2.2, 5.0), ("cnn", 2.5, 6.0), ("transformer", 2.5, 6.0)):
        found = cost.get(name, {})
        claims += [
            at_most(f"{name} at 10/100 in fit, x SGD in fit", found.get((10, 100)), fast),
            at_most(f"{name} at 1/10 in fit, x SGD in fit", found.get((1, 10)), slow),
        ]
    loop = None if options.quick else own_loop(TASKS["transformer"], repeats)
    claims.append(at_most("transformer, own loop over a refresh at 10/100, x train_on_batch with SGD", loop, 3.0))
    claims.append(kernels(FORCED))
    columns = ("network", "sgd ms", "adam", "no xla", *KINDS, "10/100", "1/10", "sgd first s", "first s")
    finish("A step in Keras fit over an SGD step in Keras fit", columns, rows, claims, options.json)


if __name__ == "__main__":
    main()
