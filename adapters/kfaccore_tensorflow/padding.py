"""Padding that no mask tells of, by the gradients: where every example moves the prediction by its first positions and
by none behind them, and how many these are differs between examples. It counts in A, so it is named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kfaccore_tensorflow.masks import Rows

FEW = 3  # positions, or calls of a loop over steps: of fewer, units at rest may look like padding


@dataclass(frozen=True)
class Alive:
    """Which of (examples, positions) of a part move the prediction.

    masked    whether a mask was laid along them that leaves some out
    looped    whether the positions are calls
    """

    there: np.ndarray
    masked: bool
    looped: bool


def alive(calls: Sequence[Rows]) -> list[Alive]:
    """Of the calls of a part: of each whose rows have one axis of positions, or of all, of one row each."""
    drawn = [call for call in calls if call.live is not None and _whole(call)]
    rows = [call for call in drawn if sum(size > 1 for size in call.sizes) == 1]
    found = [Alive(call.moved, _masked(call), False) for call in rows]
    single = [call for call in drawn if call.moved.shape[1] == 1]
    if len(single) == len(calls) >= FEW:
        moved = np.concatenate([call.moved for call in single], axis=1)
        found.append(Alive(moved, any(_masked(call) for call in single), True))
    return found


def _whole(call: Rows) -> bool:
    """Whether it has the same number of rows of each example."""
    return int(np.prod(call.shape)) == call.examples * int(np.prod(call.sizes)) and not call.single


def _masked(call: Rows) -> bool:
    return call.left is not None and not call.left.all()


def untold(parts: Mapping[str, Sequence[Alive]], present: np.ndarray | None) -> list[str]:
    """Parts with padding that no mask tells of; a position that moves something in any of them is none.

    present    which examples count, None for all
    """
    counts = sorted({one.there.shape[1] for each in parts.values() for one in each})
    names: list[str] = []
    for positions in counts:
        these = [(name, one) for name, each in parts.items() for one in each if one.there.shape[1] == positions]
        there = np.logical_or.reduce([one.there for _, one in these])
        there = there if present is None else there[present]
        # in a long loop what stands first may be too small for its kind of number, and no padding
        turned = not any(one.looped for _, one in these)
        if _ends(there) or (turned and _ends(there[:, ::-1])):
            names += [name for name, one in these if not one.masked]
    return list(dict.fromkeys(names))


def _ends(there: np.ndarray) -> bool:
    """Whether each example has its first positions alone, and some fewer than others."""
    positions = there.shape[1]
    lengths = np.sum(there, axis=1)
    first = np.arange(positions) < lengths[:, None]
    some = np.sum(lengths < positions) > 1 and len(set(lengths.tolist())) > 1
    return bool(positions >= FEW and lengths.all() and some and np.array_equal(there, first))
