"""Training losses: as TensorFlow differentiates them, and the core loss and normaliser their Fisher needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import kfaccore as kf
from kfaccore_tensorflow.bridge import asked, to_numpy, to_tensor
from kfaccore_tensorflow.broadcast import mask_like, target_like, weight_like
from kfaccore_tensorflow.reductions import REDUCTIONS, reduction_of, share

CORE = (kf.SoftmaxCrossEntropy, kf.Bernoulli, kf.Gaussian)
FISHERS = (kf.monte_carlo, kf.type2, kf.empirical, kf.forward_only)


@dataclass(frozen=True)
class Told:
    """What a batch tells of one output beside the prediction: arrays, or None.

    weight  of examples or positions
    mask    (batch, positions) of the prediction, as Keras layers pass it on: which of its positions count
    """

    target: Any = None
    weight: Any = None
    mask: Any = None

    def valid(self, f: np.ndarray) -> np.ndarray | None:
        """The mask, one entry a position of f."""
        return None if self.mask is None else mask_like(self.mask.astype(bool), f)


@dataclass(frozen=True)
class Objective:
    """A loss whose Fisher is known.

    core     the per-example loss
    value    (target, prediction, sample weight or None) -> 0-d tensor, differentiable
    share    (prediction, target, mask of its positions, weight) -> n, what the core's sum is divided by
    scale    what `compile` multiplies the loss with: the Fisher of c times a loss is c times its own
    keras    whether it is one of Keras's, which spreads weights from the last axis on
    mean     of a loss that is a sum, the share of its mean
    """

    core: Any
    value: Callable[[Any, Any, Any], Any]
    share: Callable[[np.ndarray, Any, Any, Any], float]
    scale: float = 1.0
    keras: bool = False
    mean: Callable[..., float] | None = None

    def draws(
        self, fisher: Callable, count: int, f: np.ndarray, y: Any, weight: Any, rng: Any, mask: Any = None
    ) -> Any:
        """Output gradients (draws, *f.shape) of one of the core's four Fishers; a weight w scales draws by sqrt(w), and
        they are zero where a mask (*f.shape[:-1]) is."""
        y = _target(self.core, f, y)
        if fisher is kf.monte_carlo:
            noise = kf.draw_noise(self.core, f.shape, count, rng)
            draws = kf.monte_carlo(self.core, f, noise, y, mask)
        elif fisher is kf.forward_only:
            return kf.forward_only(f)
        else:
            draws = fisher(self.core, f, y, mask)
        if self.scale != 1:
            draws = np.asarray(draws * (self.scale if fisher is kf.empirical else self.scale**0.5), f.dtype)
        if weight is None:
            return draws
        root = np.asarray(weight, f.dtype)
        # of the loss's own gradients a weight is a factor, of a square root of its Hessian its root is; the Fisher of
        # a loss with a negative weight, as of a policy gradient, is that of its size: `drawn` says so
        root = root if fisher is kf.empirical else np.sqrt(np.abs(root))
        root = root.reshape(weight.shape + (1,) * (f.ndim - weight.ndim))
        return draws * root

    @property
    def names(self) -> tuple[str, ...]:
        """Of the outputs: here one without a name."""
        return ("",)

    def heads(self, f: Any) -> dict[str, Any]:
        """Predictions by output; ValueError for what is not one tensor (batch, ..., outputs) with known axes."""
        return {"": checked(only(f))}

    def by_head(self, x: Any, heads: Any) -> list[Any]:
        """Targets or weights, one an output."""
        return [only(x)]

    def draws_of(self, fisher: Callable, count: int, f: list[np.ndarray], told: list[Told], rng: Any) -> list[Any]:
        """`draws` of each output."""
        one = told[0]
        return [self.draws(fisher, count, f[0], one.target, self._weight(f[0], one), rng, one.valid(f[0]))]

    def share_of(self, f: list[np.ndarray], told: list[Told]) -> float:
        """`share` of all outputs."""
        return self.share(f[0], told[0].target, told[0].valid(f[0]), told[0].weight)

    def averaged(self) -> Objective:
        """The mean of a loss that is a sum."""
        return self if self.mean is None else replace(self, share=self.mean)

    def present_of(self, f: list[np.ndarray], told: list[Told]) -> np.ndarray:
        """Which examples count, (batch,): those of no weight and with ignored labels alone are as none."""
        one = told[0]
        weight = self._weight(f[0], one)
        found = np.ones(len(f[0]), bool) if weight is None else np.any(weight.reshape(len(f[0]), -1), axis=1)
        ignored = self.core.ignore if isinstance(self.core, kf.SoftmaxCrossEntropy) else None
        if ignored is None or one.target is None:
            return found
        return found & np.any(_target(self.core, f[0], one.target).reshape(len(f[0]), -1) != ignored, axis=1)

    def drawless(self, fisher: Callable) -> bool:
        """Whether a Fisher makes no draws."""
        return fisher is kf.forward_only

    def _weight(self, f: np.ndarray, one: Told) -> np.ndarray | None:
        return None if one.weight is None else weight_like(one.weight, f, one.target, self.keras)


def only(x: Any) -> Any:
    """The tensor of a dict, list or tuple of one, as Keras takes it; anything else as it is."""
    leaves = tf.nest.flatten(x) if isinstance(x, Mapping | list | tuple) else []
    return leaves[0] if len(leaves) == 1 and tf.is_tensor(leaves[0]) else x


def checked(f: Any) -> Any:
    """One output; ValueError for what is none."""
    if not tf.is_tensor(f) or f.shape.rank is None or f.shape.rank < 2:
        raise ValueError(
            f"the model returns {f!r}; need one tensor (batch, ..., outputs), or several with a loss each: "
            f"kfaccore.Joint, or a dict of losses in compile"
        )
    return f


def single(loss: Any, fisher: Callable = kf.monte_carlo) -> Objective:
    """From a loss of kfaccore, or a Keras loss of one number on logits; ValueError for any other."""
    if fisher not in FISHERS:
        raise ValueError(f"fisher is {fisher!r}; need one of kfaccore's {[f.__name__ for f in FISHERS]}")
    if isinstance(loss, CORE):
        return Objective(loss, _value(loss), lambda f, y, mask, w: float(loss.normaliser(f, _target(loss, f, y), mask)))
    if loss is None:
        raise ValueError("there is no loss; compile the model with a Keras loss on logits")
    kind = type(loss) if isinstance(loss, keras.losses.Loss) else keras.losses.get(loss)
    kind = FUNCTIONS.get(kind, kind)
    if kind not in TABLE:
        known = sorted(k.__name__ for k in TABLE)
        given = f"of the class {type(loss).__qualname__}" if isinstance(loss, keras.losses.Loss) else repr(loss)
        raise ValueError(f"loss {given} has no Fisher here; need a loss of kfaccore or one of Keras's {known}")
    squared = kind is keras.losses.MeanSquaredError
    if not squared and not _option(loss, "from_logits"):
        raise ValueError(
            f"{kind.__name__} is taken of probabilities; end the model linearly and set from_logits=True: "
            f"loss=keras.losses.{kind.__name__}(from_logits=True)"
        )
    if _option(loss, "axis") not in (None, -1):
        axis = _option(loss, "axis")
        raise ValueError(f"{kind.__name__} has axis {axis}; need outputs on the last one, axis=-1: permute them")
    reduction = reduction_of(kind.__name__, loss)
    soft = kind is keras.losses.CategoricalCrossentropy or _option(loss, "label_smoothing")
    if soft and fisher is kf.empirical:
        raise ValueError(f"the empirical Fisher of {kind.__name__} needs hard labels; sample them: fisher=monte_carlo")
    core, outputs = TABLE[kind](loss)
    n, mean = (share(one, core, outputs, partial(_target, core)) for one in (reduction, REDUCTIONS[0]))
    function = loss if isinstance(loss, keras.losses.Loss) else keras.losses.MeanSquaredError()
    value = lambda y, f, w: function(only(y), only(f), sample_weight=only(w))  # noqa: E731
    return Objective(core, value, n, keras=True, mean=mean if reduction == "sum" else None)


def _target(core: Any, f: np.ndarray, y: np.ndarray | None) -> Any:
    """Labels as integers of the prediction's positions, of one-hot rows the largest; other targets like f."""
    if y is None:
        return None
    if not isinstance(core, kf.SoftmaxCrossEntropy):
        return target_like(y, f)
    if y.shape == f.shape:
        return np.argmax(y, axis=-1)
    return np.asarray(y, np.int64).reshape(f.shape[:-1])


