"""The penalty l2/2 |theta|^2 of a step, part of its loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from kfaccore_tensorflow.bridge import asked, to_tensor

if TYPE_CHECKING:
    from kfaccore_tensorflow.step import Engine


def weights(engine: Engine) -> dict[str, Any]:
    """{part: l2} of the step that is being traced; of a schedule it is asked each time the step runs, once, so that
    what is judged is the loss that was stepped on. Empty without a penalty."""
    schedules = engine.settings.schedules
    names = [part.name for part in engine.plan.parts]
    given = schedules.l2.values() if isinstance(schedules.l2, Mapping) else [schedules.l2]
    if not any(callable(value) for value in given):
        return schedules.penalties(names, 0)
    # a read of a variable orders the question behind the step before, in graphs of several steps
    first = tf.stop_gradient(tf.reshape(next(iter(engine.plan.parts[0].variables.values())).value, [-1])[:1])
    ask = lambda _: to_tensor(list(schedules.penalties(names, engine.state.step).values()), tf.float64)  # noqa: E731
    now = tf.ensure_shape(asked(ask, [first], tf.float64), (len(names),))
    return dict(zip(names, tf.unstack(tf.cast(now, _dtype(engine))), strict=True))


def penalty(engine: Engine, l2: Mapping[str, Any]) -> Any:
    """Over covered variables; 0 without `weights`."""
    if not l2:
        return 0.0
    every = {id(v): (l2[part.name], v) for part in engine.plan.parts for v in part.variables.values()}
    dtype = _dtype(engine)
    return tf.add_n([0.5 * weight * tf.reduce_sum(tf.square(tf.cast(v, dtype))) for weight, v in every.values()])


def _dtype(engine: Engine) -> Any:
    """That in which the penalty is summed."""
    return next(iter(engine.plan.parts[0].variables.values())).dtype
