"""Are records right, and does `fit` train, on Keras models that nobody here wrote?

Small inputs, random weights. How much of a model has records of its own; on a small form of it, for each part and one
random direction v, v^T F v of type-2 records against brute force, (J v)^T H (J v) of the loss by TensorFlow's own
forward-mode derivative, which knows nothing of records; and 20 steps of `fit` with SelfTuning() on one batch, three
seeds, with the seconds of the first call, which traces the graph, and of a later one. The small forms run without
training, where BatchNormalization does not mix examples.
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from report import Claim, at_least, at_most, claim, finish, parser

import kfaccore as kf
import kfaccore_tensorflow as kt

L = keras.layers
APPS = keras.applications
QUICK = ("ViT", "masked text")
IMAGE = (32, 32, 3)
# EfficientNet halves its image five times: of 32 x 32, its later normalisations are over one value an example, and what
# lowers the loss of 8 examples under one draw of dropped branches (rho is .02) is noise under the next
LARGER = (64, 64, 3)
CLASSES = 5
STEPS = 20


@dataclass(frozen=True)
class Entry:
    """A model as it is used, a small form of it, inputs of so many examples, and how many it is trained on; `losing`
    ones, which docs/loses.md tells of, only where --only is their whole name."""

    whole: Callable[[], Any]
    small: Callable[[], Any]
    inputs: Callable[[np.random.Generator, int], np.ndarray]
    examples: int = 8
    losing: bool = False


def vit(width: int = 48, depth: int = 4) -> Any:
    """Patches of 8 x 8, embedded places, `depth` blocks."""
    image = keras.Input(IMAGE)
    x = L.Reshape((16, width))(L.Conv2D(width, 8, strides=8)(image))
    x = Places(16, width)(x)
    for _ in range(depth):
        y = L.LayerNormalization()(x)
        x = x + L.MultiHeadAttention(3, width // 3)(y, y)
        y = L.Dense(2 * width, "gelu")(L.LayerNormalization()(x))
        x = x + L.Dense(width)(y)
    return keras.Model(image, L.Dense(CLASSES)(L.GlobalAveragePooling1D()(L.LayerNormalization()(x))))


class Places(L.Layer):
    """Adds embedded places."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.count = count
        self.table = L.Embedding(count, width)

    def call(self, x: Any) -> Any:
        return x + self.table(keras.ops.arange(self.count))


