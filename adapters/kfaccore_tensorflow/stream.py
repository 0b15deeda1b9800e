"""Records of a trained model over a dataset, for `kfaccore.fit` and what is made of it: traced once for all batches of
the same axes, the model not in training unless told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import kfaccore as kf
from kfaccore_tensorflow import draw
from kfaccore_tensorflow.bridge import to_numpy
from kfaccore_tensorflow.capture import tap
from kfaccore_tensorflow.given import spec, tensor
from kfaccore_tensorflow.heads import output_names, over
from kfaccore_tensorflow.observe import observe
from kfaccore_tensorflow.plan import Plan
from kfaccore_tensorflow.step import Engine, Settings
from kfaccore_tensorflow.tensors import Pass, Tensors, gathered

Tensor = Any


class Stream:
    """{part: Record} of each batch, as often as it is asked for, the same draws every time; NumPy arrays.

    model, loss   as `records` takes them; several outputs by a kfaccore.Joint or a dict of losses
    batches       anything that can be iterated again and gives (inputs, target) or (inputs, target, sample weight):
                  a tf.data.Dataset that does not shuffle
    fisher        kfaccore's monte_carlo, type2, empirical or forward_only
    training      call the model as `fit` does
    settings      fields of `Settings`: draws, seed, strict, uncovered

    n is a batch's share of the mean loss, that of a sum too, so shares add up over batches of any sizes. ValueError for
    a batch in which nothing counts.
    """

    def __init__(
        self,
        model: Any,
        loss: Any,
        batches: Iterable[Any],
        fisher: Callable = kf.monte_carlo,
        training: bool = False,
        **settings: Any,
    ) -> None:
        self.model = model
        self.batches = batches
        self.training = training
        self.engine = Engine(loss, Settings(fisher=fisher, **settings), names=output_names(model))
        self.engine.objective = self.engine.objective.averaged()
        self.engine.signs = False
        self._traced: dict[Any, tuple[Callable, list[Tensors]]] = {}

    @property
    def coverage(self) -> Plan:
        """Which variables the records cover, once a batch was seen; print it."""
        return self.engine.plan

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[dict[str, kf.Record]]:
        for number, batch in enumerate(self.batches):
            found = self._records(number, _three(batch))
            if self.engine.mixing and not self.engine.signs and self.engine.fisher in (kf.type2, kf.empirical):
                self.engine.signs = True  # products of two examples vanish in expectation only under random signs
                found = self._records(number, _three(batch))
            yield found

    def _records(self, number: int, batch: tuple[Any, Any, Any]) -> dict[str, kf.Record]:
        given = tf.nest.map_structure(tensor, batch)
        specs = tf.nest.map_structure(spec, given)
        key = tuple(str(one) for one in tf.nest.flatten(specs))
        if key not in self._traced:
            kept: list[Tensors] = []
            function = tf.function(lambda *given: self._forward(kept, given), autograph=False)
            self._traced[key] = (function.get_concrete_function(*specs), kept)
        concrete, kept = self._traced[key]
        self.engine.state = replace(self.engine.state, step=number)  # what draws are a function of
        arrays = [to_numpy(x) for x in concrete(*given)]
        taken = draw.recorded(self.engine, kept[-1], arrays, exact=True)
        if taken is None:
            raise ValueError(f"batch {number} has no records: its share of the mean loss is 0; leave it out")
        return taken.drawn

    def _forward(self, kept: list[Tensors], batch: tuple[Any, Any, Any]) -> list[Tensor]:
        x, target, weight = batch
        with tf.GradientTape(persistent=True) as tape:
            with tap(self.model) as scopes:
                f = self.model(x, training=self.training)
            heads = self._heads(f, target)
        seen = observe(self.model, list(heads.values()), scopes, x)
        self.engine.adopt(seen.plan)
        kept.append(gathered(self.engine, self.engine.plan.parts, Pass(seen, heads, tape, target, weight)))
        return kept[-1].flat()

    def _heads(self, f: Any, target: Any) -> dict[str, Tensor]:
        """What is differentiated, by output."""
        self.engine.objective = over(self.engine.objective, f)
        return self.engine.objective.heads(f)


@dataclass(frozen=True)
class _Units:
    """A draw for each number of a head (batch, ...) that is pulled back for itself; n is the number of examples."""

    names: tuple[str, ...] = ("",)

    def by_head(self, x: Any, heads: Any) -> list[Any]:
        return [None]

    def draws_of(self, fisher: Any, count: int, f: list, told: list, rng: Any) -> list[Any]:
        units = int(np.prod(f[0].shape[1:]))
        eye = np.eye(units, dtype=f[0].dtype).reshape(units, 1, *f[0].shape[1:])
        return [np.broadcast_to(eye, (units, *f[0].shape))]

    def share_of(self, f: list, told: list) -> float:
        return float(len(f[0]))

    def present_of(self, f: list, told: list) -> np.ndarray:
        return np.ones(len(f[0]), bool)

    def drawless(self, fisher: Any) -> bool:
        return False


class _Pulled(Stream):
    """Draws that are given: those of `units(prediction, target)`."""

    def __init__(
        self, model: Any, units: Callable[[Any, Any], Tensor], batches: Iterable[Any], training: bool, **settings: Any
    ) -> None:
        super().__init__(model, kf.Gaussian(), batches, training=training, **settings)
        self.units = units
        self.engine.objective = _Units()

    def _heads(self, f: Any, target: Any) -> dict[str, Tensor]:
        return {"": self.units(f, target)}


def outputs(
    model: Any,
    batches: Iterable[Any],
    select: Callable[[Any], Tensor] | None = None,
    training: bool = False,
    **settings: Any,
) -> Stream:
    """A stream whose draws are the units of the prediction, for `P.covariance`; n is the number of examples.

    batches   inputs, or (inputs, target)
    select    prediction -> (batch, units), such as `lambda f: f[:, -1]` of a language model
    """

    def units(f: Any, target: Any) -> Tensor:
        chosen = f if select is None else select(f)
        if not tf.is_tensor(chosen) or chosen.shape.rank is None or chosen.shape.rank < 2:
            shape = tuple(chosen.shape) if tf.is_tensor(chosen) else type(chosen).__name__
            raise ValueError(f"outputs got a prediction of {shape}; need (batch, units): give `select`")
        return chosen

    return _Pulled(model, units, batches, training, **settings)


def measured(
    model: Any,
    measure: Callable[[Any, Any], Tensor],
    batches: Iterable[Any],
    training: bool = False,
    **settings: Any,
) -> Stream:
    """A stream of one draw, the gradient of measure(prediction, target) -> (batch,), such as a margin; n = batch."""

    def units(f: Any, target: Any) -> Tensor:
        values = measure(f, target)
        if not tf.is_tensor(values) or values.shape.rank != 1:
            shape = tuple(values.shape) if tf.is_tensor(values) else type(values).__name__
            raise ValueError(f"measure gave shape {shape}; need (batch,), one number an example")
        return values[:, None]

    return _Pulled(model, units, batches, training, **settings)


def _three(batch: Any) -> tuple[Any, Any, Any]:
    """(inputs, target, sample weight); a batch that is no tuple is inputs alone."""
    return keras.utils.unpack_x_y_sample_weight(batch)
