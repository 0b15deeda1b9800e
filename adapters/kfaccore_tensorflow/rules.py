"""What each operation of TensorFlow does with a weight: the matrix of the equation, and how its rows are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import tensorflow as tf

from kfaccore import Window
from kfaccore_tensorflow.kinds import Convolution, Elementwise, Lookup, Product
from kfaccore_tensorflow.layout import Layout, Matrix
from kfaccore_tensorflow.sparse import sparse_product
from kfaccore_tensorflow.terms import Terms, einsum_terms, matmul_terms
from kfaccore_tensorflow.uses import ELEMENTWISE, Hot, Operation, Tensor, Unread, Use

WIDE = 1024  # elements of a parameter that is used elementwise: above it, one block for each of its vectors


def read(op: Operation, hot: Hot) -> Use:
    """The use that `op` makes of it; Unread, with the reason, where it is none that has a record."""
    if op.type not in RULES:
        raise Unread(REASONS.get(op.type, f"it goes into {op.type}, which is no product, sum, look-up or convolution"))
    use = RULES[op.type](op, hot)
    if hot.changed == ELEMENTWISE and not isinstance(use.kind, Elementwise):
        raise Unread(f"each element of it is changed before {op.type}")
    return use


def _other(op: Operation, hot: Hot) -> tuple[int, Tensor]:
    """The place of the weight among two operands, and the other one."""
    places = [i for i, x in enumerate(op.inputs[:2]) if x is hot.tensor]
    if len(places) != 1:
        raise Unread(f"both operands of {op.type} are made of it")
    return places[0], op.inputs[1 - places[0]]


def _product(op: Operation, hot: Hot, terms: Terms, x: Tensor) -> Use:
    reason = terms.refusal()
    if reason:
        raise Unread(f"{op.type} {reason}: it is not one matrix a block")
    return Use(hot, terms.matrix(hot.layout), Product(terms), x, op.outputs[0])


def _matmul(op: Operation, hot: Hot) -> Use:
    place, x = _other(op, hot)
    batched = op.type != "MatMul"
    names = ("adj_x", "adj_y") if batched else ("transpose_a", "transpose_b")
    turned = (bool(op.get_attr(names[0])), bool(op.get_attr(names[1])))
    terms = matmul_terms((op.inputs[0].shape.rank, op.inputs[1].shape.rank), turned, place)
    squeezed = [
        i for i, (size, c) in enumerate(zip(hot.layout.shape, terms.weight, strict=True)) if size == 1 and c.isupper()
    ]
    if squeezed:  # leading axes of size 1 meet any size: they are none
        axes = tuple(axis for i, axis in enumerate(hot.layout.axes) if i not in squeezed)
        hot = hot.on(hot.tensor, Layout(hot.layout.offset, axes))
        terms = replace(terms, weight="".join(c for i, c in enumerate(terms.weight) if i not in squeezed))
    if any(size == 1 and c.isupper() and c in terms.weight for size, c in zip(x.shape, terms.x, strict=True)):
        raise Unread(f"{op.type} broadcasts the other operand over the weight")
    return _product(op, hot, terms, x)


def _einsum(op: Operation, hot: Hot) -> Use:
    if len(op.inputs) != 2:
        raise Unread("it goes into an einsum of one operand")
    place, x = _other(op, hot)
    equation = op.get_attr("equation").decode()
    ranks = (op.inputs[0].shape.rank, op.inputs[1].shape.rank)
    return _product(op, hot, einsum_terms(equation, ranks, place), x)


def _gather(op: Operation, hot: Hot) -> Use:
    if op.inputs[0] is not hot.tensor:
        raise Unread("its values are indices")
    axis = 0 if len(op.inputs) < 3 else tf.get_static_value(op.inputs[2])
    if axis is None or int(axis) % len(hot.layout.axes) or op.get_attr("batch_dims"):
        raise Unread("rows of it are gathered along another axis than the first")
    layout = hot.layout
    matrix = Matrix.split(layout, (), range(1, len(layout.axes)), (0,))
    return Use(hot, matrix, Lookup(layout.shape[0]), op.inputs[1], op.outputs[0])


def _spatial(op: Operation, name: str) -> tuple[int, ...]:
    """An attribute of every axis, for the spatial ones."""
    values = op.get_attr(name)
    return tuple(int(v) for v in (values[2:] if _first(op) else values[1:-1]))


def _first(op: Operation) -> bool:
    return op.get_attr("data_format").decode().startswith("NC")


def _convolution(op: Operation, hot: Hot) -> Use:
    """The filter is (*kernel, inputs of a group, outputs): Conv2D, Conv3D, depthwise, and their transposes."""
    transposed = op.type.endswith("BackpropInput") or op.type.endswith("BackpropInputV2")
    depthwise = op.type.startswith("Depthwise")
    if op.inputs[1] is not hot.tensor:
        raise Unread(f"it is the image of a {op.type}")
    x = op.inputs[2 if transposed else 0]
    layout = hot.layout
    many = len(layout.axes) - 2
    spatial = range(many)
    channels = layout.shape[many], layout.shape[many + 1]
    if depthwise:
        groups = channels[0]
        matrix = Matrix.split(layout, (many,), (many + 1,), spatial)
    elif transposed:
        for axis in spatial:
            layout = layout.flipped(axis)
        groups = 1
        matrix = Matrix.split(layout, (), (many,), (*spatial, many + 1))
        if x.shape[1 if _first(op) else -1] != channels[1]:
            raise Unread("it goes into a transposed convolution of groups")
    else:
        groups = int(x.shape[1 if _first(op) else -1]) // channels[0]
        layout = layout.reshaped((*layout.shape[:-1], groups, channels[1] // groups))
        matrix = Matrix.split(layout, (many + 1,), (many + 2,), (*spatial, many))
    strides = _spatial(op, "strides")
    window = Window(layout.shape[:many], strides, 0, _spatial(op, "dilations"))
    padding: Any = op.get_attr("padding").decode()
    if padding == "EXPLICIT":
        pads = [int(p) for p in op.get_attr("explicit_paddings")]
        pairs = list(zip(pads[::2], pads[1::2], strict=True))
        padding = tuple(pairs[2:] if _first(op) else pairs[1:-1])
    kind = Convolution(window, padding, groups, _first(op), strides if transposed else None)
    return _dilated(op, Use(hot, matrix, kind, x, op.outputs[0]))


def _dilated(op: Operation, use: Use) -> Use:
    """A convolution between SpaceToBatchND and BatchToSpaceND is a dilated one."""
    assert use.x is not None
    before = use.x.op
    lone = before.type == "ExpandDims" and before.inputs[0].op.type == "SpaceToBatchND"  # of one axis, run as of two
    before = before.inputs[0].op if lone else before
    if before.type != "SpaceToBatchND":
        return use
    out = next((o.outputs[0] for o in use.out.consumers() if o.type == "Squeeze"), use.out) if lone else use.out
    after = [o for o in out.consumers() if o.type == "BatchToSpaceND"]
    kind = use.kind
    assert isinstance(kind, Convolution)
    if len(after) != 1 or kind.padding != "VALID":
        raise Unread("it goes into a convolution of images that were taken apart")
    rate, pads, crops = (tf.get_static_value(x) for x in (*before.inputs[1:3], after[0].inputs[2]))
    if rate is None or pads is None or crops is None:
        raise Unread("it goes into a dilated convolution whose padding depends on the batch")
    kernel = kind.window.kernel[1:] if lone else kind.window.kernel
    many = len(kernel)
    whole = [(1, (0, 0))] * (many - len(rate))
    each = [(int(r), (int(p[0]), int(p[1]) - int(c[1]))) for r, p, c in zip(rate, pads, crops, strict=True)]
    # SpaceToBatchND counts axes behind the batch: in channels-last images those that are left over come last
    both = each + whole
    window = Window(kernel, 1, 0, tuple(r for r, _ in both))
    padding = tuple(pair for _, pair in both)
    return replace(use, kind=replace(kind, window=window, padding=padding), x=before.inputs[0], out=after[0].outputs[0])


def _features(hot: Hot, out: Tensor, last: int | None = None) -> tuple[Matrix, Elementwise]:
    """Axes of `out` that the parameter spans: it meets them from the right, or at one place."""
    rank = out.shape.rank
    have = [i for i, size in enumerate(hot.layout.shape) if size > 1]
    lead = rank - len(hot.layout.axes)
    features = tuple(lead + i if last is None else last for i in have)
    for i, axis in zip(have, features, strict=True):
        if out.shape[axis] != hot.layout.shape[i]:
            raise Unread(f"it is repeated to {out.shape}")
    blocks = len(have) - 1 if hot.layout.size > WIDE and len(have) > 1 else 0
    return Matrix.split(hot.layout, have[:blocks], have[blocks:]), Elementwise(rank, features, blocks)


def _added(op: Operation, hot: Hot) -> Use:
    out = op.outputs[0]
    last = None
    if op.type == "BiasAdd":
        last = 1 if _first(op) else out.shape.rank - 1
    elif _other(op, hot)[1].shape.rank is None:
        raise Unread(f"it goes into {op.type} with a tensor of unknown rank")
    matrix, kind = _features(hot, out, last)
    negative = op.type == "Sub" and op.inputs[1] is hot.tensor
    return Use(hot, matrix, replace(kind, sign=-1) if negative else kind, None, out)


def _multiplied(op: Operation, hot: Hot) -> Use:
    place, x = _other(op, hot)
    out = op.outputs[0]
    matrix, kind = _features(hot, out)
    if op.type == "RealDiv":
        x = -out / hot.tensor if place else tf.math.reciprocal(x)
    return Use(hot, matrix, kind, _spread(x, out), out)


def _chosen(op: Operation, hot: Hot) -> Use:
    """tf.where: the parameter is there, or something else."""
    places = [i for i in (1, 2) if op.inputs[i] is hot.tensor]
    if len(places) != 1:
        raise Unread("it is both values of a choice")
    out = op.outputs[0]
    here = op.inputs[0] if places[0] == 1 else tf.logical_not(op.inputs[0])
    matrix, kind = _features(hot, out)
    return Use(hot, matrix, kind, _spread(tf.cast(here, out.dtype), out), out)


def _repeated(op: Operation, hot: Hot) -> Use:
    matrix, kind = _features(hot, op.outputs[0])
    return Use(hot, matrix, kind, None, op.outputs[0])


def _spread(x: Tensor, out: Tensor) -> Tensor:
    """As many axes as the output."""
    return (
        tf.reshape(x, tf.concat([[1] * (out.shape.rank - x.shape.rank), tf.shape(x)], 0))
        if x.shape.rank < out.shape.rank
        else x
    )


def _all(names: Sequence[str], rule: Callable[[Operation, Hot], Use]) -> dict[str, Callable[[Operation, Hot], Use]]:
    return dict.fromkeys(names, rule)


RULES: dict[str, Callable[[Operation, Hot], Use]] = {
    **_all(("MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"), _matmul),
    **_all(("GatherV2", "ResourceGather"), _gather),
    **_all(("Conv2D", "Conv3D", "DepthwiseConv2dNative", "Conv2DBackpropInput", "Conv3DBackpropInputV2"), _convolution),
    **_all(("Add", "AddV2", "Sub", "BiasAdd"), _added),
    **_all(("Mul", "RealDiv"), _multiplied),
    **_all(("Tile", "BroadcastTo"), _repeated),
    "Einsum": _einsum,
    "SparseTensorDenseMatMul": sparse_product,
    "SelectV2": _chosen,
}
REASONS = {
    "While": "it runs inside a loop, whose steps leave no outputs to read",
    "StatelessWhile": "it runs inside a loop, whose steps leave no outputs to read",
    "If": "it runs in a branch, which leaves no outputs to read",
    "StatelessIf": "it runs in a branch, which leaves no outputs to read",
    "PartitionedCall": "it runs inside a function of its own, which leaves no outputs to read",
    "StatefulPartitionedCall": "it runs inside a function of its own, which leaves no outputs to read",
}
