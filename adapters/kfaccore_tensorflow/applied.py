"""Updates as Keras's own train_step hands gradients to an optimizer, of all variables that it would train."""

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


def moves_nothing(beside: Sequence[Any], gradients: Sequence[Any], name: str) -> None:
    """ValueError where variables beside those of the model of that name have a gradient, as Keras would train them."""
    moved = [v.path for v, g in zip(beside, gradients, strict=True) if g is not None]
    if moved:
        raise ValueError(
            f"the loss is made of {moved[:5]}, which are no variables of model {name!r}, the one that is trained: make "
            f"them part of it, with an output and a loss, or set trainable=False"
        )
