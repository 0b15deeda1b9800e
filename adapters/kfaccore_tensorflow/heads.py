"""Models of several outputs: a loss for each, the training loss their weighted sum.

As kfaccore.Joint has it: n is the number of examples B, and an output's draws carry sqrt(weight B / its own share), so
that F = (1/B) sum of vec(J) vec(J)^T is the sum of the outputs' Fishers; a draw of the true labels carries the factor
itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import kfaccore as kf
from kfaccore_tensorflow.losses import CORE, Objective, Told, checked, single


@dataclass(frozen=True)
class Several:
    """Objectives by output, and what multiplies them.

    outputs    of the model, in the order of a list of predictions, those without a loss too; by default those here
    """

    objectives: dict[str, Objective]
    weights: dict[str, float]
    outputs: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Of the outputs, in order."""
        return tuple(self.objectives)

    @property
    def core(self) -> kf.Joint:
        """The loss as kfaccore's, of the outputs whose weight is not 0."""
        weights = {name: weight for name, weight in self.weights.items() if weight}
        return kf.Joint({name: self.objectives[name].core for name in weights}, weights)

    def averaged(self) -> Several:
        """Means of losses that are sums."""
        return replace(self, objectives={name: one.averaged() for name, one in self.objectives.items()})

    def heads(self, f: Any) -> dict[str, Any]:
        """Predictions by output; ValueError where they are not the outputs that have losses."""
        named = self._named(f, "the model returns")
        return {name: checked(named[name]) for name in self.names}

    def by_head(self, x: Any, heads: Any) -> list[Any]:
        """Targets or weights, one an output; a single weight is each output's."""
        if x is None or tf.is_tensor(x) or np.isscalar(x):
            return [x] * len(self.names)
        named = self._named(x, "the targets or weights are")
        return [named[name] for name in self.names]

    def value(self, y: Any, f: Any, weight: Any) -> Any:
        """The weighted sum of the losses."""
        heads = self.heads(f)
        pairs = zip(self.by_head(y, heads), heads.items(), self.by_head(weight, heads), strict=True)
        terms = [self.weights[name] * self.objectives[name].value(t, head, w) for t, (name, head), w in pairs]
        return tf.add_n([tf.cast(term, terms[0].dtype) for term in terms])

    def draws_of(self, fisher: Callable, count: int, f: list[np.ndarray], told: list[Told], rng: Any) -> list[Any]:
        """Draws of each output; of `type2` each output's in turn, the others zero, as are those without a label."""
        found = {}
        for name, head, of in zip(self.names, f, told, strict=True):
            one = self.objectives[name]
            share = one.share_of([head], [of])
            scale = self.weights[name] * len(head) / share if share else 0.0
            draws = one.draws_of(fisher, count, [head], [of], rng)[0]
            found[name] = np.asarray(draws * (scale if fisher is kf.empirical else scale**0.5), head.dtype)
        if fisher is kf.type2:
            found = kf.Joint.padded(found)
        return [found[name] for name in self.names]

    def share_of(self, f: list[np.ndarray], told: list[Told]) -> float:
        """The number of examples."""
        return float(len(f[0]))

    def present_of(self, f: list[np.ndarray], told: list[Told]) -> np.ndarray:
        """Which examples count in any output."""
        each = zip(self.names, f, told, strict=True)
        return np.any([self.objectives[name].present_of([head], [of]) for name, head, of in each], axis=0)

    def drawless(self, fisher: Callable) -> bool:
        """Whether a Fisher makes no draws."""
        return fisher is kf.forward_only

    def _named(self, x: Any, what: str) -> dict[str, Any]:
        """By name; a list is of all outputs, or of those that have a loss."""
        if tf.is_tensor(x) and len(self.outputs or self.names) == 1:
            return {self.names[0]: x}
        if isinstance(x, Mapping):
            missing = [name for name in self.names if name not in x]
            if missing:
                raise ValueError(f"{what} {sorted(x)}; there is none for {missing}, which has a loss")
            return dict(x)
        orders = (self.names, self.outputs)
        count = len(x) if isinstance(x, Sequence) else 0
        order = next((order for order in orders if len(order) == count), None)
        if order is None:
            came = count if isinstance(x, Sequence) else "one tensor"
            raise ValueError(f"{what} {came}; need {len(self.names)}, one for each of {list(self.names)}")
        return dict(zip(order, x, strict=True))


