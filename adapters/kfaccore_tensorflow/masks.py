"""Which positions of a call's rows exist, by the masks that Keras layers were called under."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def existing(
    g: np.ndarray,
    within: Sequence[tuple[int, int | None]],
    masks: Sequence[np.ndarray],
    examples: int,
    rows: tuple[int, ...],
    lookup: bool,
    present: np.ndarray | None = None,
) -> np.ndarray | None:
    """(batch, positions), those that a mask leaves of examples that count, and any other that moves the prediction all
    the same; None for all.

    g         (draws, blocks, batch, positions, d_out), the batch being one where rows stand together
    within    (place among `masks`, step or None) of each layer call around, the innermost first
    rows      sizes of the call's row axes; of rows that stand together the first may still count examples
    lookup    of look-ups that no example owns, those count that move the prediction
    """
    batch, positions = g.shape[2:4]
    live = np.any(g != 0, axis=(0, 1, 4)) if len(g) else None
    together = batch == 1 < examples
    if together and lookup:
        return live
    each = (examples, positions // examples) if together and rows and not rows[0] % examples else (batch, positions)
    mask = _left(within, masks, *each)
    if present is not None and each[0] == examples:
        mask = np.ones(each, bool) if mask is None else mask
        mask = mask & present[:, None]
    if mask is None:
        return None
    mask = mask.reshape(batch, positions)
    return mask if live is None else mask | live


def _left(
    within: Sequence[tuple[int, int | None]], masks: Sequence[np.ndarray], examples: int, positions: int
) -> np.ndarray | None:
    """(examples, positions) by the mask of the layer's call or of one around it; else by any of the batch's that is of
    the same positions."""
    candidates = [(*one, False) for one in within] + [(place, None, True) for place in range(len(masks))]
    for place, step, same in candidates:
        mask = masks[place].astype(bool)
        if step is not None and positions == 1:
            mask = mask[:, step : step + 1]
        whole = mask.shape[0] == examples and positions % mask.shape[1] == 0
        if not whole or (step is not None and positions > 1) or (same and positions != mask.shape[1]):
            continue
        return np.repeat(mask, positions // mask.shape[1], axis=1)
    return None
