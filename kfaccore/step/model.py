"""The exact quadratic model of the loss along given directions, from records alone.

All layers must come from one batch with the same draws. Source: Martens & Grosse 2015 (1503.05671), section 7.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kfaccore.jacobian import outputs
from kfaccore.record import Factored, Ids, Record
from kfaccore.xp.arrays import Array, is_tracer, namespace
from kfaccore.xp.numbers import Number, number, numbers, stack


@dataclass(frozen=True)
class Expansion:
    """Along directions v_i: F[i, j] = v_i^T F v_j and down[i] = <gradient, v_i>, float64 on the host; under tracing
    arrays of the widest dtype JAX has.

    empirical   whether the one draw of every layer adds up to the gradient itself: true labels, not model samples
    """

    F: Array
    down: Array
    empirical: bool | Array


def expansion(records: dict[str, Record], grads: dict[str, Any], directions: tuple[dict[str, Array], ...]) -> Expansion:
    """The quadratic model over all layers; a Factored gradient of the record's own rows shares their products."""
    n, down = number(next(iter(records.values())).n), stack([0.0] * len(directions))
    parts, empirical = [], True
    for name in directions[0]:
        record, grad, vs = records[name], grads[name], [v[name] for v in directions]
        xp = namespace(record.g)
        z = outputs(record, *vs)
        Jv = [numbers(xp.sum(xp.vecdot(record.g, x[None, ...]), axis=(1, 3))) for x in z]
        Jv = namespace(*Jv).stack(Jv)
        if isinstance(grad, Factored):
            z = z if _same_rows(grad, record) else outputs(Record(grad.a, grad.g, grad.n), *vs)
            slopes = stack([number(xp.sum(grad.g * x)) for x in z]) / number(grad.n)
        else:
            slopes = stack([inner({name: grad}, {name: v}) for v in vs])
        gap = abs(Jv[0].sum() / n - slopes[0])
        empirical = (record.draws == 1) & (gap <= 1e-4 * abs(slopes[0])) & empirical
        parts.append(Jv.reshape(len(vs), -1))
        down = down + slopes
    u = sum(parts[1:], parts[0])
    return Expansion(u @ u.T / n, down, (down != 0).any() & empirical)


def inner(first: dict[str, Array], second: dict[str, Array]) -> Number:
    """<first, second> over the layers of `second`, accumulated over layers in float64."""
    total = 0.0
    for name, v in second.items():
        xp = namespace(v)
        total = total + number(xp.vecdot(xp.reshape(first[name], (-1,)), xp.reshape(v, (-1,))))
    return total


def trace(record: Record) -> Number:
    """tr(A) tr(G) of one record, summed over blocks."""
    xp = namespace(record.g)
    a, g = record.rows(), record.g
    rows = float(record.batch * record.shared)
    if record.mask is not None:
        rows = number(xp.sum(xp.astype(record.mask, g.dtype)))
    tr_a, tr_g = numbers(xp.sum(a * a, axis=(1, 2, 3))) / rows, numbers(xp.sum(g * g, axis=(0, 2, 3, 4)))
    return number((tr_a * tr_g).sum()) / number(record.n)


def _same_rows(grad: Factored, record: Record) -> bool:
    """Under tracing only where they are one array; XLA merges the products of equal ones."""
    a = record.a
    if isinstance(a, Ids) or tuple(grad.a.shape) != (record.blocks, record.batch, record.shared, record.d_in):
        return False
    if is_tracer(grad.a) or is_tracer(record.g):
        return grad.a is a
    return bool(namespace(grad.a).all(grad.a == record.rows()))
