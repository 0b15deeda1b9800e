"""Steps that set their own rate: updates are applied as they are, then judged by the loss of their own batch.

That loss is one more forward in the same graph; only its value goes to the core, so no graph waits for another.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import keras
import tensorflow as tf

from kfaccore_tensorflow.step import Engine


def judge(engine: Engine, before: Any, value: Callable[[], Any], variables: Sequence[Any], old: Sequence[Any]) -> None:
    """Sets `variables`, just updated from `old`, to what stays; `before` is the loss without the updates.

    value   the loss of the batch, traced: under the draws that it was stepped with, where the model draws at random
    """
    with tf.control_dependencies([v.value for v in variables]):
        new = [tf.identity(v) for v in variables]
    before = tf.cast(before, tf.float64)

    def ask(before: Any, found: Any, share: Any) -> Any:
        if engine.void:
            return share
        rule = engine.preconditioner.rule
        answer, motion = rule.judge(engine.state.motion, float(share), float(before), float(found))
        engine.state = replace(engine.state, motion=motion)
        return tf.constant(float(answer), tf.float64)

    def put(share: Any) -> Any:
        for v, o, n in zip(variables, old, new, strict=True):
            v.assign(_between(o, n, share))
        return tf.constant(True)

    def again(share: Any, wanted: Any) -> tuple[Any, Any]:
        found = tf.cast(value(), tf.float64)
        answer = tf.ensure_shape(tf.py_function(ask, [before, found, wanted], tf.float64), ())
        tf.cond(answer == wanted, lambda: tf.constant(False), lambda: put(answer))
        return wanted, answer

    def unsettled(share: Any, wanted: Any) -> Any:
        return tf.logical_and(wanted != 0, wanted != share)

    zero = tf.constant(0.0, tf.float64)
    with tf.control_dependencies(new):
        tf.while_loop(unsettled, again, [zero, zero + 1], parallel_iterations=1)


def _between(old: Any, new: Any, share: Any) -> Any:
    """old + share (new - old), and exactly `old` for a share of 0, whatever `new` is."""
    moved = old + tf.cast(share, old.dtype) * (new - old)
    return tf.where(share == 0, old, moved)


def told_loose(engine: Engine, loose: Sequence[str]) -> None:
    """A warning, once, of operations whose numbers are other ones in the pass that judges, or may be."""
    if not loose or engine.loose:
        return
    engine.loose = list(loose)
    warnings.warn(
        f"the loss may be judged under other draws than it was made with, by {engine.loose[:5]}: draw by layers of "
        f"Keras, or by keras.random, and call functions of NumPy that draw nothing by tf.numpy_function(..., "
        f"stateful=False)",
        stacklevel=2,
    )


def fitting(optimizer: Any, engine: Engine, variables: Sequence[Any]) -> Any:
    """The optimizer; ValueError where updates would not survive it, or the constraints of `variables`."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise ValueError(
            "LossScaleOptimizer looks for overflow in gradients, which never reach it: use the policy mixed_bfloat16"
        )
    if tf.distribute.get_strategy().num_replicas_in_sync > 1:
        raise ValueError("several replicas are not supported: the curvature's state lives in one process")
    if not engine.settings.step.judges:
        return optimizer
    step = type(engine.settings.step).__name__
    bound = [v.path for v in variables if v.constraint is not None]
    if bound:
        raise ValueError(
            f"{step} judges the updates that it made, and the constraints of {bound[:5]} would change them behind it: "
            f"take step=kfaccore.Fixed() with a Keras optimizer, or make the constraint part of the layer's call"
        )
    if _as_it_is(optimizer):
        return optimizer
    raise ValueError(f"{step} sets its own rate, and {type(optimizer).__name__} would change it: use SGD(1.0)")


def alone(model: Any) -> None:
    """ValueError where a strategy of one replica would have a step's parts run by other threads, or asks who it is."""
    if not tf.distribute.has_strategy():
        return
    strategy = tf.distribute.get_strategy()
    inside = not tf.distribute.in_cross_replica_context() and isinstance(strategy, tf.distribute.OneDeviceStrategy)
    if strategy.num_replicas_in_sync == 1 and not inside:
        raise ValueError(
            f"a step of model {model.name!r} was asked for under {type(strategy).__name__} of one replica: make the "
            f"model in strategy.scope(), and call Optimizer.step outside of it and of strategy.run"
        )


def unscaled(optimizer: Any, engine: Engine, loss: Any) -> Any:
    """The loss, in the graph, behind a look at the rate: it is a variable, which callbacks change after the graph is
    traced. InvalidArgumentError for another than 1 before anything is updated."""
    step = type(engine.settings.step).__name__
    rate = tf.convert_to_tensor(optimizer.learning_rate)
    told = (
        f"{step} sets its own rate, and the learning rate of {type(optimizer).__name__} was changed from 1.0: take "
        f"away the callback that does so, or assign 1.0 again; schedules of a rate are for step=kfaccore.Fixed()"
    )
    with tf.control_dependencies([tf.debugging.assert_equal(rate, tf.ones_like(rate), told)]):
        return tf.identity(loss)


def _as_it_is(optimizer: Any) -> bool:
    """Whether it subtracts what it is given."""
    with tf.init_scope():  # out of a graph being traced, to read the rate
        told = optimizer.get_config()
    changing = ("momentum", "weight_decay", "clipnorm", "clipvalue", "global_clipnorm", "use_ema", "loss_scale_factor")
    plain = type(optimizer) is keras.optimizers.SGD and told["learning_rate"] == 1.0
    return plain and not any(told.get(name) for name in (*changing, "gradient_accumulation_steps"))
