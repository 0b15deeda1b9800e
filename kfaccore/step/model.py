"""The exact quadratic model of the loss along given directions, from records alone.

All layers must come from one batch with the same draws. Source: Martens & Grosse 2015 (1503.05671), section 7.
"""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any

import numpy as np

from kfaccore.jacobian import products
from kfaccore.record import Factored, Record
from kfaccore.xp.arrays import Array, namespace, to_host


def curvature(records: dict[str, Record], directions: list[dict[str, Array]]) -> np.ndarray:
    """v_i^T F v_j for every pair of directions over all layers, float64 on the host."""
    layers = [products(records[name], *(v[name] for v in directions)) for name in directions[0]]
    u = np.stack([to_host(reduce(add, column)).astype(np.float64).ravel() for column in zip(*layers, strict=True)])
    n = float(next(iter(records.values())).n)
    return u @ u.T / n


def slope(grads: dict[str, Any], direction: dict[str, Array]) -> float:
    """<gradient, direction> over all layers, in float64."""
    total = 0.0
    for name, v in direction.items():
        grad = grads[name]
        if isinstance(grad, Factored):
            pair = Record(grad.a, grad.g, grad.n)
            total += float(to_host(namespace(v).sum(products(pair, v)[0]))) / float(grad.n)
        else:
            total += inner({name: grad}, {name: v})
    return total


def inner(first: dict[str, Array], second: dict[str, Array]) -> float:
    """<first, second> over all layers, in float64."""
    total = 0.0
    for name, v in second.items():
        xp = namespace(v)
        total += float(to_host(xp.sum(xp.reshape(first[name], v.shape) * v)))
    return total
