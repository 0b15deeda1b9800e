"""The exact quadratic model of the loss along given directions, from records alone.

(J v) of an example and draw is a sum over layers and positions of g . (V a): no Jacobian product, no framework. All
layers must come from one batch with the same draws. Source: Martens & Grosse 2015 (1503.05671), section 7.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kfaccore.record import Factored, Ids, Record
from kfaccore.xp.arrays import Array, namespace, shared_first, to_host


def outputs(record: Record, *vs: Array) -> list[Array]:
    """V a of each position, (blocks, batch, shared, d_out), for each v (blocks, d_out, d_in) of this layer."""
    xp = namespace(record.g)
    v = xp.concat([v if v.ndim == 3 else v[None, ...] for v in vs], axis=1)
    if isinstance(record.a, Ids):
        z = xp.take(v[0, ...].mT, xp.reshape(record.a.index, (-1,)), axis=0)
    elif shared_first(record.a):
        a = xp.reshape(xp.moveaxis(record.a, -2, -3), (record.blocks, -1, record.d_in))
        z = xp.reshape(xp.matmul(a, v.mT), (record.blocks, record.shared, record.batch, -1))
        z = xp.moveaxis(z, -2, -3)
        return [z[..., i * record.d_out : (i + 1) * record.d_out] for i in range(len(vs))]
    else:
        z = xp.matmul(xp.reshape(record.rows(), (record.blocks, -1, record.d_in)), v.mT)
    z = xp.reshape(z, (record.blocks, record.batch, record.shared, -1))
    return [z[..., i * record.d_out : (i + 1) * record.d_out] for i in range(len(vs))]


def products(record: Record, *vs: Array) -> list[Array]:
    """J v of each draw and example, (draws, batch), for each v (blocks, d_out, d_in) of this layer."""
    xp = namespace(record.g)
    return [xp.sum(xp.vecdot(record.g, z[None, ...]), axis=(1, 3)) for z in outputs(record, *vs)]


@dataclass(frozen=True)
class Expansion:
    """Along directions v_i: F[i, j] = v_i^T F v_j and down[i] = <gradient, v_i>, float64 on the host.

    empirical   whether the one draw of every layer adds up to the gradient itself: true labels, not model samples
    """

    F: np.ndarray
    down: np.ndarray
    empirical: bool


def expansion(records: dict[str, Record], grads: dict[str, Any], directions: tuple[dict[str, Array], ...]) -> Expansion:
    """The quadratic model over all layers; a Factored gradient of the record's own rows shares their products."""
    n = float(next(iter(records.values())).n)
    parts, down, empirical = [], np.zeros(len(directions)), True
    for name in directions[0]:
        record, grad, vs = records[name], grads[name], [v[name] for v in directions]
        xp = namespace(record.g)
        z = outputs(record, *vs)
        Jv = np.stack([_host(xp.sum(xp.vecdot(record.g, x[None, ...]), axis=(1, 3))) for x in z])
        if isinstance(grad, Factored):
            z = z if _same_rows(grad, record) else outputs(Record(grad.a, grad.g, grad.n), *vs)
            slopes = np.array([float(_host(xp.sum(grad.g * x))) for x in z]) / float(grad.n)
        else:
            slopes = np.array([inner({name: grad}, {name: v}) for v in vs])
        gap = abs(Jv[0].sum() / n - slopes[0])
        empirical = empirical and record.draws == 1 and bool(gap <= 1e-4 * abs(slopes[0]))
        parts.append(Jv.reshape(len(vs), -1))
        down = down + slopes
    u = sum(parts[1:], parts[0])
    return Expansion(u @ u.T / n, down, empirical and bool(down.any()))


def inner(first: dict[str, Array], second: dict[str, Array]) -> float:
    """<first, second> over the layers of `second`, accumulated over layers in float64."""
    total = 0.0
    for name, v in second.items():
        xp = namespace(v)
        total += float(_host(xp.vecdot(xp.reshape(first[name], (-1,)), xp.reshape(v, (-1,)))))
    return total


def trace(record: Record) -> float:
    """tr(A) tr(G) of one record, summed over blocks."""
    xp = namespace(record.g)
    a, g = record.rows(), record.g
    rows = float(record.batch * record.shared)
    if record.mask is not None:
        rows = float(_host(xp.sum(xp.astype(record.mask, g.dtype))))
    tr_a, tr_g = _host(xp.sum(a * a, axis=(1, 2, 3))) / rows, _host(xp.sum(g * g, axis=(0, 2, 3, 4)))
    return float(np.sum(tr_a * tr_g)) / float(record.n)


def _same_rows(grad: Factored, record: Record) -> bool:
    a = record.a
    if isinstance(a, Ids) or tuple(grad.a.shape) != (record.blocks, record.batch, record.shared, record.d_in):
        return False
    return bool(namespace(grad.a).all(grad.a == record.rows()))


def _host(x: Array) -> np.ndarray:
    return to_host(x).astype(np.float64)
