"""A Keras model that trains by preconditioned gradients inside `fit`."""

from __future__ import annotations

import warnings
from inspect import signature
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import kfaccore as kf
from kfaccore_tensorflow.agree import agreed
from kfaccore_tensorflow.config import decoded, encoded
from kfaccore_tensorflow.heads import objective, output_names
from kfaccore_tensorflow.judge import fitting
from kfaccore_tensorflow.losses import CORE
from kfaccore_tensorflow.optimizer import take_step, with_own
from kfaccore_tensorflow.resume import Checkpointed, parts_in
from kfaccore_tensorflow.step import Engine, Settings

STEPS = ("train_step", "compute_loss", "test_step", "predict_step", "compute_metrics")
OURS = (*CORE, kf.Joint)


@keras.saving.register_keras_serializable("kfaccore_tensorflow")
class KFACModel(keras.Model):
    """`model` with another train_step: compile, fit, evaluate, callbacks and saving are Keras's own.

    model       any Keras model of the table's layers with one output, kept as `inner`; its variables are trained
    settings    fields of `Settings`: core, or method, clocks, schedules and step; fisher, draws, seed, strict

    The optimizer given to `compile` applies the updates: SGD(1.0) when the step is SelfTuning() or LineSearch(), which
    set their own rate. The loss must be a Keras loss on logits. A saved file holds the curvature's state too, so
    training resumes where it stopped. ValueError for a model with a train_step or the like of its own, which would not
    be called.
    """

    def __init__(self, model: Any, name: str | None = None, **settings: Any) -> None:
        _plain(model)
        super().__init__(name=name or f"kfac_{model.name}")
        self.inner = model
        self.settings = Settings(**settings)
        self.engine: Engine | None = None
        self.supports_jit = False  # the core is not XLA's to compile
        self._ours: Any = None  # a loss of kfaccore
        self._eagerly: Any = None
        self._waiting: bytes | None = None
        self.built = model.built
        self._checkpointed = Checkpointed(self)

    @property
    def output_names(self) -> Any:
        """The inner model's, by which Keras tells losses, metrics and targets of several outputs."""
        return self.inner.output_names

    def build(self, input_shape: Any) -> None:
        """Builds the inner model."""
        own = type(self.inner).build not in (keras.Model.build, keras.layers.Layer.build)
        if own and not self.inner.built:  # others are built by their first call
            self.inner.build(input_shape)
        self.built = True

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """The inner model's prediction."""
        takes = "mask" in signature(self.inner.call).parameters  # a mask of the inputs goes along with them anyway
        return self.inner(inputs, training=training, **({"mask": mask} if takes and mask is not None else {}))

    def compile(self, optimizer: Any = "sgd", loss: Any = None, **options: Any) -> None:
        """As keras.Model.compile; the loss may also be of kfaccore, or a kfaccore.Joint for several outputs.

        Where layers were thawed since, the curvature begins anew, as the optimizer does.
        """
        self._ours = loss if isinstance(loss, OURS) else None
        if self._ours is not None and options.get("loss_weights") is not None:
            raise ValueError("a loss of kfaccore takes no loss_weights: give them to kfaccore.Joint(losses, weights)")
        if self.engine is not None and self.engine.plan.changed(self.inner.trainable_variables):
            self.engine = None
        self._eagerly = None
        super().compile(optimizer, None if self._ours is not None else loss, **options)

    def get_compile_config(self) -> dict[str, Any]:
        """As Keras's, with a loss of kfaccore by name."""
        config = super().get_compile_config()
        return config if self._ours is None else {**config, "loss": {"kfaccore": encoded(self._ours)}}

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """The inverse of `get_compile_config`."""
        given = dict(config)
        loss = given.get("loss")
        ours = decoded(loss["kfaccore"]) if isinstance(loss, dict) and "kfaccore" in loss else None
        given = keras.saving.deserialize_keras_object({**given, **({} if ours is None else {"loss": None})})
        self.compile(**{**given, **({} if ours is None else {"loss": ours})})
        if self.built:
            self.optimizer.build(self.trainable_variables)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """Keras's loss, or that of kfaccore and the model's own."""
        if self._ours is None:
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        return with_own(self._objective().value(y, y_pred, sample_weight), self)

    def train_step(self, data: Any) -> dict[str, Any]:
        """One update, traced by `fit`; the metrics of the batch."""
        x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
        if type(self).call is not KFACModel.call:
            raise ValueError(
                f"{type(self).__name__} has a call of its own, and what is trained is the inner model: make it part of "
                f"that"
            )
        if not self.inner.built:
            self(x, training=False)
        if not self.inner.trainable_variables:
            raise ValueError(
                f"no variable of model {self.inner.name!r} is trainable now: set trainable=True again and compile"
            )
        engine = self._ready()
        optimizer = fitting(self.optimizer, engine, self.trainable_variables)
        if tf.executing_eagerly():
            if self._eagerly is None:
                step = lambda given: self._stepped(given, optimizer)  # noqa: E731
                self._eagerly = tf.function(step, reduce_retracing=True, autograph=False)
            optimizer.build(self.trainable_variables)
            loss, f = self._eagerly((x, y, weight))
        else:
            loss, f = self._stepped((x, y, weight), optimizer)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss, sample_weight=_examples(x))
        return self.compute_metrics(x, y, f, sample_weight=weight)

    def _stepped(self, data: tuple[Any, Any, Any], optimizer: Any) -> tuple[Any, Any]:
        engine = self._ready()
        kind = type(self)
        told = {"training": True} if "training" in signature(self.compute_loss).parameters else {}  # as Keras asks too
        waiting = [True] if kind.compute_loss is not KFACModel.compute_loss else []  # asked in the first pass alone

        def value(f: Any, y: Any, weight: Any) -> Any:
            own = lambda: self.compute_loss(data[0], y, f, weight, **told)  # noqa: E731
            known = lambda: with_own(engine.objective.value(y, f, weight), self)  # noqa: E731
            asked = waiting and waiting.pop()
            found = agreed(kind.__name__, engine.objective.heads(f), own, known) if asked else own()
            return found + tf.cast(engine.penalty(), found.dtype)

        trained = {id(v) for v in self.inner.trainable_variables}
        beside = [v for v in self.trainable_variables if id(v) not in trained]
        found = take_step(self.inner, engine, optimizer, data, value, beside)
        self._restore()
        return found

    def _objective(self) -> Any:
        """What is trained, as compile had it last."""
        settings = self.settings
        given = getattr(self, "_compile_loss", None)
        scales = None if given is None else given._user_loss_weights
        loss = self.loss if self._ours is None else self._ours
        return objective(loss, settings.drawn(), scales, output_names(self.inner))

    def _ready(self) -> Engine:
        """The engine; its plan is made in the first step."""
        if self.engine is None:
            self.engine = Engine(
                self.loss if self._ours is None else self._ours, self.settings, names=output_names(self.inner)
            )
        self.engine.objective = self._objective()  # compile may have changed it
        return self.engine

    def export(self, filepath: Any, **options: Any) -> None:
        """The inner model's: what is served predicts, and knows nothing of how it was trained."""
        self.inner.export(filepath, **options)

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

    @property
    def curvature(self) -> bytes | None:
        """The state as one safetensors file, None before there is one; what is set waits for a plan."""
        return self._waiting if self.engine is None or not self.engine.ready else self.engine.saved()

    @curvature.setter
    def curvature(self, given: bytes | None) -> None:
        self._waiting = given
        self._restore()

    def save_own_variables(self, store: Any) -> None:
        """Adds the curvature's state to what Keras saves."""
        saved = self.curvature
        if saved is not None:
            store["kfaccore"] = np.frombuffer(saved, np.uint8)

    def load_own_variables(self, store: Any) -> None:
        """Takes the curvature's state out again; a file of the same layers and settings is needed to train on."""
        self.curvature = np.asarray(store["kfaccore"]).tobytes() if "kfaccore" in store.keys() else None  # noqa: SIM118

    def _restore(self) -> None:
        """Puts a loaded state back once there is a plan; with a warning not where layers were thawed since."""
        if self._waiting is None or self.engine is None or not self.engine.ready:
            return
        saved = set(parts_in(self._waiting))
        new = sorted({part.name for part in self.engine.plan.parts} - saved)
        if saved and new and len(saved) + len(new) == len(self.engine.plan.parts):
            warnings.warn(
                f"{new} are trained now and were not when this was saved: the curvature begins anew", stacklevel=3
            )
        else:
            self.engine.restore(self._waiting)
        self._waiting = None


def _examples(x: Any) -> Any:
    """How many there are in a batch of inputs: what Keras weighs the mean loss of an epoch with."""
    return tf.shape(next(leaf for leaf in tf.nest.flatten(x) if leaf is not None))[0]


def _plain(model: Any) -> None:
    """ValueError for a model that says itself how it trains or is evaluated: what wraps it would replace that."""
    own = [name for name in STEPS if getattr(type(model), name, None) is not getattr(keras.Model, name)]
    if isinstance(model, keras.Model) and own:
        raise ValueError(
            f"{type(model).__name__} has a {' and a '.join(own)} of its own, which KFACModel would replace: override "
            f"that in a subclass of KFACModel instead (a compute_loss must be compile's loss as far as the prediction "
            f"goes), or train it in a loop with kfaccore_tensorflow.Optimizer"
        )
