"""Parameters that are joined to the weight or the bias of one product, as `torch.cat([q, zeros, v])` is.

Each is a layer of its own: along the outputs it has the same inputs and its part of the output gradient, along the
inputs its part of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from kfaccore.layers import Linear
from kfaccore_torch.calls import Call, Mark, Use
from kfaccore_torch.provenance import axis_of, output_shape, through
from kfaccore_torch.views import Ref


@dataclass(frozen=True)
class Piece:
    """A parameter's part from `start` to `stop` along an axis of what it is joined to."""

    ref: Ref
    axis: int
    start: int
    stop: int


def joined(x: torch.Tensor | None, axes: int, known: dict[int, str]) -> tuple[list[Piece], list[Any]]:
    """Parts of known parameters in a tensor that joins several, and (node, which output) of all else in it; nothing
    where it is no such tensor of so many axes, or where more than one of them is a constant, whose sizes autograd does
    not keep."""
    if x is None or x.ndim != axes or x.grad_fn is None or not x.grad_fn.name().startswith("CatBackward"):
        return [], []
    node = x.grad_fn
    axis = axis_of(node, x.ndim)
    children = node.next_functions
    sizes = [None if child is None else _shape(child, number)[axis] for child, number in children]
    told = sum(size for size in sizes if size is not None)
    if sizes.count(None) > 1:
        return [], []
    found = []
    others = []
    start = 0
    for (child, number), size in zip(children, sizes, strict=True):
        stop = start + (x.shape[axis] - told if size is None else size)
        ref = None if child is None else through(child, number, known, shifts=True)
        if ref is not None:
            found.append(Piece(ref, axis, start, stop))
        elif child is not None:
            others.append((child, number))
        start = stop
    return found, others


def _shape(node: Any, number: int) -> tuple[int, ...]:
    leaf = node.name().endswith("AccumulateGrad")
    return tuple(node.variable.shape) if leaf else output_shape(node, number)


def uses(weights: list[Piece], biases: list[Piece], call: Call) -> Iterator[Use]:
    """A use of each piece in one linear call."""
    for piece in weights:
        d_out, d_in = piece.ref.view.shape
        here = slice(piece.start, piece.stop)
        part = replace(call, x=call.x[..., here]) if piece.axis else _outputs(call, here)
        yield Use(Mark(Linear(d_in, d_out, bias=False), piece.ref), part)
    for piece in biases:
        yield Use(Mark(None, None, piece.ref), _outputs(call, slice(piece.start, piece.stop)))


def _outputs(call: Call, here: slice) -> Call:
    """The same call as far as some of its outputs go."""

    def arrange(g: torch.Tensor) -> torch.Tensor:
        lead = g.shape[: g.ndim - len(call.shape)]
        return g[..., here].reshape(*lead, *call.rows, here.stop - here.start)

    return replace(call, arrange=arrange)
