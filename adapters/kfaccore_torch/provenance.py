"""The part of a parameter that a tensor is, followed through what autograd kept of it."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from kfaccore_torch.views import Ref, View

_PLAIN = ("ToCopyBackward", "CloneBackward", "AliasBackward")
_RESHAPES = ("ViewBackward", "UnsafeViewBackward", "ReshapeAliasBackward", "UnsqueezeBackward", "SqueezeBackward")


def followed(x: torch.Tensor | None, known: dict[int, str]) -> Ref | None:
    """The part of a known parameter that a tensor is, through any transposes, slices, reshapes and casts."""
    if x is None:
        return None
    if x.grad_fn is None:
        return Ref(known[id(x)], View.whole(x.shape)) if id(x) in known else None
    return through(x.grad_fn, x.output_nr, known)


def through(node: Any, output: int, known: dict[int, str], repeats: bool = False) -> Ref | None:
    """As `followed`, of a node's output; with `repeats` also through expansions."""
    chain: list[tuple[Any, int]] = []
    while not node.name().endswith("AccumulateGrad"):
        if not (moves_only(node) or (repeats and node.name().startswith("ExpandBackward"))):
            return None
        chain.append((node, output))
        node, output = node.next_functions[0]
        if node is None:
            return None
    name = known.get(id(node.variable))
    if name is None:
        return None
    view: View | None = View.whole(node.variable.shape)
    for link, number in reversed(chain):
        view = _step(view, link, number)
        if view is None:
            return None
    return Ref(name, view) if view is not None else None


def moves_only(node: Any) -> bool:
    """Whether an operation only moves, drops or casts elements."""
    name = node.name()
    if name.startswith("ExpandBackward"):
        return prod(node._saved_self_sym_sizes) == prod(output_shape(node))
    return name.startswith((*_PLAIN, *_RESHAPES, *_STEPS))


def output_shape(node: Any, number: int = 0) -> tuple[int, ...]:
    """The shape of an output of a node."""
    return tuple(node._input_metadata[number].shape)


def _step(view: View, node: Any, number: int) -> View | None:
    name = node.name()
    if name.startswith(_PLAIN):
        return view
    if name.startswith(_RESHAPES):
        return view.reshaped(output_shape(node, number))
    if name.startswith("ExpandBackward"):
        return view.expanded(output_shape(node, number))
    kind = next(start for start in _STEPS if name.startswith(start))
    return _STEPS[kind](view, node, number)


def _signed(axis: int, ndim: int) -> int:
    """A saved axis, which may be negative in 64 bits."""
    axis = axis - 2**64 if axis >= 2**63 else axis
    return axis % ndim


def _transposed(view: View, node: Any, number: int) -> View | None:
    order = list(range(len(view.axes)))
    first, second = (_signed(d, len(order)) for d in (node._saved_dim0, node._saved_dim1))
    order[first], order[second] = order[second], order[first]
    return view.permuted(order)


def _permuted(view: View, node: Any, number: int) -> View | None:
    return view.permuted([_signed(d, len(view.axes)) for d in node._saved_dims])


def _sliced(view: View, node: Any, number: int) -> View | None:
    axis = _signed(node._saved_dim, len(view.axes))
    size = output_shape(node)[axis]
    start = node._saved_start
    start = start - 2**64 if start >= 2**63 else start
    start = max(0, start + view.shape[axis]) if start < 0 else start
    return view.narrowed(axis, start, size, node._saved_step)


def _selected(view: View, node: Any, number: int) -> View | None:
    axis = _signed(node._saved_dim, len(view.axes))
    one = view.narrowed(axis, _signed(node._saved_index, view.shape[axis]), 1)
    return None if one is None else View((*one.axes[:axis], *one.axes[axis + 1 :]), one.offset)


def _split(view: View, node: Any, number: int) -> View | None:
    axis = _signed(node._saved_dim, len(view.axes))
    sizes = [output_shape(node, i)[axis] for i in range(len(node._input_metadata))]
    return view.narrowed(axis, sum(sizes[:number]), sizes[number])


def _unbound(view: View, node: Any, number: int) -> View | None:
    axis = _signed(node._saved_dim, len(view.axes))
    one = view.narrowed(axis, number, 1)
    return None if one is None else View((*one.axes[:axis], *one.axes[axis + 1 :]), one.offset)


_STEPS = {
    "TBackward": lambda view, node, number: view.permuted(list(range(len(view.axes)))[::-1]),
    "TransposeBackward": _transposed,
    "PermuteBackward": _permuted,
    "SliceBackward": _sliced,
    "SelectBackward": _selected,
    "SplitBackward": _split,
    "UnsafeSplitBackward": _split,
    "SplitWithSizesBackward": _split,
    "UnbindBackward": _unbound,
}
