"""A mask along the calls of one part: a layer's own loop over steps, whose calls have rows of one step each.

Which step a call is of is asked of the gradients, as the axis of positions is: steps may run forwards or backwards,
several calls a step or several loops behind each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from kfaccore_tensorflow.masks import Rows
from kfaccore_tensorflow.spread import fewest, spread


def lay(calls: Sequence[Rows], masks: Sequence[np.ndarray]) -> list[tuple[int, ...]]:
    """Lays masks along calls that none was laid along yet; shapes of masks that leave out rows in no way seen here."""
    groups: dict[tuple, list[Rows]] = {}
    for call in calls:
        known = call.masks(masks) if call.left is None else []
        if known:
            groups.setdefault((known[0][0], call.sizes), []).append(call)
    unseen = []
    for (_, sizes), group in groups.items():
        mask = group[0].masks(masks)[0][2]
        moved = np.stack([call.moved for call in group], axis=1)  # (examples, calls, rows of a call)
        left = _looped(mask, sizes, moved)
        if left is None:
            seen, left = _unmoved(mask, moved, group[0].live is not None)
            unseen += [] if seen else [mask.shape]
        for i, call in enumerate(group):
            call.left = None if left is None else left.reshape(moved.shape)[:, i]
    return unseen


def _looped(mask: np.ndarray, sizes: tuple[int, ...], moved: np.ndarray) -> np.ndarray | None:
    """(examples, calls * rows), each call of one step."""
    calls = int(moved.shape[1])
    flat = mask.reshape(len(mask), -1)
    fewer = [np.any(mask, axis=tuple(range(k, mask.ndim))) for k in range(2, mask.ndim)]
    for one in (mask, flat, *map(np.asarray, fewer)):
        steps = int(one.shape[1])  # type: ignore[misc]
        if calls < 2 or steps < 2 or calls % steps:
            continue
        orders = np.arange(calls).reshape(-1, steps), np.arange(calls).reshape(steps, -1).T  # loops, or calls a step
        found = [_passes(one, sizes, moved, order) for order in orders]
        laid = [left for left in found if left is not None]
        if laid:
            return fewest(laid, moved.reshape(len(mask), -1))
    return None


def _passes(mask: np.ndarray, sizes: tuple[int, ...], moved: np.ndarray, order: np.ndarray) -> np.ndarray | None:
    """Of passes through the steps, rows of `order`, each forwards or backwards."""
    whole = np.ones(moved.shape, bool)
    for steps in order:
        these = moved[:, steps]
        ways = [way for one in (mask, mask[:, ::-1]) for way in spread(one, (len(steps), *sizes))]
        left = fewest(list({way.tobytes(): way for way in ways}.values()), these.reshape(len(mask), -1))
        if left is None:
            return None
        whole[:, steps] = left.reshape(these.shape)
    return whole.reshape(len(mask), -1)


def _unmoved(mask: np.ndarray, moved: np.ndarray, drawn: bool) -> tuple[bool, np.ndarray | None]:
    """Whether a mask has nothing to do with these rows, and the rows that move the prediction: where what moves nothing
    is the more, the more of an example is left out, it is what the mask leaves out, however it is laid."""
    moved = moved.reshape(len(mask), -1)
    padding = np.sum(~mask.reshape(len(mask), -1), axis=1)
    if moved.shape[1] < 2 or not padding.any():
        return True, None
    alive = np.any(moved, axis=1)
    if not alive.any():  # as without draws, or behind what is zero yet
        return drawn, None
    dead = np.sum(~moved, axis=1)[alive]
    steps = sorted(set(zip(padding[alive].tolist(), dead.tolist(), strict=True)))
    grows = all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(steps))
    grows = grows and (len(steps) == 1 or steps[0][1] < steps[-1][1])  # one that is as many in all is no padding
    told = grows and dead.any() and all(more == 0 for less, more in steps if less == 0)
    if not told:
        return True, None
    return False, moved | ~alive[:, None] if len(steps) > 1 else None
