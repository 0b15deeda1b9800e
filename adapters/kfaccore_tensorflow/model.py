"""A Keras model that trains by preconditioned gradients inside `fit`."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from kfaccore_tensorflow.config import decoded, encoded
from kfaccore_tensorflow.engine import Engine, Settings
from kfaccore_tensorflow.judge import Judge, fitting
from kfaccore_tensorflow.losses import objective
from kfaccore_tensorflow.optimizer import take_step


@keras.saving.register_keras_serializable("kfaccore_tensorflow")
class KFACModel(keras.Model):
    """`model` with another train_step: compile, fit, evaluate, callbacks and saving are Keras's own.

    model       any Keras model of the table's layers with one output, kept as `inner`; its variables are trained
    settings    fields of `Settings`: core, or method, clocks, schedules and step; fisher, draws, seed, strict

    The optimizer given to `compile` applies the updates: SGD(1.0) when the step is SelfTuning() or LineSearch(), which
    set their own rate. The loss must be a Keras loss on logits. A saved file holds the curvature's state too, so
    training resumes where it stopped.
    """

    def __init__(self, model: Any, name: str | None = None, **settings: Any) -> None:
        super().__init__(name=name or f"kfac_{model.name}")
        self.inner = model
        self.settings = Settings(**settings)
        self.engine: Engine | None = None
        self.supports_jit = False  # the core is not XLA's to compile
        self._judge: Judge | None = None
        self._waiting: bytes | None = None
        self.built = model.built

    def build(self, input_shape: Any) -> None:
        """Builds the inner model."""
        if not self.inner.built:
            self.inner.build(input_shape)
        self.built = True

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """The inner model's prediction."""
        return self.inner(inputs, training=training, mask=mask)

    def train_step(self, data: Any) -> dict[str, Any]:
        """One update, traced by `fit` or run eagerly; the metrics of the batch."""
        x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
        if not self.inner.built:
            self(x, training=False)
        judge = self._ready()
        optimizer = fitting(self.optimizer, judge.engine)
        loss, f = take_step(self, judge, optimizer, (x, y, weight), self._loss(judge.engine, x))
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
        return self.compute_metrics(x, y, f, sample_weight=weight)

    def _loss(self, engine: Engine, x: Any) -> Any:
        """Keras's loss of a prediction for inputs x, and the penalty."""

        def value(f: Any, y: Any, weight: Any) -> Any:
            found = self.compute_loss(x, y, f, weight, training=True)
            return found + tf.cast(engine.penalty(), found.dtype)

        return value

    def _ready(self) -> Judge:
        """The engine and its judge, made once the inner model has variables; a loaded state goes in."""
        if self.engine is None or self._judge is None:
            engine = Engine(self.inner, self.loss, self.settings)

            def value(x: Any, y: Any, weight: Any) -> Any:
                return self._loss(engine, x)(self(x, training=True), y, weight)

            self.engine = engine
            self._judge = Judge(engine, value)
            self._restore()
        self.engine.objective = objective(self.loss, self.settings.fisher)  # compile may have changed it
        return self._judge

    def get_config(self) -> dict[str, Any]:
        """The inner model and the settings."""
        inner = keras.saving.serialize_keras_object(self.inner)
        return {"name": self.name, "model": inner, "settings": encoded(self.settings)}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> KFACModel:
        """The inverse of `get_config`."""
        inner = keras.saving.deserialize_keras_object(config["model"], custom_objects=custom_objects)
        settings = decoded(config["settings"])
        return cls(inner, config["name"], **{key: getattr(settings, key) for key in vars(settings)})

    def save_own_variables(self, store: Any) -> None:
        """Adds the curvature's state to what Keras saves."""
        saved = self._waiting if self.engine is None else self.engine.saved()
        if saved is not None:
            store["kfaccore"] = np.frombuffer(saved, np.uint8)

    def load_own_variables(self, store: Any) -> None:
        """Takes the curvature's state out again; a file of the same layers and settings is needed to train on."""
        self._waiting = np.asarray(store["kfaccore"]).tobytes() if "kfaccore" in store.keys() else None  # noqa: SIM118
        if self.engine is not None:
            self._restore()

    def _restore(self) -> None:
        if self._waiting is not None and self.engine is not None:
            self.engine.restore(self._waiting)
            self._waiting = None
