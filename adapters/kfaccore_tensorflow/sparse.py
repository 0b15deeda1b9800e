"""Products of sparse rows and a weight: as one operation, and as Keras writes them, rows of the weight that are looked
up, multiplied with the stored values and summed by example. Their rows are those of the dense product."""

from __future__ import annotations

from string import ascii_letters

import tensorflow as tf

from kfaccore_tensorflow.kinds import Product
from kfaccore_tensorflow.terms import Terms
from kfaccore_tensorflow.uses import Hot, Operation, Tensor, Unread, Use

WIDEST = 1 << 16  # of rows that are written out
HANDED = ("Identity", "Cast")


def sparse_product(op: Operation, hot: Hot) -> Use:
    """`tf.sparse.sparse_dense_matmul` with the weight on the right."""
    indices, values, _, weight = op.inputs
    if weight is not hot.tensor:
        raise Unread("it is the stored values of a sparse tensor")
    if op.get_attr("adjoint_a"):
        raise Unread(f"{op.type} contracts the batch axis")
    terms = Terms("ri", "oi" if op.get_attr("adjoint_b") else "io", "ro")
    return _product(hot, terms, indices, values, op.outputs[0])


def summed_rows(use: Use, reach: set[str]) -> Use:
    """A look-up, as a product where its rows are weighed by a number each and then summed by segments, and are for
    nothing else that is in `reach`."""
    index: Tensor = use.x
    rows = use.out
    while True:
        op = _next(rows, reach)
        if op is None or op.type in ("Mul", "SegmentSum"):
            break
        if op.type == "GatherV2" and op.inputs[0] is rows and tf.get_static_value(op.inputs[2]) == 0:
            index = tf.gather(index, op.inputs[1])  # rows are looked up once each, and then as often as they stand
        elif op.type not in HANDED:
            return use
        rows = op.outputs[0]
    if op is None or op.type != "Mul":
        return use
    values = next((x for x in op.inputs if x is not rows), None)
    total = _next(op.outputs[0], reach)
    flat = rows.shape.rank == len(use.hot.layout.axes)  # one row an index
    lone = flat and values is not None and values.shape.rank == rows.shape.rank and values.shape[1:].num_elements() == 1
    if not lone or total is None or total.type != "SegmentSum":
        return use
    places = [tf.cast(tf.reshape(x, [-1]), tf.int64) for x in (total.inputs[1], index)]
    rest = ascii_letters[2 : 1 + len(use.hot.layout.axes)]
    return _product(use.hot, Terms("ab", "b" + rest, "a" + rest), tf.stack(places, 1), values, total.outputs[0])


def _product(hot: Hot, terms: Terms, places: Tensor, values: Tensor, out: Tensor) -> Use:
    wide = hot.layout.shape[terms.weight.index(terms.x[1])]
    if wide > WIDEST:
        raise Unread(f"it is multiplied with sparse rows of {wide} inputs, more than the {WIDEST} that are written out")
    shape = tf.cast(tf.stack([tf.shape(out)[0], wide]), tf.int64)
    x = tf.scatter_nd(places, tf.cast(tf.reshape(values, [-1]), out.dtype), shape)
    return Use(hot, terms.matrix(hot.layout), Product(terms), tf.ensure_shape(x, (out.shape[0], wide)), out)


def _next(tensor: Tensor, reach: set[str]) -> Operation | None:
    """The one operation that takes a tensor."""
    found = {op.name: op for op in tensor.consumers() if op.name in reach}
    return next(iter(found.values())) if len(found) == 1 else None
