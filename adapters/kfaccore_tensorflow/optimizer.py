"""An own training loop: one object, one call a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import kfaccore as kf
from kfaccore_tensorflow.applied import apply, moves_nothing
from kfaccore_tensorflow.bridge import widened
from kfaccore_tensorflow.capture import tap
from kfaccore_tensorflow.given import of_any_batch
from kfaccore_tensorflow.heads import output_names, over
from kfaccore_tensorflow.judge import alone, fitting, judge, told_loose, unscaled
from kfaccore_tensorflow.matrices import check_columns
from kfaccore_tensorflow.observe import observe
from kfaccore_tensorflow.pinned import Watch
from kfaccore_tensorflow.step import Engine, Settings
from kfaccore_tensorflow.tensors import Pass, wanted_own
from kfaccore_tensorflow.trace import known


class Optimizer:
    """Preconditions a Keras model's gradients and lets any Keras optimizer apply them.

    model       built
    loss        of kfaccore, or a Keras loss on logits; the model's own losses (regularisers) are added. For a model of
                several outputs a kfaccore.Joint, or a dict of losses
    optimizer   of Keras; it gets the updates in place of gradients: step size, momentum, decay and clipping are its.
                Without one they are subtracted as they are, and the step is SelfTuning() unless
                `core` or `step` is given
    settings    fields of `Settings`: core, or method, clocks, schedules and step; fisher, draws, seed, strict,
                uncovered

    Raises ValueError, before any step, for models, losses and optimizers that cannot be served; what only a batch
    shows of a subclassed model, or of one with axes of any length, is told in the first step.
    """

    def __init__(self, model: Any, loss: Any, optimizer: Any = None, **settings: Any) -> None:
        if optimizer is None:
            settings = settings if "core" in settings else {"step": kf.SelfTuning(), **settings}
            optimizer = keras.optimizers.SGD(1.0)
        self.model = model
        self.engine = Engine(loss, Settings(**settings), known(model), output_names(model))
        self.optimizer = fitting(keras.optimizers.get(optimizer), self.engine, model.trainable_variables)
        self.optimizer.build(model.trainable_variables)
        self._trained: tuple[int, ...] | None = None
        self._file: str | PathLike | None = None  # that waits for a plan

    def step(self, x: Any, y: Any, sample_weight: Any = None) -> Any:
        """One update on a batch; the loss before it, 0-d. ValueError for a batch without examples."""
        first: Any = next((leaf for leaf in tf.nest.flatten(x) if leaf is not None), None)
        for name, leaf in (("x", first), ("y", next(iter(tf.nest.flatten(y)), None))):
            if isinstance(leaf, int | float):
                raise ValueError(f"{name} holds numbers of Python; need arrays or tensors: give np.asarray({name})")
        there = isinstance(first, np.ndarray) or (tf.is_tensor(first) and first.shape.rank)
        if there and first.shape[0] == 0:
            raise ValueError(f"the batch has inputs of shape {tuple(first.shape)}; need at least one example")
        alone(self.model)
        self._follow()
        return self._graph(x, y, sample_weight)

    @property
    def info(self) -> kf.Info:
        """What the core's last step did; its counts() say how many inverses ended with each code."""
        if self.engine.info is None:
            raise ValueError("there is no information before the first step")
        return self.engine.info

    def save(self, path: str | PathLike, **meta: Any) -> None:
        """kfaccore's own file: covered weights as matrices, and the state; any adapter or the NumPy network reads it.

        The Keras optimizer's slots and variables that are not covered are Keras's to save. ValueError before the first
        step of a model that does not tell its inputs.
        """
        engine = self.engine
        if not engine.ready:
            raise ValueError(f"model {self.model.name!r} has no plan before its first batch: step once, then save")
        size = sum(int(np.prod(v.shape)) for v in self.model.trainable_variables)
        refused = engine.plan.refused.items()
        left = {name: (sum(int(np.prod(v.shape)) for v in variables), why) for name, (variables, why) in refused}
        told = kf.describe(engine.preconditioner, engine.state, type(self.model).__name__, size, left)
        kf.save(path, engine.tree(), **{**told, **meta})

    def load(self, path: str | PathLike) -> None:
        """Takes weights and state from such a file, whose layers bear this model's names; ValueError for others.

        Where only a batch shows the model's inputs it is done in the first step, before anything is computed.
        """
        self._file = path
        self._restore()

    def _restore(self) -> None:
        """Takes what `load` was given, once there is a plan."""
        if self._file is None or not self.engine.ready:
            return
        path, self._file = self._file, None
        with tf.init_scope():  # a graph that is being traced runs later
            found = kf.load(path, like=self.engine.tree())
            check_columns(path, self.engine.plan)
            self.engine.replant(found)

    def _follow(self) -> None:
        """A graph of what is trained now; ValueError where that is nothing, or what the plan does not know."""
        variables = self.model.trainable_variables
        now = tuple(map(id, variables))
        if now == self._trained:
            return
        if not now:
            raise ValueError(
                f"no variable of model {self.model.name!r} is trainable now: set trainable=True again before the step"
            )
        if self.engine.ready:
            self.engine.plan.check(variables)
        self._graph = tf.function(self._traced, reduce_retracing=True, autograph=False)
        self._trained = now

    def _traced(self, x: Any, y: Any, weight: Any) -> Any:
        optimizer = fitting(self.optimizer, self.engine, self.model.trainable_variables)
        loss, _ = take_step(self.model, self.engine, optimizer, (x, y, weight), self._loss)
        self._restore()
        return loss

    def _loss(self, f: Any, y: Any, weight: Any) -> Any:
        """Loss of the batch, the model's own and the penalty."""
        value = self.engine.objective.value(y, f, weight)
        return with_own(value, self.model) + tf.cast(self.engine.penalty(), value.dtype)


