"""How a weight is changed on its way, each element by itself: the slope of every operation there, and their product.

Asked of one operation at a time, at its own tensors: a gradient of the whole graph would be walked once a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import pi, prod
from typing import Any

import numpy as np
import tensorflow as tf

from kfaccore_tensorflow.layout import Layout

Tensor = Any
Operation = Any
Slope = Callable[[Operation, Tensor, Tensor], Tensor]

_SELU = (1.0507009873554805, 1.6732632423543772)  # scale and alpha of the paper


def _one(x: Tensor) -> Tensor:
    return tf.ones_like(x)


# of y = f(x), from the operation, x and y
FUNCTIONS: dict[str, Slope] = {
    "Neg": lambda op, x, y: tf.constant(-1, x.dtype),
    "Exp": lambda op, x, y: y,
    "Expm1": lambda op, x, y: y + 1,
    "Log": lambda op, x, y: 1 / x,
    "Log1p": lambda op, x, y: 1 / (1 + x),
    "Softplus": lambda op, x, y: tf.sigmoid(x),
    "Sigmoid": lambda op, x, y: y * (1 - y),
    "Tanh": lambda op, x, y: 1 - y * y,
    "Softsign": lambda op, x, y: 1 / tf.square(1 + tf.abs(x)),
    "Erf": lambda op, x, y: tf.exp(-x * x) * tf.constant(2 / pi**0.5, x.dtype),
    "Square": lambda op, x, y: 2 * x,
    "Sqrt": lambda op, x, y: 0.5 / y,
    "Rsqrt": lambda op, x, y: -0.5 * y / x,
    "Reciprocal": lambda op, x, y: -y * y,
    "Inv": lambda op, x, y: -y * y,
    "Abs": lambda op, x, y: tf.sign(x),
    "Sin": lambda op, x, y: tf.cos(x),
    "Cos": lambda op, x, y: -tf.sin(x),
    "Relu": lambda op, x, y: tf.cast(x > 0, x.dtype),
    "Relu6": lambda op, x, y: tf.cast((x > 0) & (x < 6), x.dtype),
    "LeakyRelu": lambda op, x, y: tf.where(x > 0, _one(x), tf.constant(op.get_attr("alpha"), x.dtype)),
    "Elu": lambda op, x, y: tf.where(x > 0, _one(x), y + 1),
    "Selu": lambda op, x, y: _SELU[0] * tf.where(x > 0, _one(x), y / _SELU[0] + _SELU[1]),
}


def _product(op: Operation, x: Tensor, y: Tensor) -> Tensor:
    return 2 * x if op.inputs[0] is op.inputs[1] else _other(op, x)


def _sum(op: Operation, x: Tensor, y: Tensor) -> Tensor:
    return tf.constant(2 if op.inputs[0] is op.inputs[1] else 1, x.dtype)


def _difference(op: Operation, x: Tensor, y: Tensor) -> Tensor:
    twice = op.inputs[0] is op.inputs[1]
    return tf.constant(0 if twice else 1 if op.inputs[0] is x else -1, x.dtype)


def _quotient(op: Operation, x: Tensor, y: Tensor) -> Tensor:
    if op.inputs[0] is op.inputs[1]:
        return tf.constant(0, x.dtype)
    return 1 / op.inputs[1] if op.inputs[0] is x else -y / x


def _other(op: Operation, x: Tensor) -> Tensor:
    return op.inputs[1] if op.inputs[0] is x else op.inputs[0]


# of two operands, x one of them or both
BINARY: dict[str, Slope] = {
    "Mul": _product,
    "Add": _sum,
    "AddV2": _sum,
    "Sub": _difference,
    "RealDiv": _quotient,
}


@dataclass(frozen=True)
class Factor:
    """One operation on the way. `layout`: where the elements of its output sit in the variable."""

    op: Operation
    x: Tensor
    layout: Layout

    def slope(self) -> Tensor:
        """Of its output in the variable's element, a tensor that spreads to the output's shape."""
        rule = FUNCTIONS.get(self.op.type) or BINARY[self.op.type]
        return rule(self.op, self.x, self.op.outputs[0])


Path = tuple[Factor, ...]


def change(paths: Sequence[Sequence[Layout]], slopes: Sequence[np.ndarray], shape: Sequence[int]) -> np.ndarray:
    """d use / d variable, each element by itself and like the variable: the sum over paths of the product of slopes.

    slopes   of the factors of all paths in turn; `paths` are their layouts
    """
    given = iter(slopes)
    total: np.ndarray | None = None
    for path in paths:
        product: np.ndarray | None = None
        for layout in path:
            slope = np.broadcast_to(next(given), layout.shape)
            placed = np.zeros(prod(shape), slope.dtype)
            layout.put(placed, slope)
            product = placed if product is None else product * placed
        one = np.ones(prod(shape), slopes[0].dtype) if product is None else product
        total = one if total is None else total + one
    assert total is not None
    return total.reshape(tuple(shape))
