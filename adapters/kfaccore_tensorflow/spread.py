"""A mask along the axes of rows: every way that sizes allow, and the one of them that gradients agree with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, permutations
from math import prod

import numpy as np


def spread(mask: np.ndarray, sizes: tuple[int, ...]) -> list[np.ndarray]:
    """(examples, *positions) as (examples, rows), in each way that rows of these axes may count positions: an axis of
    as many, or of more, the others before them or behind; several axes that make up as many; or an axis each."""
    flat = mask.reshape(len(mask), -1)
    found: dict[bytes, np.ndarray] = {}
    for whole in (*_alone(flat, sizes), *_across(flat, sizes), *_each(mask, sizes)):
        rows = np.broadcast_to(whole, (len(mask), *sizes)).reshape(len(mask), -1)
        found[rows.tobytes()] = rows
    if not found and mask.ndim > 2:  # rows of all that the last axis counts, as sentences are of words
        return spread(np.any(mask, axis=-1), sizes)
    return list(found.values())


def _alone(flat: np.ndarray, sizes: tuple[int, ...]) -> list[np.ndarray]:
    examples, positions = flat.shape
    found = []
    for axis, size in enumerate(sizes):
        if size == 0 or size % positions:
            continue
        lone = (1,) * (len(sizes) - axis - 1)
        for along in (np.repeat(flat, size // positions, axis=1), np.tile(flat, (1, size // positions))):
            found.append(along.reshape(examples, *(1,) * axis, size, *lone))
    return found


def _across(flat: np.ndarray, sizes: tuple[int, ...]) -> list[np.ndarray]:
    found = []
    for start, end in combinations(range(len(sizes) + 1), 2):
        if end - start > 1 and prod(sizes[start:end]) == flat.shape[1]:
            shape = (*(1,) * start, *sizes[start:end], *(1,) * (len(sizes) - end))
            found.append(flat.reshape(len(flat), *shape))
    return found


def _each(mask: np.ndarray, sizes: tuple[int, ...]) -> list[np.ndarray]:
    if mask.ndim < 3:
        return []
    found = []
    for axes in permutations(range(len(sizes)), mask.ndim - 1):
        if all(sizes[axis] == size for axis, size in zip(axes, mask.shape[1:], strict=True)):
            shape = [1] * len(sizes)
            for axis in axes:
                shape[axis] = sizes[axis]
            order = np.argsort(axes) + 1  # of the mask's axes, as the rows have them
            found.append(np.transpose(mask, (0, *order)).reshape(len(mask), *shape))
    return found


def fewest(found: Sequence[np.ndarray], moved: np.ndarray) -> np.ndarray | None:
    """The one that leaves out the fewest rows that move the prediction; of several what all of them leave, as of pairs
    of positions, where that leaves out no more of those; else None."""
    out = [_missed(mask, moved) for mask in found]
    best = [mask for mask, missed in zip(found, out, strict=True) if missed == min(out)]
    both = np.logical_and.reduce(best)
    if len(best) == 1 or (moved.any() and _missed(both, moved) == min(out)):
        return both
    return None


def _missed(mask: np.ndarray, moved: np.ndarray) -> int:
    return int(np.sum(moved & ~mask))