def with_own(value: Any, model: Any) -> Any:
    """A loss with the model's own, of several numbers their sum, as Keras has it."""
    return tf.add_n([value, *(tf.reduce_sum(tf.cast(own, value.dtype)) for own in model.losses)])


def take_step(
    model: Any,
    engine: Engine,
    optimizer: Any,
    data: tuple[Any, Any, Any],
    loss_of: Callable[[Any, Any, Any], Any],
    beside: Sequence[Any] = (),
) -> tuple[Any, Any]:
    """(loss before, prediction) of one applied update, while a graph is traced.

    beside   variables that Keras would train too; ValueError where the loss is made of one
    """
    x, y, weight = data
    x = tf.nest.map_structure(of_any_batch, x)
    with tf.GradientTape(persistent=True) as tape:
        with tap(model) as scopes:
            watch = Watch(model)
            f = model(x, training=True)
        engine.objective = over(engine.objective, f)
        heads = engine.objective.heads(f)
        seen = observe(model, list(heads.values()), scopes, x)
        engine.adopt(seen.plan)
        engine.penalise()
        loss = loss_of(f, y, weight)
    pinned = watch.pinned()
    moves_nothing(beside, tape.gradient(loss, list(beside)), model.name)
    variables = model.trainable_variables
    outputs = wanted_own(engine, seen)
    found = [None if g is None else tf.convert_to_tensor(g) for g in tape.gradient(loss, [*variables, *outputs])]
    gradients = found[: len(variables)]
    slopes = zip(outputs, found[len(variables) :], strict=True)
    own = {id(out): widened(tf.zeros_like(out) if g is None else g) for out, g in slopes}
    judged = engine.settings.step.judges
    if judged:
        told_loose(engine, watch.loose())
        loss = unscaled(optimizer, engine, loss)
    new = engine.updates(Pass(seen, heads, tape, y, weight, loss, own), variables, gradients)
    old = [tf.identity(v) for v in variables] if judged else []
    with tf.control_dependencies(old):
        apply(optimizer, new, variables)
    if judged:

        def again() -> Any:
            with pinned.again() as other:
                value = loss_of(model(x, training=True), y, weight)
            told_loose(engine, other)
            return value

        judge(engine, loss, again, variables, old)
    return loss, f
