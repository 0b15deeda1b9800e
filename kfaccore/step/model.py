"""The exact quadratic model of the loss along given directions, from records alone.

All layers must come from one batch with the same draws. Source: Martens & Grosse 2015 (1503.05671), section 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add

from kfaccore.precondition.comm import Communicator, Serial
from kfaccore.record import Factored, Ids, Record
from kfaccore.record.jacobian import contracted, outputs
from kfaccore.xp.arrays import Array, is_tracer, namespace, scalar
from kfaccore.xp.numbers import Number, number, numbers, stack

Penalty = float | Mapping[str, float]  # l2 of all layers, or {layer: l2}
Records = Mapping[str, Record | tuple[Record, ...]]  # a tuple: one a term of the loss


@dataclass(frozen=True)
class Expansion:
    """Along directions v_i: F[i, j] = v_i^T F v_j and down[i] = <gradient, v_i>, float64 on the host; under tracing
    arrays of the widest dtype JAX has."""

    F: Array
    down: Array


def expansion(
    records: Mapping[str, Record],
    grads: Mapping[str, Array | Factored],
    directions: tuple[dict[str, Array], ...],
    comm: Communicator = Serial(),  # noqa: B008 frozen
) -> Expansion:
    """The quadratic model over all layers; a Factored gradient of the record's own rows shares their products.

    Over several ranks records are each rank's own, gradients and directions those of the whole batch. What a layer
    does once for all examples, such as embedding their positions, has one row of J for them all: its products with
    layers of one row an example are left out of F.
    """
    down = stack([0.0] * len(directions))
    rows: dict[tuple[int, ...], Array] = {}  # J v of the layers by its shape: only equal batches may be added
    for name in directions[0]:
        record = records[name]
        Jv, slopes = _along(name, record, grads[name], [v[name] for v in directions])
        u = namespace(Jv).reshape(Jv, (len(directions), -1))
        rows[u.shape] = rows[u.shape] + u if u.shape in rows else u
        down = down + slopes
    F = reduce(add, (u @ u.mT for u in rows.values()))
    n = stack([number(next(iter(records.values())).n)])
    F, n = comm.all_reduce([F, n])
    return Expansion(F / n, down)


def _along(name: str, record: Record, grad: Array | Factored, vs: list[Array]) -> tuple[Array, Array]:
    """J v of one layer, (directions, draws, batch), and <gradient, v>, (directions,)."""
    z = outputs(record, *vs)
    images = [numbers(contracted(record, x)) for x in z]
    Jv = namespace(*images).stack(images)
    if isinstance(grad, Factored):
        z = z if _same_rows(grad, record) else outputs(Record(grad.a, grad.g, grad.n), *vs)
        xp = namespace(record.g)
        slopes = stack([number(xp.sum(grad.g * x)) for x in z]) / number(grad.n)
    else:
        slopes = stack([inner({name: grad}, {name: v}) for v in vs])
    return Jv, slopes


def weighed(l2: Mapping[str, float], v: Mapping[str, Array]) -> dict[str, Array]:
    """Each layer's part times its l2: the curvature of the penalty times v."""
    return {name: scalar(l2[name], x) * x for name, x in v.items()}


def inner(first: Mapping[str, Array], second: Mapping[str, Array]) -> Number:
    """<first, second> over the layers of `second`, accumulated over layers in float64."""
    total: Number = 0.0
    for name, v in second.items():
        xp = namespace(v)
        total = total + number(xp.vecdot(xp.reshape(first[name], (-1,)), xp.reshape(v, (-1,))))
    return total


def trace(records: Mapping[str, Record], comm: Communicator = Serial()) -> Number:  # noqa: B008 frozen
    """tr(A) tr(G) of all layers and their blocks, of the whole batch where records are each rank's own."""
    total: Number = 0.0
    for tr_a, tr_g, counts in comm.all_reduce([_traces(record) for record in records.values()]):
        rows, n = counts
        products = tr_a / rows * tr_g
        total = total + number(namespace(products).sum(products) / n)
    return total


def _traces(record: Record) -> list[Array]:
    """Sums of |a|^2 and |g|^2 of each block, and (rows, n) they are averages over."""
    xp = namespace(record.g)
    a = record.rows()
    g = record.g
    rows = float(record.batch * record.shared)
    if record.mask is not None:
        rows = number(xp.sum(xp.astype(record.mask, g.dtype)))
    tr_a = numbers(xp.sum(a * a, axis=(1, 2, 3)))
    tr_g = numbers(xp.sum(g * g, axis=(0, 2, 3, 4)))
    return [tr_a, tr_g, stack([rows, number(record.n)])]


def _same_rows(grad: Factored, record: Record) -> bool:
    """Under tracing only where they are one array; XLA merges the products of equal ones."""
    a = record.a
    if isinstance(a, Ids) or tuple(grad.a.shape) != (record.blocks, record.batch, record.shared, record.d_in):
        return False
    if is_tracer(grad.a) or is_tracer(record.g):
        return grad.a is a
    return bool(namespace(grad.a).all(grad.a == record.rows()))
