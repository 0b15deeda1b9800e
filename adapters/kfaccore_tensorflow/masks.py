"""Which positions of a call's rows exist, by the masks that Keras layers were called under."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from kfaccore_tensorflow.places import Place
from kfaccore_tensorflow.spread import fewest, spread

Within = Sequence[tuple[tuple[int, ...], int | None]]


@dataclass
class Rows:
    """Rows of one call, an entry an example and position.

    within    (places among the batch's masks, step or None) of each layer call around, the innermost first; of several
              places, as of all that rows come from, the masks are one or tell nothing
    sizes     of an example's row axes
    shape     (batch, positions), the batch being one where rows stand together
    live      those that move the prediction; None without draws
    single    what exists whatever masks say: look-ups that no example owns, those that move the prediction
    left      (examples, positions) by a mask, or None
    """

    within: Within
    sizes: tuple[int, ...]
    shape: tuple[int, int]
    examples: int
    live: np.ndarray | None
    single: bool = False
    left: np.ndarray | None = None

    @classmethod
    def of(
        cls, g: np.ndarray, within: Within, examples: int, rows: tuple[int, ...], place: Place, lookup: bool
    ) -> Rows:
        """Arguments as those of `existing`."""
        batch, positions = g.shape[2:4]
        live = np.any(g != 0, axis=(0, 1, 4)) if len(g) else None
        together = batch == 1 < examples
        apart = not together or (bool(rows) and rows[0] % examples == 0)
        single = together and lookup
        if single or not apart:
            return cls((), (), (batch, positions), examples, live, single)
        axis = 0 if together or place.axis is None else place.axis
        sizes = (*rows[:axis], rows[axis] // examples, *rows[axis + 1 :])
        return cls(within, sizes, (batch, positions), examples, live)

    @property
    def moved(self) -> np.ndarray:
        """(examples, positions) that move the prediction, none without draws."""
        if self.live is None:
            return np.zeros((self.examples, prod(self.shape) // self.examples), bool)
        return self.live.reshape(self.examples, -1)

    def masks(self, masks: Sequence[np.ndarray]) -> list[tuple[tuple[int, ...], int | None, np.ndarray]]:
        """Places, step and (examples, *positions) of those of as many examples, or of several rows of each."""
        found = []
        for places, step in self.within:
            mask, *others = (masks[place].astype(bool) for place in places)
            if not all(np.array_equal(mask, other) for other in others):
                continue
            if len(mask) == self.examples:
                found.append((places, step, mask))
            elif len(mask) % self.examples == 0 < len(mask):
                found.append((places, None, mask.reshape(self.examples, -1, *mask.shape[1:])))
        return found

    def lay(self, masks: Sequence[np.ndarray]) -> None:
        """The mask of the layer's call, or of one around it, along these rows alone."""
        for _, step, mask in self.masks(masks):
            part = mask if step is None else mask[:, step]
            found = [] if part.ndim == 1 else spread(part, self.sizes)
            if found:
                self.left = fewest(found, self.moved)
            elif step is not None:  # all rows of a step
                there = np.any(part.reshape(self.examples, -1), axis=1)
                self.left = np.repeat(there[:, None], prod(self.sizes), axis=1)
            if found or step is not None:
                return

    def existing(self, present: np.ndarray | None = None) -> np.ndarray | None:
        """(batch, positions), None for all. A position that moves the prediction counts all the same."""
        if self.single:
            return self.live
        if not self.sizes:
            return None
        mask = self.left
        if present is not None:
            mask = np.repeat(present[:, None], prod(self.sizes), axis=1) if mask is None else present[:, None] & mask
        if mask is None:
            return None
        mask = mask.reshape(self.shape)
        mask = mask if self.live is None else mask | self.live
        return None if mask.all() else mask


def existing(
    g: np.ndarray,
    within: Within,
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
    rows      sizes of the call's row axes, `place` where they stand; of rows that stand together the first may still
              count examples
    lookup    of look-ups that no example owns, those count that move the prediction
    """
    one = Rows.of(g, within, examples, rows, place, lookup)
    one.lay(masks)
    return one.existing(present)