def objective(loss: Any, fisher: Callable = kf.monte_carlo, weights: Any = None, names: Sequence[str] = ()) -> Any:
    """What is trained: an Objective of one loss, or Several of a kfaccore.Joint, or a dict or list of losses.

    weights, names    of the losses and outputs, as `compile` takes them and the model has them

    Raises ValueError for losses without a Fisher.
    """
    if isinstance(loss, kf.Joint):
        given = {name: single(one, fisher) for name, one in loss.losses}
        return Several(given, dict(loss.weights), tuple(names))
    if len(names) > 1 and loss is not None and not isinstance(loss, (Mapping, list, tuple, *CORE)):
        loss = dict.fromkeys(names, loss)  # one of Keras's is each output's
    if not isinstance(loss, Mapping | list | tuple):
        return replace(single(loss, fisher), scale=_scale(weights))
    given = dict(loss) if isinstance(loss, Mapping) else dict(zip(_named(names, loss), loss, strict=True))
    each = weights if isinstance(weights, Mapping) else dict(zip(given, weights or [1.0] * len(given), strict=True))
    scales = {name: 1.0 if scale is None else scale for name, scale in each.items()}  # None is 1, as Keras has it
    negative = {name: scale for name, scale in scales.items() if not float(scale) >= 0}
    if negative:
        raise ValueError(f"loss_weights are {negative}; need numbers that are not negative")
    losses = {name: one for name, one in given.items() if one is not None}
    if not any(float(scales.get(name, 1.0)) for name in losses):
        raise ValueError(f"none of the outputs {list(given)} has a loss; compile the model with one")
    ordered = [name for name in names if name in losses] if set(losses) <= set(names) else list(losses)
    return Several(
        {name: single(losses[name], fisher) for name in ordered},
        {name: float(scales.get(name, 1.0)) for name in ordered},
        tuple(names) or tuple(given),
    )


def over(given: Any, f: Any) -> Any:
    """What is trained, of a prediction whose outputs only a batch shows, as of a subclass: one of Keras's losses
    is each output's, and a list of losses goes by the sorted keys of a dict, as Keras has it."""
    if not isinstance(f, Mapping | list | tuple):
        return given
    keys = sorted(f) if isinstance(f, Mapping) else [str(i) for i in range(len(f))]
    if isinstance(given, Objective) and given.keras and len(keys) > 1:
        each = dict.fromkeys(keys, replace(given, scale=1.0))
        return Several(each, dict.fromkeys(keys, given.scale), tuple(keys))
    counted = tuple(map(str, range(len(keys))))
    if not isinstance(given, Several) or not isinstance(f, Mapping) or given.outputs != counted or counted[0] in f:
        return given
    named = dict(zip(counted, keys, strict=True))
    objectives = {named[name]: one for name, one in given.objectives.items()}
    return Several(objectives, {named[name]: weight for name, weight in given.weights.items()}, tuple(keys))


def _scale(weights: Any) -> float:
    """The one weight of one loss, as `compile` takes it: a number, or it alone in a list or dict."""
    given = list(weights.values()) if isinstance(weights, Mapping) else np.ravel(weights)
    first = given[0] if len(given) == 1 else np.nan
    scale = 1.0 if first is None else float(first)
    if not scale >= 0:
        raise ValueError(f"loss_weights is {weights!r} for one loss; need one number, not negative")
    return scale


def _named(names: Sequence[str], loss: Sequence[Any]) -> Sequence[str]:
    return names if len(names) == len(loss) else [str(i) for i in range(len(loss))]


def output_names(model: keras.Model) -> tuple[str, ...]:
    """The names of a model's outputs, where it has them before a batch: the keys of those in a dict, in the order in
    which Keras reads lists of losses; else their layers', where one that makes several outputs has a name for each."""
    names = list(getattr(model, "output_names", None) or ())
    outputs = model.output if names else None
    if isinstance(outputs, Mapping):
        return tuple(sorted(outputs))
    found: list[str] = []
    for name in names:
        others = (f"{name}_{i}" for i in range(1, len(names)))
        free = (one for one in (name, *others) if one not in found and (one == name or one not in names))
        found.append(next(free))
    return tuple(found)
