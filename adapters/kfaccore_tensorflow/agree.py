"""A loss that a model computes itself beside the one its Fisher is of: whether they are the same in the prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from kfaccore_tensorflow.bridge import asked, to_numpy, widened

Tensor = Any


def agreed(name: str, heads: Mapping[str, Tensor], own: Callable[[], Tensor], known: Callable[[], Tensor]) -> Tensor:
    """The loss `own`, behind a look at its gradients in the predictions: InvalidArgumentError where they are not those
    of `known`, whose Fisher the step has.

    name   of the model's class
    """
    values = list(heads.values())
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(values)
        found = own()
        other = known()
    zero = tf.UnconnectedGradients.ZERO
    pairs = [widened(g) for loss in (found, other) for g in tape.gradient(loss, values, unconnected_gradients=zero)]
    coarse = max(f.dtype.as_numpy_dtype(0).dtype.itemsize < 4 for f in values)

    def compare(*given: Tensor) -> bool:
        arrays = [np.ravel(to_numpy(g)) for g in given]
        half = len(arrays) // 2
        _same(name, np.concatenate(arrays[:half]), np.concatenate(arrays[half:]), coarse)
        return True

    with tf.control_dependencies([asked(compare, [tf.stop_gradient(g) for g in pairs], tf.bool)]):
        return tf.identity(found)


def _same(name: str, own: np.ndarray, known: np.ndarray, coarse: bool) -> None:
    close = 0.02 if coarse else float(np.finfo(own.dtype).eps) ** 0.5
    own = own.astype(float)
    known = known.astype(float)
    size = float(np.linalg.norm(known))
    apart = float(np.linalg.norm(own - known))
    if not apart > close * max(size, float(np.linalg.norm(own))):
        return
    factor = float(own @ known) / size**2 if size else 0.0
    if factor > 0 and float(np.linalg.norm(own - factor * known)) <= close * float(np.linalg.norm(own)):
        raise ValueError(
            f"compute_loss of {name} is {factor:.6g} times the loss given to compile, whose Fisher the step has: "
            f"leave the factor out, and compile with loss_weights={factor:.6g} instead"
        )
    raise ValueError(
        f"compute_loss of {name} is another loss of the prediction than the one given to compile, whose Fisher the "
        f"step has: their gradients there differ by {apart:.3g} of {size:.3g}. Compile with that loss, give what it "
        f"weighs as sample_weight or loss_weights, and add what does not depend on the prediction alone by add_loss"
    )
