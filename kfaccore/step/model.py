"""The exact quadratic model of the loss along given directions, from records alone.

All layers must come from one batch with the same draws. Source: Martens & Grosse 2015 (1503.05671), section 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import NamedTuple

from kfaccore.convolution.patches import Patches
from kfaccore.linalg.grams import gram_of_inputs
from kfaccore.precondition.comm import Communicator, Serial
from kfaccore.record import Factored, Ids, Record
from kfaccore.record.jacobian import contracted, outputs
from kfaccore.step.common import Compared, compared, factor
from kfaccore.step.own import Left
from kfaccore.step.read import read_all
from kfaccore.xp.arrays import Array, is_tracer, namespace, scalar
from kfaccore.xp.numbers import Number, number, numbers, pick, stack

Penalty = float | Mapping[str, float]  # l2 of all layers, or {layer: l2}
Records = Mapping[str, Record | tuple[Record, ...]]  # a tuple: one a term of the loss


@dataclass(frozen=True)
class Expansion:
    """Along directions v_i: F[i, j] = v_i^T F v_j and down[i] = <gradient, v_i>, float64 on the host; under tracing
    arrays of the widest dtype JAX has.

    Where own shares were left out of the first direction: `batch` is F with them, `slope` what the layers that have any
    add to down[0] with them, `own` their part of it, `given` the factor of the gradients over the loss's own.
    """

    F: Array
    down: Array
    batch: Array | None = None
    slope: Number | None = None
    own: Number = 0.0
    given: Number = 1.0


def expansion(
    records: Mapping[str, Record],
    grads: Mapping[str, Array | Factored],
    directions: tuple[dict[str, Array], ...],
    comm: Communicator = Serial(),  # noqa: B008 frozen
    left: Left | None = None,
) -> Expansion:
    """The quadratic model over all layers; a Factored gradient of the record's own rows shares their products.

    Over several ranks records are each rank's own, gradients and directions those of the whole batch. What a layer
    does once for all examples, such as embedding their positions, has one row of J for them all: its products with
    layers of one row an example are left out of F.

    left   own shares of the first of two directions: J_b x becomes factor (J_b x - s_b / n), and <gradient, x> the
           like, but at least `least` of the batch's; F stays positive semidefinite. Where gradients are a multiple of
           the loss's own, as clipped ones, so is the direction made of them, and the shares with it
    """
    down = stack([0.0] * len(directions))
    known = down
    rows: dict[tuple[int, ...], Array] = {}  # J v of the layers by its shape: only equal batches may be added
    layers, seen = read_all(_layers(records, grads, directions, {} if left is None else left.own))
    for name, along in layers.items():
        Jv = namespace(*along.images).stack(along.images)
        u = namespace(Jv).reshape(Jv, (len(directions), -1))
        rows[u.shape] = rows[u.shape] + u if u.shape in rows else u
        slopes = stack(along.slopes) / along.unit
        down = down + slopes
        known = known + slopes if left is not None and left.of(name) else known
    n = stack([number(next(iter(records.values())).n)])
    if left is None:
        F, n = comm.all_reduce([reduce(add, (u @ u.mT for u in rows.values())), n])
        return Expansion(F / n, down)
    Q, n, q = comm.all_reduce([reduce(add, (_gram_with(u, left.s) for u in rows.values())), n, stack([left.q])])
    zero = 0.0 * n[0]
    c = factor(seen, comm) if seen else 1.0
    turn = stack([left.factor, zero, -left.factor * c / n[0], zero, 1.0 + zero, zero])
    T = namespace(turn).reshape(turn, (2, 3))
    own = number(c * c * q[0] / (n[0] * n[0]))
    slope = number(down[0])
    kept = left.factor * (slope - own)
    least = left.least * pick(slope > 0, slope, 0.0 * slope)
    down = stack([pick(kept > least, kept, least), number(down[1])])
    return Expansion(T @ Q @ T.mT / n, down, Q[:2, :2] / n, number(known[0]), own, c)


def _gram_with(u: Array, s: Array) -> Array:
    """u u^T (3, 3) with the shares s as a third row; zeros for rows that are not an example's each."""
    xp = namespace(u)
    third = xp.reshape(s, (1, -1))
    third = third if third.shape[1] == u.shape[1] else xp.zeros_like(u[:1, :])
    full = xp.concat([u, third])
    return full @ full.mT


