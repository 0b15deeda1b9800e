"""Whose row it is as far as shapes alone say it: what no data can change between batches of one graph.

From the prediction, whose rows are those of the examples, numbers of examples go down through what autograd kept, an
array for each output of a node, of size one along axes that make no difference. A row that reaches the prediction in
the numbers of one example, whatever the data are, is of that example in every batch. A row that several examples may
see is of one example only where data are zero, as in a mask of membership: that it was so is to be confirmed in every
batch. That several do see it, as behind a norm over the batch, may be kept: it is right in the mean wherever it is not
needed. Above a row with an operation of which nothing is known here, anything may be otherwise in the next batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import Any

import numpy as np
import torch

from kfaccore_torch.calls import Call
from kfaccore_torch.split import Split

NONE = -1  # of a number that goes nowhere
SEVERAL = 1 << 40  # of one that several examples may see
UNKNOWN = 1 << 41  # of one below an operation without a rule
_LARGE = 1 << 22  # numbers in an array, of larger ones nothing is said

Rule = Any  # (node, numbers of an output, its shape, which argument, its shape, which output) -> numbers, Part or None


@dataclass(frozen=True)
class Part:
    """The numbers at some places of an axis; those at the others go nowhere from there."""

    numbers: np.ndarray
    axis: int
    at: slice
    size: int


def loose(calls: Sequence[Call], heads: Sequence[torch.Tensor], split: Split, rule: Rule) -> dict[int, bool]:
    """The calls, by place, with rows that shapes alone give to no one example, and whether nothing is known of some."""
    sizes = [(len(f), *(1,) * (f.ndim - 1)) for f in heads]
    owners = [split.owner(size[0], head).cpu().numpy().reshape(size) for head, size in enumerate(sizes)]
    found = numbers({(f.grad_fn, f.output_nr): x for f, x in zip(heads, owners, strict=True)}, rule)
    nothing = np.array(UNKNOWN)
    ends = [found.get((call.edge.node, call.edge.output_nr), nothing).max(initial=NONE) for call in calls]
    return {i: bool(x >= UNKNOWN) for i, x in enumerate(ends) if x >= SEVERAL}


def numbers(known: Mapping[tuple[Any, int], np.ndarray], rule: Rule) -> dict[tuple[Any, int], np.ndarray]:
    """The example of each number of each output of a node, (node, which output), from those of some outputs."""
    found: dict[tuple[Any, int], np.ndarray] = {}
    given: dict[tuple[Any, int], list[np.ndarray | Part]] = {key: [x] for key, x in known.items()}
    shapes = _Shapes()
    for node in _downward([node for node, _ in known]):
        for number, shape in enumerate(shapes[node]):
            into = given.pop((node, number), None)
            if into is None:
                continue
            here = found[node, number] = _merged(into)
            for i, (child, output) in enumerate(node.next_functions):
                if child is None or child.name().endswith("AccumulateGrad"):
                    continue
                below = shapes[child][output]
                x = None if shape is None or below is None else rule(node, here, shape, i, below, number)
                x = np.full((1,) * len(below or ()), UNKNOWN) if x is None else x
                given.setdefault((child, output), []).append(x)
    return found


class _Shapes(dict[Any, list[tuple[int, ...] | None]]):
    """Those of a node's outputs, asked for once a node: it is met once an output. Nested tensors have none."""

    def __missing__(self, node: Any) -> list[tuple[int, ...] | None]:
        self[node] = [None if one.is_nested_tensor else tuple(one.shape) for one in node._input_metadata]
        return self[node]


def _merged(given: Sequence[np.ndarray | Part]) -> np.ndarray:
    """What all that reads an output says of it together; parts are written into one array, however many there are."""
    whole = [x for x in given if not isinstance(x, Part)]
    parts: dict[tuple[int, int], list[Part]] = {}
    for x in given:
        if isinstance(x, Part):
            parts.setdefault((x.axis, x.size), []).append(x)
    for (axis, size), some in parts.items():
        before = (slice(None),) * axis
        across = np.broadcast_shapes(*((*x.numbers.shape[:axis], 1, *x.numbers.shape[axis + 1 :]) for x in some))
        full = np.full((*across[:axis], size, *across[axis + 1 :]), NONE)
        for x in some:
            here = full[(*before, x.at)]
            here[...] = _both(here, x.numbers)
        whole.append(full)
    return reduce(_both, whole)


def _both(old: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.where(old == x, x, np.where(old == NONE, x, np.where(x == NONE, old, np.maximum(old, x).clip(SEVERAL))))


def _downward(roots: Iterable[Any]) -> Iterator[Any]:
    """Nodes, each after all it goes into."""
    order: list[Any] = []
    seen: set[Any] = set()
    waiting = [(node, False) for node in roots]
    while waiting:
        node, done = waiting.pop()
        if done:
            order.append(node)
        elif node is not None and node not in seen:
            seen.add(node)
            waiting.append((node, True))
            waiting.extend((child, False) for child, _ in node.next_functions)
    return reversed(order)


def meet(x: np.ndarray, axes: Iterable[int]) -> np.ndarray:
    """One number along axes: that of all, or SEVERAL."""
    along = tuple({a % x.ndim for a in axes if x.shape[a] > 1})
    if not along:
        return x
    high = x.max(along, keepdims=True)
    low = np.where(x == NONE, UNKNOWN, x).min(along, keepdims=True)
    return np.where((high == NONE) | (low == high), high, high.clip(SEVERAL))


def reshaped(x: np.ndarray, old: Sequence[int], new: Sequence[int]) -> np.ndarray | None:
    """The numbers of an array of shape `old` in shape `new`; axes that make no difference stay of size one."""
    if prod(old) != prod(new) or not prod(old):
        return None
    full: list[int] = []
    shape: list[int] = []
    for here, there in _groups(old, new):
        same = all(x.shape[a] == 1 for a in here)
        full += [1 if same else old[a] for a in here]
        shape += [1 if same else new[a] for a in there]
    if prod(full) > _LARGE:
        return None
    found = np.broadcast_to(x, full).reshape(shape)
    return reduce(_thin, range(found.ndim), found)


def _groups(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[range, range]]:
    """Axes of two shapes that hold the same numbers, a few at a time."""
    i = 0
    j = 0
    while i < len(old) or j < len(new):
        m = min(i + 1, len(old))
        n = min(j + 1, len(new))
        while prod(old[i:m]) != prod(new[j:n]):
            if prod(old[i:m]) < prod(new[j:n]):
                m += 1
            else:
                n += 1
        yield range(i, m), range(j, n)
        i = m
        j = n


def _thin(x: np.ndarray, axis: int) -> np.ndarray:
    first = x.take([0], axis)
    return first if x.shape[axis] > 1 and bool((x == first).all()) else x