def _option(loss: Any, name: str) -> Any:
    return getattr(loss, name, getattr(loss, "_fn_kwargs", {}).get(name))


def _value(loss: Any) -> Callable:
    """The mean of a core loss for TensorFlow, over the positions that a mask of the prediction leaves: value and
    gradient come from the core. 0 where nothing counts."""

    def both(f: Any, y: Any, *masks: Any) -> tuple[Any, Any]:
        f = to_numpy(f)
        y = _target(loss, f, to_numpy(y))
        mask = mask_like(to_numpy(masks[0]), f) if masks else None
        n = float(loss.normaliser(f, y, mask)) or 1.0
        return to_tensor(loss.value(f, y, mask) / n), to_tensor(loss.gradient(f, y, mask) / n)

    def value(y: Any, f: Any, weight: Any) -> Any:
        if weight is not None:
            raise ValueError("a loss of kfaccore takes no sample weights; use the Keras loss")
        y, f = only(y), only(f)
        mask = mask_of(f)

        @tf.custom_gradient
        def mean(f: Any) -> tuple[Any, Callable]:
            wide = tf.float32 if f.dtype in (tf.float16, tf.bfloat16) else f.dtype
            given = [f, y] if mask is None else [f, y, tf.cast(mask, tf.bool)]
            total, gradient = asked(both, given, [wide, wide])
            total.set_shape(())
            gradient.set_shape(f.shape)
            return total, lambda upstream: tf.cast(upstream * gradient, f.dtype)

        return mean(f)

    return value


def mask_of(f: Any) -> Any:
    """The mask that Keras layers passed on to a prediction, under which losses average; or None."""
    return getattr(f, "_keras_mask", None)


def _sparse(loss: Any) -> tuple[Any, Callable]:
    return kf.SoftmaxCrossEntropy(ignore=_option(loss, "ignore_class")), lambda f: 1


# the core's, and what Keras has the mean of a position over
TABLE: dict[Any, Callable[[Any], tuple[Any, Callable]]] = {
    keras.losses.SparseCategoricalCrossentropy: _sparse,
    keras.losses.CategoricalCrossentropy: lambda loss: (kf.SoftmaxCrossEntropy(), lambda f: 1),
    keras.losses.BinaryCrossentropy: lambda loss: (kf.Bernoulli(), lambda f: f.shape[-1]),
    # (f - y)^2 is twice the core's
    keras.losses.MeanSquaredError: lambda loss: (kf.Gaussian(), lambda f: f.shape[-1] / 2),
}
FUNCTIONS = {  # what a name such as "mse" stands for
    keras.losses.sparse_categorical_crossentropy: keras.losses.SparseCategoricalCrossentropy,
    keras.losses.categorical_crossentropy: keras.losses.CategoricalCrossentropy,
    keras.losses.binary_crossentropy: keras.losses.BinaryCrossentropy,
    keras.losses.mean_squared_error: keras.losses.MeanSquaredError,
}
