"""Records of one batch, for kfaccore's dense, direction and settle; and a test of what they leave out."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

import kfaccore as kf
from kfaccore_tensorflow.bridge import to_numpy
from kfaccore_tensorflow.engine import Engine, Settings, record, unpacked
from kfaccore_tensorflow.kinds import own
from kfaccore_tensorflow.plan import coverage
from kfaccore_tensorflow.tap import tap


def records(
    model: Any, x: Any, y: Any, loss: Any, sample_weight: Any = None, training: bool = False, **settings: Any
) -> dict[str, kf.Record]:
    """One record a part of the model's `coverage`, NumPy arrays; layers the batch does not reach are left out.

    loss, settings    as Optimizer takes them; of the settings fisher, draws, seed and strict matter
    """
    engine = Engine(model, loss, Settings(**settings))
    with tf.GradientTape(persistent=True) as tape, tap(engine.plan) as calls:
        f = model(x, training=training)
    data = (tf.convert_to_tensor(y), sample_weight)
    parts, count, tensors = engine.captured(engine.plan.parts, tape, calls, f, data)
    arrays = iter([to_numpy(t) for t in tensors])
    return unpacked(parts, [part.times(calls) for part in parts], to_numpy(count), arrays) or {}


def unread(model: Any, x: Any, tolerance: float = 1e-3) -> dict[str, float]:
    """{part: relative error} where records do not add up to the gradient: a variable is used outside its layer's call.

    Logits by the transpose of an embedding, say. Leave such parts to Identity(), whatever else the method.
    """
    plan = coverage(model, strict=False)
    with tf.GradientTape(persistent=True) as tape, tap(plan) as calls:
        f = model(x, training=False)
    zero = tf.UnconnectedGradients.ZERO
    draw = tf.constant(np.random.default_rng(0).standard_normal(tuple(f.shape)), f.dtype)
    found = {}
    for part in plan.parts:
        seen = [call for layer in part.layers for call in calls[id(layer)]]
        outputs: Any = tape.gradient([f], [o for _, o in seen], [draw], zero)
        rows = [(to_numpy(x), to_numpy(g)[None]) for (x, _), g in zip(seen, outputs, strict=True)]
        true: Any = tape.gradient([f], list(part.variables.values()), [draw], zero)
        whole = part.matrix({role: to_numpy(g) for role, g in zip(part.variables, true, strict=True)})
        summed = own(record(part, rows, 1.0).examples()).sum((0, 2)) if rows else 0.0
        error = float(np.linalg.norm(summed - whole) / max(np.linalg.norm(whole), 1e-30))
        if error > tolerance and np.linalg.norm(whole) > 1e-6 * np.linalg.norm(draw):
            found[part.name] = error
    return found
