"""A refresh of many groups: what all their methods ask for is answered size by size, a bounded part at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

from kfaccore import tree
from kfaccore.precondition.groups import Group, Hypers
from kfaccore.xp.arrays import namespace
from kfaccore.xp.asking import BUDGET, alone, lockstep


def renewed(groups: Sequence[Group], states: Sequence[Any], hypers: Hypers) -> list[Any]:
    """The states after a refresh, in the order of their groups.

    Groups are taken from the widest on, so that those of equal sizes meet, and as many at a time as hold the budget in
    matrices to be worked on: about half of a state, the other half being what is made of them.
    """
    found = list(states)
    sizes = [_bytes(state) // 2 for state in states]
    for part in _parts(sorted(range(len(states)), key=lambda i: -_width(states[i])), sizes):
        new = alone(lockstep([groups[i].refreshing(states[i], hypers) for i in part]))
        for i, state in zip(part, new, strict=True):
            found[i] = state
    return found


def _parts(order: Sequence[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    part: list[int] = []
    for i in order:
        if part and sum(sizes[j] for j in [*part, i]) > BUDGET:
            yield part
            part = []
        part.append(i)
    if part:
        yield part


def _width(state: Any) -> int:
    """Of a state's widest array."""
    return max((x.shape[-1] for x in tree.leaves(state) if len(x.shape) > 2), default=0)


def _bytes(state: Any) -> int:
    return sum(prod(x.shape) * _each(x) for x in tree.leaves(state) if len(x.shape) > 2)


def _each(x: Any) -> int:
    return namespace(x).finfo(x.dtype).bits // 8
