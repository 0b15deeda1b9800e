"""The part of a parameter that a tensor is, followed through what autograd kept of it.

Operations that move or cast its elements are passed, and those that multiply all of them with one number, which the
part keeps as its factor. A constant added to it changes nothing of J.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from kfaccore_torch.views import Ref, View

_PLAIN = ("ToCopyBackward", "CloneBackward", "AliasBackward")
_ELEMENTS = ("NegBackward", "MulBackward", "DivBackward", "AddBackward", "SubBackward", "RsubBackward")
_RESHAPES = ("ViewBackward", "UnsafeViewBackward", "ReshapeAliasBackward", "UnsqueezeBackward", "SqueezeBackward")


def followed(x: torch.Tensor | None, known: dict[int, str]) -> Ref | None:
    """The part of a known parameter that a tensor is, through any transposes, slices, reshapes, casts, factors and
    constants added."""
    if x is None:
        return None
    if x.grad_fn is None:  # frozen here, it may be trained elsewhere in the forward
        return Ref(known[id(x)], View.whole(x.shape)) if id(x) in known and x.requires_grad else None
    return through(x.grad_fn, x.output_nr, known, shifts=True)


def through(node: Any, output: int, known: dict[int, str], repeats: bool = False, shifts: bool = False) -> Ref | None:
    """As `followed`, of a node's output; with `repeats` also through expansions, with `shifts` also through constants
    added."""
    chain: list[tuple[Any, int]] = []
    factor: float | torch.Tensor | None = None
    while not node.name().endswith("AccumulateGrad"):
        child = 0
        slope = scale(node) or (shift(node) if shifts else None)
        if slope is not None:
            child, value = slope
            factor = value if factor is None else factor * value
        elif not (moves_only(node) or (repeats and node.name().startswith("ExpandBackward"))):
            return None
        chain.append((node, output))
        node, output = node.next_functions[child]
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
    return Ref(name, view, factor) if view is not None else None


def passes(node: Any) -> bool:
    """Whether a part of a parameter stays one through an operation."""
    return moves_only(node) or scale(node) is not None


def scale(node: Any) -> tuple[int, float | torch.Tensor] | None:
    """(argument, number) of an operation that multiplies one argument with a number."""
    name = node.name()
    if name.startswith("NegBackward"):
        return 0, -1.0
    if not name.startswith(("MulBackward", "DivBackward")):
        return None
    child = _only(node)
    saved = None if child is None else getattr(node, "_saved_self" if child else "_saved_other", None)
    if child is None or saved is None or isinstance(saved, complex) or getattr(node, "_saved_rounding_mode", None):
        return None  # what is rounded has no slope
    if not isinstance(saved, torch.Tensor):  # PyTorch itself multiplies with numbers that are no tensors
        number = float(saved)
    elif saved.ndim > 0 or saved.is_complex():
        return None
    else:
        number = float(saved) if saved.device.type == "cpu" else saved.detach()  # elsewhere it is not waited for
    if name.startswith("MulBackward"):
        return child, number
    return None if child or (isinstance(number, float) and not number) else (0, 1 / number)


def shift(node: Any) -> tuple[int, float] | None:
    """(argument, sign) of an operation that adds a constant to one argument, or takes one from the other."""
    name = node.name()
    child = _only(node)
    if child is None or not name.startswith(("AddBackward", "SubBackward", "RsubBackward")):
        return None
    alpha = float(getattr(node, "_saved_alpha", 1))
    if name.startswith("RsubBackward"):  # the second argument less alpha times the first
        return child, (1.0 if child else -alpha)
    return child, (1.0 if child == 0 else alpha if name.startswith("Add") else -alpha)


def _only(node: Any) -> int | None:
    """The one argument of an operation that has a gradient."""
    given = [i for i, (child, _) in enumerate(node.next_functions) if child is not None]
    return given[0] if len(given) == 1 else None


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
    if name.startswith(_ELEMENTS):
        return view if view.shape == output_shape(node) else None
    if name.startswith(_RESHAPES):
        return view.reshaped(output_shape(node, number))
    if name.startswith("ExpandBackward"):
        return view.expanded(output_shape(node, number))
    kind = next(start for start in _STEPS if name.startswith(start))
    return _STEPS[kind](view, node, number)


def axis_of(node: Any, ndim: int) -> int:
    """The axis that an operation works along."""
    return _signed(node._saved_dim, ndim)


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
