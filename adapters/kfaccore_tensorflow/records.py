"""Records of one batch, for kfaccore's dense, direction and settle; and a test of what they leave out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

import kfaccore as kf
from kfaccore_tensorflow import draw
from kfaccore_tensorflow.bridge import to_numpy
from kfaccore_tensorflow.capture import tap
from kfaccore_tensorflow.given import of_any_batch, tensor
from kfaccore_tensorflow.heads import output_names, over
from kfaccore_tensorflow.observe import observe
from kfaccore_tensorflow.step import Engine, Settings
from kfaccore_tensorflow.tensors import Pass, Tensors, gathered


def records(
    model: Any, x: Any, y: Any, loss: Any, sample_weight: Any = None, training: bool = False, **settings: Any
) -> dict[str, kf.Record]:
    """One record a part of the model's `coverage`, NumPy arrays; layers the batch does not reach are left out.

    loss, settings    as Optimizer takes them; of the settings fisher, draws, seed, strict and uncovered matter

    Rows that mix examples, or that they share, are positions of one example: for draws that are independent of zero
    mean an example (the others get random signs) the mean of `dense` is right.
    """
    engine = Engine(loss, Settings(**settings), names=output_names(model))
    engine.signs = False
    found = _taken(engine, model, x, (y, sample_weight), training)
    if engine.mixing and engine.fisher in (kf.type2, kf.empirical):
        engine.signs = True
        found = _taken(engine, model, x, (y, sample_weight), training)
    return found


def _taken(engine: Engine, model: Any, x: Any, data: tuple[Any, Any], training: bool) -> dict[str, kf.Record]:
    kept: list[Tensors] = []

    def forward(x: Any, data: Any) -> list[Any]:
        x = tf.nest.map_structure(of_any_batch, x)
        with tf.GradientTape(persistent=True) as tape, tap(model) as scopes:
            f = model(x, training=training)
        engine.objective = over(engine.objective, f)
        heads = engine.objective.heads(f)
        seen = observe(model, list(heads.values()), scopes, x)
        engine.adopt(seen.plan)
        kept.append(gathered(engine, engine.plan.parts, Pass(seen, heads, tape, *data)))
        return kept[-1].flat()

    x, data = tf.nest.map_structure(tensor, (x, data))
    arrays = [to_numpy(t) for t in tf.function(forward, autograph=False)(x, data)]
    taken = draw.recorded(engine, kept[0], arrays, exact=True)
    return {} if taken is None else taken.drawn


def unread(model: Any, x: Any, tolerance: float = 1e-3) -> dict[str, float]:
    """{part: relative error} where records do not add up to the gradient of a random draw, by TensorFlow's own tape.

    A part that is read right is not among them: this is a test of the reading, which needs none in use.
    """
    x = tf.nest.map_structure(tensor, x)
    with tf.GradientTape(persistent=True) as tape:
        f = model(x, training=False)
    asked = _Asked.of(f)
    heads = list(asked.heads(f).values())
    engine = Engine(kf.Gaussian(), Settings(method=kf.Identity()))
    engine.signs = False
    engine.objective = asked
    taken = _taken(engine, model, x, (None, None), False)
    found = {}
    for part in engine.plan.parts:
        zero = tf.UnconnectedGradients.ZERO
        draws = [tf.constant(v, t.dtype) for v, t in zip(asked.v, heads, strict=True)]
        true: Any = tape.gradient(heads, [v.value for v in part.variables.values()], draws, zero)
        whole = part.matrix({role: to_numpy(g) for role, g in zip(part.variables, true, strict=True)})
        summed = np.asarray(taken[part.name].examples()).sum((0, 2))
        error = float(np.linalg.norm(summed - whole) / max(np.linalg.norm(whole), 1e-30))
        if error > tolerance and np.linalg.norm(whole) > 1e-6 * sum(float(tf.norm(v)) for v in draws):
            found[part.name] = error
    return found


@dataclass(frozen=True)
class _Asked:
    """One random draw an output, whatever the loss."""

    v: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, f: Any) -> _Asked:
        rng = np.random.default_rng(0)
        leaves = [t for t in tf.nest.flatten(f) if tf.is_tensor(t)]
        return cls(tuple(rng.standard_normal(tuple(t.shape)).astype(t.dtype.as_numpy_dtype) for t in leaves))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(str(i) for i in range(len(self.v)))

    def heads(self, f: Any) -> dict[str, Any]:
        return dict(zip(self.names, (t for t in tf.nest.flatten(f) if tf.is_tensor(t)), strict=True))

    def by_head(self, x: Any, heads: Any) -> list[Any]:
        return [None] * len(self.v)

    def draws_of(self, fisher: Any, count: int, f: list, told: list, rng: Any) -> list[Any]:
        return [v[None] for v in self.v]

    def share_of(self, f: list, told: list) -> float:
        return 1.0

    def present_of(self, f: list, told: list) -> np.ndarray:
        return np.ones(len(f[0]), bool)

    def drawless(self, fisher: Any) -> bool:
        return False
