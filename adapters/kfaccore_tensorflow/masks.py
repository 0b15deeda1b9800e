"""Which positions of a call's rows exist, by the masks that Keras layers were called under."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from kfaccore_tensorflow.places import Place


def existing(
    g: np.ndarray,
    within: Sequence[tuple[int, int | None]],
    masks: Sequence[np.ndarray],
    examples: int,
    rows: tuple[int, ...],
    place: Place,
    lookup: bool,
    present: np.ndarray | None = None,
) -> np.ndarray | None:
    """(batch, positions), those that a mask leaves of examples that count, and any other that moves the prediction all
    the same; None for all.

    g         (draws, blocks, batch, positions, d_out), the batch being one where rows stand together
    within    (place among `masks`, step or None) of each layer call around, the innermost first
    rows      sizes of the call's row axes, `place` where they stand; of rows that stand together the first may still
              count examples
    lookup    of look-ups that no example owns, those count that move the prediction
    """
    batch, positions = g.shape[2:4]
    live = np.any(g != 0, axis=(0, 1, 4)) if len(g) else None
    together = batch == 1 < examples
    if together and lookup:
        return live
    if together and (not rows or rows[0] % examples):
        return None
    axis = 0 if together or place.axis is None else place.axis
    sizes = (*rows[:axis], rows[axis] // examples, *rows[axis + 1 :])
    moved = np.zeros((examples, positions), bool) if live is None else live.reshape(examples, -1)
    mask = _left(within, masks, sizes, moved)
    if present is not None:
        mask = present[:, None] & (np.ones_like(moved) if mask is None else mask)
    if mask is None:
        return None
    mask = mask.reshape(batch, positions)
    return mask if live is None else mask | live


def _left(
    within: Sequence[tuple[int, int | None]], masks: Sequence[np.ndarray], sizes: tuple[int, ...], moved: np.ndarray
) -> np.ndarray | None:
    """(examples, positions) by the mask of the layer's call or of one around it."""
    for place, step in within:
        mask = masks[place].astype(bool)
        if mask.shape[0] != len(moved):
            continue
        if step is not None:
            return np.repeat(mask[:, step : step + 1], prod(sizes), axis=1)
        found = _spread(mask, sizes)
        if found:
            return _fewest(found, moved)
    return None


def _spread(mask: np.ndarray, sizes: tuple[int, ...]) -> list[np.ndarray]:
    """A mask (examples, positions) along each of the axes that rows of an example have and that may count positions:
    one of as many, or of more, the others before them or behind."""
    examples, positions = mask.shape
    found: dict[bytes, np.ndarray] = {}
    for axis, size in enumerate(sizes):
        if size == 0 or size % positions:
            continue
        many = size // positions
        for along in (np.repeat(mask, many, axis=1), np.tile(mask, (1, many))):
            lone = (1,) * (len(sizes) - axis - 1)
            whole = np.broadcast_to(along.reshape(examples, *(1,) * axis, size, *lone), (examples, *sizes))
            whole = whole.reshape(examples, -1)
            found[whole.tobytes()] = whole
    return list(found.values())


def _fewest(found: Sequence[np.ndarray], moved: np.ndarray) -> np.ndarray | None:
    """The one that leaves out the fewest rows that move the prediction; None where several leave out as few."""
    out = [int(np.sum(moved & ~mask)) for mask in found]
    return found[out.index(min(out))] if out.count(min(out)) == 1 else None
