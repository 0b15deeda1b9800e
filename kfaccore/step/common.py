"""The common factor of the gradients that a step is given and of the loss's own: 1, but for what a loop does to them.

A loop that clips by the norm, scales its loss or averages over ranks hands on c g for the loss's gradient g, and the
own shares are of g. <c g, x> over <g, x> shows c for any x; output by output it also shows whether there is one: a
penalty that joined the gradient, or a clip by entries, gives each output another. Then the shares stand as they are.
Cost: rows d_out a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kfaccore.precondition.comm import Communicator
from kfaccore.record import Factored, Record
from kfaccore.record.jacobian import pulled
from kfaccore.xp.arrays import Array, namespace
from kfaccore.xp.numbers import Number, finite, number, pick, stack

_FEW = 4  # outputs: too few to tell, where all entries cost no more than the outputs of a wide layer
_APART = 0.02  # of the gradients, relative: what rounding of half precision and a small penalty leave


class Compared(NamedTuple):
    """Of one layer, in parts: n_given <given, x>, n_own <own, x>, and n, the share of the loss of the own rows."""

    given: Array
    own: Array
    n: Number
    n_own: Number
    n_given: Number


def compared(own: Record, n: Number, grad: Array | Factored, x: Array, z: Array, rows: Array) -> Compared:
    """The parts of one layer, none of them read: its outputs, or entries where it has few outputs.

    n      share of the loss of the examples that the own record is of, whatever its own n: ranks add n g / own.n
    z      V a of the own record's rows for V = x, (blocks, batch, shared, d_out)
    rows   the same of the rows of a gradient not multiplied out
    """
    xp = namespace(own.g)
    if own.blocks * own.d_out <= _FEW:
        dense = grad.dense() if isinstance(grad, Factored) else grad
        given = xp.reshape(dense, x.shape) * x
        return Compared(_flat(given), _flat(pulled(own, own.g[0, ...]) * x), n, own.n, 1.0)
    mine = _flat(xp.sum(own.g[0, ...] * z, axis=(1, 2)))
    if isinstance(grad, Factored):
        return Compared(_flat(xp.sum(grad.g * rows, axis=(1, 2))), mine, n, own.n, grad.n)
    return Compared(_flat(xp.vecdot(xp.reshape(grad, x.shape), x)), mine, n, own.n, 1.0)


def factor(parts: Sequence[Compared], comm: Communicator) -> Number:
    """c of given = c own, by least squares over all parts that were read; 1 where that leaves too much, or anything is
    not finite."""
    # gradients are of the whole batch already
    sums = comm.all_reduce([[part.own * (part.n / part.n_own), stack([part.n])] for part in parts])
    pairs = [(part.given / part.n_given, own / n) for part, (own, n) in zip(parts, sums, strict=True)]
    square, cross, of_own = (
        sum(number(namespace(x).sum(x)) for x in of)
        for of in ([g * g for g, _ in pairs], [g * h for g, h in pairs], [h * h for _, h in pairs])
    )
    some = (of_own > 0) & (cross > 0)
    c = pick(some, cross / pick(some, of_own, 1.0), 1.0)
    return pick(some & finite(c) & (square - c * cross <= _APART**2 * square), c, 1.0)


def _flat(x: Array) -> Array:
    return namespace(x).reshape(x, (-1,))
