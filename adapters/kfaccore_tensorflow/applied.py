"""Updates as Keras's own train_step hands gradients to an optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf


def apply(optimizer: Any, new: Sequence[Any], variables: Sequence[Any]) -> None:
    """`new` in place of gradients: of a loss that was scaled as the optimizer asks for, since it takes that back."""
    one = tf.ones([], tf.float64)
    factor = optimizer.scale_loss(one)  # with `loss_scale_factor`, or a method of the optimizer's own
    if factor is not one:
        new = [_scaled(g, factor, v) for g, v in zip(new, variables, strict=True)]
    optimizer.apply_gradients(list(zip(new, variables, strict=True)))


def _scaled(gradient: Any, factor: Any, variable: Any) -> Any:
    if gradient is None or variable.overwrite_with_gradient:  # it becomes the variable, and is not scaled back
        return gradient
    return gradient * tf.cast(factor, gradient.dtype)