def text(width: int = 32, units: int = 0) -> Any:
    """Padded words, their mask, and one attention block, or an LSTM of so many units."""
    ids = keras.Input((12,), dtype="int32")
    x = L.Embedding(50, width, mask_zero=True)(ids)
    if units:
        x = L.LSTM(units)(L.Bidirectional(L.LSTM(units, return_sequences=True))(x))
    else:
        x = L.LayerNormalization()(x)
        x = L.GlobalAveragePooling1D()(L.Dense(width, "tanh")(L.MultiHeadAttention(2, width // 2)(x, x)))
    return keras.Model(ids, L.Dense(CLASSES)(x))


def residual() -> Any:
    """A block of ResNet50V2: normalisation first, strided, with a projection."""
    image = keras.Input((8, 8, 3))
    x = L.Conv2D(6, 3, strides=2, padding="same")(image)
    y = L.ReLU()(L.BatchNormalization()(x))
    y = L.Conv2D(4, 3, padding="same", use_bias=False)(y)
    y = L.Conv2D(6, 1)(L.ReLU()(L.BatchNormalization()(y)))
    return keras.Model(image, L.Dense(CLASSES)(L.GlobalAveragePooling2D()(x + y)))


def inverted() -> Any:
    """A block of EfficientNet: expanded, depthwise, squeezed and excited."""
    image = keras.Input((8, 8, 3))
    x = L.Activation("swish")(L.BatchNormalization()(L.Conv2D(8, 1, use_bias=False)(image)))
    x = L.Activation("swish")(L.BatchNormalization()(L.DepthwiseConv2D(3, padding="same", use_bias=False)(x)))
    s = L.Conv2D(8, 1, activation="sigmoid")(
        L.Conv2D(2, 1, activation="swish")(L.GlobalAveragePooling2D(keepdims=True)(x))
    )
    return keras.Model(image, L.Dense(CLASSES)(L.GlobalAveragePooling2D()(L.Conv2D(4, 1)(x * s))))


def next_block() -> Any:
    """A block of ConvNeXt: depthwise, normalised, widened, scaled."""
    image = keras.Input((8, 8, 3))
    x = L.Conv2D(6, 2, strides=2)(image)
    y = L.LayerNormalization(epsilon=1e-6)(L.DepthwiseConv2D(3, padding="same")(x))
    y = Gain()(L.Dense(6)(L.Dense(24, "gelu")(y)))
    return keras.Model(image, L.Dense(CLASSES)(L.GlobalAveragePooling2D()(x + y)))


class Gain(L.Layer):
    """ConvNeXt's gain of each channel."""

    def build(self, shape: Any) -> None:
        self.gain = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, x: Any) -> Any:
        return x * self.gain


def application(name: str, image: tuple[int, ...] = IMAGE) -> Callable[[], Any]:
    """One of keras.applications with random weights, on small images, without a softmax."""
    options = {"weights": None, "classes": CLASSES, "classifier_activation": None, "input_shape": image}
    return lambda: getattr(APPS, name)(**options)


def pictures(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.normal(size=(count, *IMAGE))


def larger(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.normal(size=(count, *LARGER))


def little(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.normal(size=(count, 8, 8, 3))


def padded(rng: np.random.Generator, count: int) -> np.ndarray:
    ids = rng.integers(1, 50, (count, 12))
    ids[::2, 7:] = 0
    return ids


ZOO = {
    "ResNet50V2": (Entry(application("ResNet50V2"), residual, pictures), little),
    "EfficientNetB0": (Entry(application("EfficientNetB0", LARGER), inverted, larger, 16), little),
    "EfficientNetB0 at 32": (Entry(application("EfficientNetB0"), inverted, pictures, losing=True), little),
    "ConvNeXtTiny": (Entry(application("ConvNeXtTiny"), next_block, pictures), little),
    "ViT": (Entry(vit, lambda: vit(6, 1), pictures), pictures),
    "masked text": (Entry(text, lambda: text(6), padded), padded),
    "LSTM": (Entry(lambda: text(32, 24), lambda: text(4, 3), padded), padded),
}


def share(model: Any) -> tuple[float, int]:
    """Elements with records of their own over all, and the parts that have them."""
    plan = kt.coverage(model)
    covered = {id(v): v for part in plan.parts for v in part.variables.values()}
    every = sum(math.prod(v.shape) for v in model.trainable_variables)
    return sum(math.prod(v.shape) for v in covered.values()) / every, len(plan.parts)


def error(model: Any, x: np.ndarray, y: np.ndarray) -> float:
    """Largest relative error of v^T F v over the parts, against the loss's own second derivative."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    records = kt.records(model, x, y, loss, fisher=kf.type2)
    rng = np.random.default_rng(1)
    given = tf.constant(x)
    p = tf.nn.softmax(model(given, training=False)).numpy()
    pairs = []
    for part in kt.coverage(model).parts:
        record = records[part.name]
        if record.batch != len(p):  # rows that examples share: right in the mean over draws only
            continue
        v = {role: rng.normal(size=u.shape) for role, u in part.variables.items()}
        got = want = 0.0
        matrix = part.matrix(v)
        for block in range(record.blocks):  # F of the layer is block-diagonal over these
            only = np.zeros_like(matrix)
            only[block] = matrix[block]
            along = {role: tf.constant(a) for role, a in part.arrays(only).items()}
            variables = [u.value for u in part.variables.values()]
            with tf.autodiff.ForwardAccumulator(variables, [along[role] for role in part.variables]) as forward:
                f = model(given, training=False)
            u = forward.jvp(f).numpy()
            want += float(np.sum(p * u * u) - np.sum(np.sum(p * u, -1) ** 2)) / len(p)
            got += (
                float(np.sum(np.einsum("dboi,oi->db", np.asarray(record.examples())[:, block], matrix[block]) ** 2))
                / record.n
            )
        pairs.append((got, want))
    largest = max(want for _, want in pairs)
    return max(abs(got - want) / max(want, 1e-9 * largest) for got, want in pairs)


@dataclass(frozen=True)
class Run:
    """What 20 steps of `fit` on one batch gave: the seconds of the first call, which traces, and of a later step (a
    median), and of each seed the first and last loss."""

    first: float
    later: float
    losses: list[tuple[float, float]]
    finite: bool

    def falling(self) -> int:
        """Seeds on which the loss is finite throughout and ends below the first."""
        return sum(last < first for first, last in self.losses) if self.finite else 0


def run(make: Callable[[], Any], x: np.ndarray, y: np.ndarray, seeds: int) -> Run:
    """One trace serves all seeds, whose weights and curvature begin anew."""
    seconds: list[float] = []
    every: list[list[float]] = []
    keras.utils.set_random_seed(0)
    model = kt.KFACModel(make(), step=kf.SelfTuning())
    model.compile(keras.optimizers.SGD(1.0), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    for seed in range(seeds):
        keras.utils.set_random_seed(seed)
        model.inner.set_weights(make().get_weights())
        if model.engine is not None:
            like = np.zeros(1, "float32")
            model.engine.state = model.engine.preconditioner.init(model.engine.plan.blocks(), like)
        losses = []
        for _ in range(STEPS):
            begun = time.perf_counter()
            losses += model.fit(x, y, batch_size=len(x), shuffle=False, verbose=0).history["loss"]
            seconds.append(time.perf_counter() - begun)
        every.append(losses)
    finite = all(math.isfinite(loss) for losses in every for loss in losses)
    return Run(seconds[0], float(np.median(seconds[1:])), [(losses[0], losses[-1]) for losses in every], finite)


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--only", help="models whose name has this in it")
    asked.add_argument("--seeds", type=int, default=3)
    given = asked.parse_args()
    begun = time.perf_counter()
    worked = time.process_time()
    rows: list[list[Any]] = []
    claims: list[Claim] = []
    for name, (entry, little_inputs) in ZOO.items():
        unasked = given.only != name if entry.losing else bool(given.only) and given.only not in name
        if unasked or (given.quick and name not in QUICK):
            continue
        rng = np.random.default_rng(0)
        covered, parts = share(entry.whole())
        keras.config.set_dtype_policy("float64")
        keras.config.set_floatx("float64")
        found = error(entry.small(), little_inputs(rng, 3), rng.integers(0, CLASSES, 3))
        keras.config.set_dtype_policy("float32")
        keras.config.set_floatx("float32")
        x = entry.inputs(rng, entry.examples)
        x = x.astype(np.float32) if x.dtype.kind == "f" else x
        y = rng.integers(0, CLASSES, entry.examples)
        seeds = 1 if given.quick else given.seeds
        ran = run(entry.whole, x, y, seeds)
        good = ran.falling()
        ends = ", ".join(f"{first:.3g} to {last:.3g}" for first, last in ran.losses)
        shown = [f"{100 * covered:.2f} %", f"{found:.1g}", f"{ran.first:.1f}", f"{ran.later:.2f}"]
        rows.append([name, parts, *shown, f"{good} of {seeds}: {ends}"])
        claims.append(at_least(f"{name}: share of elements with records of their own", covered, 0.99))
        claims.append(at_most(f"{name}: error of type-2 records on a small form", found, 1e-8))
        claims.append(claim(f"{name}: seeds on which fit brings the loss down", f"{good}", "all", good == seeds))
        if not given.json:
            so_far = f"{time.perf_counter() - begun:.0f} s, {time.process_time() - worked:.0f} s of processor"
            print(*rows[-1], so_far, flush=True)
    claims.append(at_most("minutes in all", (time.perf_counter() - begun) / 60, 30))
    claims.append(at_most("minutes of processor in all", (time.process_time() - worked) / 60, 30))
    finish(
        "Keras models nobody here wrote",
        ("model", "parts", "covered", "error", "first step s", "later s", "20 steps, loss"),
        rows,
        claims,
        given.json,
    )


if __name__ == "__main__":
    main()
