"""Records of one batch, for analysis: kfaccore's dense, direction and settle take them from here."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

import kfaccore as kf
from kfaccore_tensorflow.bridge import to_numpy
from kfaccore_tensorflow.engine import Engine, Settings, unpacked
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
