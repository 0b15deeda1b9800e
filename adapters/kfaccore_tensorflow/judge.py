"""Steps that set their own rate: updates are applied as they are, then judged by the loss of their own batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from kfaccore_tensorflow.engine import Engine


class Judge:
    """Asks the core what share of a step stays; `value(x, y, weight)` is the loss of a batch, another forward.

    A model that draws at random while it trains, as dropout does, is judged under other draws than it was stepped with.
    """

    def __init__(self, engine: Engine, value: Callable[[Any, Any, Any], Any]) -> None:
        self.engine = engine
        self.value = tf.function(value, reduce_retracing=True, autograph=False)

    def __call__(self, before: Any, data: tuple[Any, Any, Any], variables: Sequence[Any], old: Sequence[Any]) -> None:
        """Sets `variables`, just updated from `old`, to what stays; `before` is the loss without the updates."""
        leaves = tf.nest.flatten(data)
        present = [leaf for leaf in leaves if leaf is not None]
        new = [tf.convert_to_tensor(v) for v in variables]

        def ask(before: Any, *tensors: Any) -> Any:
            given = list(tensors[: len(present)])
            values = tensors[len(present) :]
            packed = tf.nest.pack_sequence_as(data, [None if leaf is None else given.pop(0) for leaf in leaves])
            old = values[: len(variables)]
            new = values[len(variables) :]

            def place(share: float) -> None:
                for v, o, n in zip(variables, old, new, strict=True):
                    v.assign(_between(o, n, tf.constant(share, tf.float64)))

            before = float(before)
            state = self.engine.state
            share, state = self.engine.preconditioner.judge(state, before, place, lambda: float(self.value(*packed)))
            self.engine.state = state
            return tf.constant(share, tf.float64)

        with tf.control_dependencies(new):
            share = tf.ensure_shape(tf.py_function(ask, [before, *present, *old, *new], tf.float64), ())

        def put() -> Any:
            for v, o, n in zip(variables, old, new, strict=True):
                v.assign(_between(o, n, share))
            return tf.constant(True)

        tf.cond(share == 1, lambda: tf.constant(False), put)  # in the graph, so that what follows reads it


def _between(old: Any, new: Any, share: Any) -> Any:
    """old + share (new - old), and exactly `old` for a share of 0, whatever `new` is."""
    moved = old + tf.cast(share, old.dtype) * (new - old)
    return tf.where(share == 0, old, moved)


def fitting(optimizer: Any, engine: Engine) -> Any:
    """The optimizer; ValueError where updates would not survive it."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise ValueError("LossScaleOptimizer looks for overflow in gradients, which never reach it: use bfloat16")
    if tf.distribute.get_strategy().num_replicas_in_sync > 1:
        raise ValueError("several replicas are not supported: the curvature's state lives in one process")
    if not engine.settings.step.judges:
        return optimizer
    step = type(engine.settings.step).__name__
    if engine.plan.refused:
        raise ValueError(f"{step} finds no rate for variables that are not covered: {', '.join(engine.plan.refused)}")
    if not _as_it_is(optimizer):
        raise ValueError(f"{step} sets its own rate, and {type(optimizer).__name__} would change it: use SGD(1.0)")
    return optimizer


def _as_it_is(optimizer: Any) -> bool:
    """Whether it subtracts what it is given."""
    with tf.init_scope():  # out of a graph being traced, to read the rate
        told = optimizer.get_config()
    changing = ("momentum", "weight_decay", "clipnorm", "clipvalue", "global_clipnorm", "use_ema", "loss_scale_factor")
    plain = type(optimizer) is keras.optimizers.SGD and told["learning_rate"] == 1.0
    return plain and not any(told.get(name) for name in (*changing, "gradient_accumulation_steps"))
