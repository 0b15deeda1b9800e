"""Gradients, records and numbers of layers of equal sizes as those of one layer with their blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kfaccore.convolution.patches import Patches
from kfaccore.method import Hyper
from kfaccore.precondition.given import Given
from kfaccore.record import Factored, Ids, Record
from kfaccore.xp.arrays import Array, device_of, from_host, is_numpy, namespace
from kfaccore.xp.blocks import stacked, together
from kfaccore.xp.chunks import HELD

_ROWS = 1 << 16  # numbers of a NumPy record over which its copy costs more than the Python of a layer


def kind_of(grad: Array | Factored) -> object:
    """What gradients must have in common to be solved for in one call."""
    if not isinstance(grad, Factored):
        return grad.ndim, grad.dtype
    return tuple(grad.a.shape), tuple(grad.g.shape), grad.g.dtype, _number(grad.n)


def gradients(grads: Sequence[Array | Factored]) -> Array | Factored:
    """Gradients of one kind with their blocks joined."""
    first: Any = grads[0]
    found: Any = grads
    if isinstance(first, Factored):
        if len(grads) == 1:
            return first
        return Factored(together([x.a for x in found]), together([x.g for x in found]), first.n)
    return stacked(found) if first.ndim == 2 else together(found)


def records_of_turn(given: Sequence[Sequence[Given]], bounded: bool = True) -> list[Record]:
    """Micro-batch by micro-batch the records of layers with their blocks joined; none where they cannot be, or where
    `bounded` and the copy of their rows would cost more than it saves."""
    if len(given) == 1 or len({len(batches) for batches in given}) != 1:
        return []
    turns = [list(turn) for turn in zip(*given, strict=True)]
    if not all(_alike(turn) and not (bounded and _large(turn)) for turn in turns):
        return []
    return [_joined(turn) for turn in turns]


def _alike(turn: Sequence[Any]) -> bool:
    """Whether records are arrays of one shape, with one n and the same examples."""
    if not all(isinstance(x, Record) and not isinstance(x.a, Ids | Patches) for x in turn):
        return False
    return len({outline(x) for x in turn}) == 1


def outline(x: Record) -> object:
    """What records must have in common to stand side by side."""
    a: Any = x.a.index if isinstance(x.a, Ids) else x.a
    return tuple(a.shape), tuple(x.g.shape), x.g.dtype, _number(x.n), id(x.mask), id(x.ids)


def _large(turn: Sequence[Record]) -> bool:
    """Whether rows are better left where they are."""
    first = turn[0]
    numbers = first.batch * first.shared * first.blocks * (first.d_in + first.draws * first.d_out)
    return numbers > _ROWS if is_numpy(first.g) else numbers * len(turn) > HELD


def _joined(turn: Sequence[Record]) -> Record:
    first = turn[0]
    a = together([x.a for x in turn])
    return Record(a, together([x.g for x in turn], 1), first.n, first.mask, first.ids)


def _number(n: float | Array) -> object:
    """What stands for a number in a comparison that reads no array."""
    return n if isinstance(n, int | float) else id(n)


def shared(hypers: Sequence[Hyper], blocks: int, like: Array) -> Hyper:
    """The numbers of a step of layers with `blocks` blocks in all: a damping a block where layers differ."""
    first = hypers[0]
    dampings = [hyper.damping for hyper in hypers]
    if len({_number(x) for x in dampings}) == 1:
        return first
    each = blocks // len(hypers)
    if all(isinstance(x, int | float) for x in dampings):
        damping = from_host(np.repeat(np.array(dampings, float), each), like)
    else:
        xp = namespace(like)
        where = {"dtype": like.dtype, "device": device_of(like)}
        damping = xp.repeat(xp.stack([xp.asarray(x, **where) for x in dampings]), each)
    return replace(first, damping=damping)
