"""Models of several outputs: a loss for each, the training loss their weighted sum.

As kfaccore.Joint has it: n is the number of examples B, and an output's draws carry sqrt(weight B / its own share), so
that F = (1/B) sum of vec(J) vec(J)^T is the sum of the outputs' Fishers; a draw of the true labels carries the factor
itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import kfaccore as kf
from kfaccore_tensorflow.losses import Objective, checked, single


@dataclass(frozen=True)
class Several:
    """Objectives by output, and what multiplies them; predictions are a dict by name or a list in this order."""

    objectives: dict[str, Objective]
    weights: dict[str, float]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the outputs, in order."""
        return tuple(self.objectives)

    @property
    def core(self) -> kf.Joint:
        """The loss as kfaccore's."""
        return kf.Joint({name: one.core for name, one in self.objectives.items()}, self.weights)

    def heads(self, f: Any) -> dict[str, Any]:
        """Predictions by output; ValueError where they are not the outputs that have losses."""
        named = self._named(f, "the model returns")
        return {name: checked(named[name]) for name in self.names}

    def by_head(self, x: Any, heads: Any) -> list[Any]:
        """Targets or weights, one an output; a single weight is each output's."""
        if x is None or tf.is_tensor(x):
            return [x] * len(self.names)
        named = self._named(x, "the targets or weights are")
        return [named[name] for name in self.names]

    def value(self, y: Any, f: Any, weight: Any) -> Any:
        """The weighted sum of the losses."""
        heads = self.heads(f)
        pairs = zip(self.by_head(y, heads), heads.items(), self.by_head(weight, heads), strict=True)
        terms = [self.weights[name] * self.objectives[name].value(t, head, w) for t, (name, head), w in pairs]
        return tf.add_n([tf.cast(term, terms[0].dtype) for term in terms])

    def draws_of(self, fisher: Callable, count: int, f: list, y: list, weights: list, rng: Any) -> list[Any]:
        """Draws of each output; of `type2` each output's in turn, the others zero."""
        found = {}
        for name, head, target, weight in zip(self.names, f, y, weights, strict=True):
            one = self.objectives[name]
            scale = self.weights[name] * len(head) / one.share(head, target)
            draws = one.draws(fisher, count, head, target, weight, rng)
            found[name] = np.asarray(draws * (scale if fisher is kf.empirical else scale**0.5), head.dtype)
        if fisher is kf.type2:
            found = kf.Joint.padded(found)
        return [found[name] for name in self.names]

    def share_of(self, f: list, y: list) -> float:
        """The number of examples."""
        return float(len(f[0]))

    def drawless(self, fisher: Callable) -> bool:
        """Whether a Fisher makes no draws."""
        return fisher is kf.forward_only

    def _named(self, x: Any, what: str) -> dict[str, Any]:
        if isinstance(x, Mapping):
            missing = [name for name in self.names if name not in x]
            if missing or len(x) != len(self.names):
                raise ValueError(f"{what} {sorted(x)}; need a loss for each output, there are {list(self.names)}")
            return dict(x)
        if not isinstance(x, Sequence) or len(x) != len(self.names):
            count = len(x) if isinstance(x, Sequence) else "one tensor"
            raise ValueError(f"{what} {count}; need {len(self.names)}, one for each of {list(self.names)}")
        return dict(zip(self.names, x, strict=True))


def objective(loss: Any, fisher: Callable = kf.monte_carlo, weights: Any = None, names: Sequence[str] = ()) -> Any:
    """What is trained: an Objective of one loss, or Several of a kfaccore.Joint, or a dict or list of losses.

    weights, names    of the losses and outputs, as `compile` takes them and the model has them

    Raises ValueError for losses without a Fisher.
    """
    if isinstance(loss, kf.Joint):
        given = {name: single(one, fisher) for name, one in loss.losses}
        return Several(given, dict(loss.weights))
    if not isinstance(loss, Mapping | list | tuple):
        return single(loss, fisher)
    losses = dict(loss) if isinstance(loss, Mapping) else dict(zip(_named(names, loss), loss, strict=True))
    if any(one is None for one in losses.values()):
        none = [name for name, one in losses.items() if one is None]
        raise ValueError(f"outputs {none} have no loss; give the model outputs that are trained")
    ordered = [name for name in names if name in losses] if set(losses) <= set(names) else list(losses)
    scales = (
        dict(weights)
        if isinstance(weights, Mapping)
        else dict(zip(losses, weights or [1.0] * len(losses), strict=True))
    )
    return Several(
        {name: single(losses[name], fisher) for name in ordered},
        {name: float(scales.get(name, 1.0)) for name in ordered},
    )


def _named(names: Sequence[str], loss: Sequence[Any]) -> Sequence[str]:
    return names if len(names) == len(loss) else [str(i) for i in range(len(loss))]


def output_names(model: keras.Model) -> tuple[str, ...]:
    """The names of a model's outputs, where it has them before a batch."""
    return tuple(getattr(model, "output_names", None) or ())
