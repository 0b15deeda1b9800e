"""Operations that hand a variable's elements on: views, casts, slices, and functions of each element by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

from kfaccore_tensorflow.layout import Layout
from kfaccore_tensorflow.slopes import BINARY, FUNCTIONS
from kfaccore_tensorflow.uses import BY_ONE_NUMBER, ELEMENTWISE, Hot, Operation, Tensor, Unread

SAME = {"ReadVariableOp", "Identity", "Cast", "EnsureShape", "CheckNumerics", "Snapshot"}


def shape_of(tensor: Tensor) -> tuple[int, ...] | None:
    """A static shape, or None."""
    return tuple(tensor.shape) if tensor.shape.is_fully_defined() else None


def moved(op: Operation, hot: Hot) -> Iterator[Hot] | None:
    """The tensors that hold the variable's elements after `op`; None where it uses them instead.

    A product or sum with something that has no more elements is a function of each element: only what is larger, or of
    a size that depends on the batch, is a use.
    """
    if op.type in MOVES:
        return MOVES[op.type](op, hot)
    out = op.outputs[0]
    if op.type in SAME:
        return iter([hot.on(out)])
    if op.type in FUNCTIONS:
        return iter([hot.by(op, BY_ONE_NUMBER if op.type == "Neg" else ELEMENTWISE)])
    if op.type in BINARY and out.shape.num_elements() == hot.layout.size:
        return iter([_combined(op, hot)])
    return None


def _combined(op: Operation, hot: Hot) -> Hot:
    shape = shape_of(op.outputs[0])
    assert shape is not None
    layout = hot.layout.reshaped(shape)
    twice = op.inputs[0] is op.inputs[1]
    first = op.inputs[0] is hot.tensor
    sums = op.type in ("Add", "AddV2") or (op.type == "Sub" and first)
    if sums and not twice:
        return hot.on(op.outputs[0], layout)
    other = op.inputs[1] if first else op.inputs[0]
    number = not twice and other.shape.num_elements() == 1 and (first or op.type == "Mul")
    alike = sums or op.type == "Sub" or number
    return hot.by(op, BY_ONE_NUMBER if alike else ELEMENTWISE, layout)


def _reshaped(op: Operation, hot: Hot) -> Iterator[Hot]:
    shape = shape_of(op.outputs[0])
    if shape is None:
        raise Unread(f"it goes into a {op.type} whose sizes are not known")
    try:
        yield hot.on(op.outputs[0], hot.layout.reshaped(shape))
    except ValueError as error:
        raise Unread(str(error)) from None


def _transposed(op: Operation, hot: Hot) -> Iterator[Hot]:
    order = _known(op, 1)
    yield hot.on(op.outputs[0], hot.layout.transposed([int(i) for i in order]))


def _pieces(op: Operation, hot: Hot, axis: int, sizes: list[int]) -> Iterator[Hot]:
    start = 0
    for out, size in zip(op.outputs, sizes, strict=True):
        yield hot.on(out, hot.layout.sliced(axis, start, size))
        start += size


def _split(op: Operation, hot: Hot) -> Iterator[Hot]:
    axis = int(_known(op, 0)) % len(hot.layout.axes)
    return _pieces(op, hot, axis, [hot.layout.shape[axis] // len(op.outputs)] * len(op.outputs))


def _split_by(op: Operation, hot: Hot) -> Iterator[Hot]:
    axis = int(_known(op, 2)) % len(hot.layout.axes)
    sizes = [int(out.shape[axis]) for out in op.outputs]
    return _pieces(op, hot, axis, sizes)


def _unstacked(op: Operation, hot: Hot) -> Iterator[Hot]:
    axis = op.get_attr("axis") % len(hot.layout.axes)
    for piece in _pieces(op, hot, axis, [1] * len(op.outputs)):
        axes = piece.layout.axes
        yield piece.on(piece.tensor, Layout(piece.layout.offset, axes[:axis] + axes[axis + 1 :]))


def _sliced(op: Operation, hot: Hot) -> Iterator[Hot]:
    layout = hot.layout
    shape = shape_of(op.outputs[0])
    if shape is None:
        raise Unread("it is sliced to a size that depends on the batch")
    for axis, (start, size) in enumerate(zip(_known(op, 1), shape, strict=True)):
        layout = layout.sliced(axis, int(start), size)
    yield hot.on(op.outputs[0], layout)


def _strided(op: Operation, hot: Hot) -> Iterator[Hot]:
    """A slice as Python writes it: ends left out, new axes, single elements."""
    begin, end, stride = (_known(op, i) for i in (1, 2, 3))
    mask = {name: op.get_attr(f"{name}_mask") for name in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")}
    axes = [(size, step) for size, step in hot.layout.axes]
    offset = hot.layout.offset
    found = []
    place = 0
    for i in range(len(begin)):
        bit = 1 << i
        if mask["ellipsis"] & bit:
            rest = sum(1 for j in range(i + 1, len(begin)) if not mask["new_axis"] & (1 << j))
            found += axes[place : len(axes) - rest]
            place = len(axes) - rest
        elif mask["new_axis"] & bit:
            found.append((1, 0))
        else:
            size, step = axes[place]
            place += 1
            if mask["shrink_axis"] & bit:
                offset += (int(begin[i]) % size) * step
                continue
            first = None if mask["begin"] & bit else int(begin[i])
            last = None if mask["end"] & bit else int(end[i])
            taken = range(size)[first : last : int(stride[i])]
            offset += (taken.start if len(taken) else 0) * step
            found.append((len(taken), step * taken.step))
    yield hot.on(op.outputs[0], Layout(offset, (*found, *axes[place:])))


def _known(op: Operation, place: int) -> np.ndarray:
    value = tf.get_static_value(op.inputs[place])
    if value is None:
        raise Unread(f"it goes into a {op.type} whose numbers depend on the batch")
    return value


MOVES: dict[str, Callable[[Operation, Hot], Iterator[Hot]]] = {
    "Reshape": _reshaped,
    "Squeeze": _reshaped,
    "ExpandDims": _reshaped,
    "Transpose": _transposed,
    "Split": _split,
    "SplitV": _split_by,
    "Unpack": _unstacked,
    "Slice": _sliced,
    "StridedSlice": _strided,
}
