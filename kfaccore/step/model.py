"""The exact quadratic model of the loss along given directions, from records alone.

(J v) of an example and draw is a sum over layers and positions of g . (V a): no Jacobian product, no framework. All
layers must come from one batch with the same draws. Source: Martens & Grosse 2015 (1503.05671), section 7.
"""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any

import numpy as np

from kfaccore.record import Factored, Ids, Record
from kfaccore.xp.arrays import Array, namespace, to_host


def products(record: Record, *vs: Array) -> list[Array]:
    """J v of each draw and example, (draws, batch), for each v (blocks, d_out, d_in) of this layer."""
    xp = namespace(record.g)
    v = xp.concat([v if v.ndim == 3 else v[None, ...] for v in vs], axis=1)
    if isinstance(record.a, Ids):
        index = xp.reshape(record.a.index, (-1,))
        z = xp.reshape(xp.take(v[0, ...].mT, index, axis=0), (1, record.batch, record.shared, -1))
    else:
        z = xp.matmul(record.rows(), v.mT[:, None, :, :])
    parts = (z[..., i * record.d_out : (i + 1) * record.d_out] for i in range(len(vs)))
    return [xp.sum(xp.vecdot(record.g, part[None, ...]), axis=(1, 3)) for part in parts]


def curvature(records: dict[str, Any], directions: list[dict[str, Array]]) -> np.ndarray:
    """v_i^T F v_j for every pair of directions over all layers, float64 on the host; records or tuples, one a term."""
    names = list(directions[0])
    terms = [records[name] if isinstance(records[name], tuple) else (records[name],) for name in names]
    total = np.zeros((len(directions),) * 2)
    for batch in zip(*terms, strict=True):
        layers = [products(r, *(v[name] for v in directions)) for name, r in zip(names, batch, strict=True)]
        u = np.stack([to_host(reduce(add, column)).astype(np.float64).ravel() for column in zip(*layers, strict=True)])
        total += u @ u.T / float(batch[0].n)
    return total


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