def counts(records: Mapping[str, Record], comm: Communicator = Serial()) -> tuple[Number, Number]:  # noqa: B008 frozen
    """(draws x examples, examples) of the whole batch: how many numbers sample its curvature, and its noise."""
    found = [_examples(record) for record in records.values()]
    most = found[0]
    for other in found[1:]:
        most = pick(other > most, other, most)
    draws = max(record.draws for record in records.values())
    if comm.world == 1:
        return draws * most, most
    # each rank's product, as ranks may have other numbers of draws: one that nothing reached has stand-ins of one
    rows, examples = comm.all_reduce([stack([number(draws * most), number(most)])])[0]
    return number(rows), number(examples)


def _examples(record: Record) -> Number:
    """Examples with a valid position."""
    if record.mask is None:
        return record.batch
    xp = namespace(record.g)
    return number(xp.sum(xp.astype(xp.any(record.mask, axis=1), record.g.dtype)))


class _Along(NamedTuple):
    """Of one layer: J v of each direction, (draws, batch), and <gradient, v> of each times `unit`."""

    images: list[Array]
    slopes: list[Array]
    unit: Number


def _layers(
    records: Mapping[str, Record],
    grads: Mapping[str, Array | Factored],
    directions: tuple[dict[str, Array], ...],
    own: Mapping[str, Record],
) -> tuple[dict[str, _Along], list[Compared]]:
    """What each layer adds to the model, and its gradient beside its own record's; nothing of it is read yet."""
    names = list(directions[0])
    same = read_all({name: _same_rows(grads[name], records[name]) for name in names})
    layers = {}
    seen = []
    for name in names:
        record = records[name]
        grad = grads[name]
        vs = [v[name] for v in directions]
        z = outputs(record, *vs)
        # V a of the rows of a gradient not multiplied out, where they are others than the record's
        rows = outputs(Record(grad.a, grad.g, grad.n), *vs) if isinstance(grad, Factored) and not same[name] else z
        if name in own:
            seen.append(compared(own[name], record.n, grad, vs[0], z[0], rows[0]))
        layers[name] = _along(record, grad, vs, z, rows)
    return layers, seen


def _along(record: Record, grad: Array | Factored, vs: list[Array], z: list[Array], of_gradient: list[Array]) -> _Along:
    """Of one layer, given V a of both rows."""
    images = [contracted(record, x) for x in z]
    if isinstance(grad, Factored):
        xp = namespace(record.g)
        return _Along(images, [xp.sum(grad.g * x) for x in of_gradient], grad.n)
    return _Along(images, [_dot(grad, v) for v in vs], 1.0)


def weighed(l2: Mapping[str, float], v: Mapping[str, Array]) -> dict[str, Array]:
    """Each layer's part times its l2: the curvature of the penalty times v."""
    return {name: scalar(l2[name], x) * x for name, x in v.items()}


def inner(first: Mapping[str, Array], second: Mapping[str, Array]) -> Number:
    """<first, second> over the layers of `second`, accumulated over layers in float64."""
    return inners((first, second))[0]


def inners(*pairs: tuple[Mapping[str, Array], Mapping[str, Array]]) -> list[Number]:
    """`inner` of each pair."""
    found = read_all([[_dot(first[name], v) for name, v in second.items()] for first, second in pairs])
    return [sum(products, 0.0) for products in found]


def _dot(x: Array, y: Array) -> Array:
    xp = namespace(y)
    return xp.vecdot(xp.reshape(x, (-1,)), xp.reshape(y, (-1,)))


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
    g = record.g
    rows = float(record.batch * record.shared)
    if record.mask is not None:
        rows = number(xp.sum(xp.astype(record.mask, g.dtype)))
    tr_a = numbers(xp.sum(gram_of_inputs(record, diagonal=True), axis=-1))
    tr_g = numbers(xp.sum(g * g, axis=(0, 2, 3, 4)))
    return [tr_a, tr_g, stack([rows, number(record.n)])]


def _same_rows(grad: Array | Factored, record: Record) -> bool | Array:
    """Whether a gradient not multiplied out is of the record's rows: under tracing only where they are one array; XLA
    merges the products of equal ones."""
    a = record.a
    if not isinstance(grad, Factored) or isinstance(a, Ids | Patches):
        return False
    if tuple(grad.a.shape) != (record.blocks, record.batch, record.shared, record.d_in):
        return False
    if grad.a is a or is_tracer(grad.a) or is_tracer(record.g):
        return grad.a is a
    return namespace(grad.a).all(grad.a == a)
