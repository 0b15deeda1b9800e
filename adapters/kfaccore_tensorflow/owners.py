"""Whose rows are whose, as far as batches have shown, and when a batch is to be asked.

A batch of sizes not seen before is asked, and of those seen every one whose number is a power of two: what no batch
could show, as one of a single example or a part without a gradient, is asked of the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kfaccore_tensorflow.kinds import Seen
from kfaccore_tensorflow.places import Place, owned, ragged

PATIENCE = 16  # batches in a row that are asked of a part without a gradient; then those of powers of two are
MOST = 256  # sizes of batches that are kept in mind
Sizes = tuple[int, ...]


@dataclass
class Owners:
    """The places of the calls of each part in the batch at hand, and what has been asked so far.

    sizes    the number of examples, and the sizes of the calls' outputs
    kept     places by sizes, where all that a batch could show was shown
    ragged   parts whose rows are each one example's, though no axis tells whose
    """

    places: dict[str, list[Place]] = field(default_factory=dict)
    sizes: Sizes = (0,)
    kept: dict[Sizes, dict[str, list[Place]]] = field(default_factory=dict)
    ragged: set[str] = field(default_factory=set)
    looks: int = 0

    def due(self, sizes: Sizes) -> bool:
        """Whether a batch of these sizes, now at hand, is to be asked. One example alone cannot tell."""
        self.sizes = sizes
        self.places = self.kept.get(sizes, self.places)
        if sizes[0] < 2:
            return False
        self.looks += 1
        return sizes not in self.kept or self.looks & (self.looks - 1) == 0

    def look(self, given: Mapping[str, Sequence[Seen]]) -> None:
        """Take the answers of the batch at hand, from the two draws that asked, first in `given`."""
        open_ = False
        places = dict(self.places)
        for name, calls in given.items():
            known = self.places.get(name, [])
            found = []
            for i, one in enumerate(calls):
                g = np.moveaxis(one.g[:2], 1, -2)  # blocks beside the features
                first, second = g.reshape(*g.shape[:-2], g.shape[-2] * g.shape[-1])
                old = known[i] if len(known) == len(calls) else None
                place, shown = owned(first, second, self.sizes[0], old)
                if shown and place.mixes and ragged(first, second, self.sizes[0]):
                    self.ragged.add(name)
                found.append(place)
                open_ |= not shown
            places[name] = found
        self.places = places
        if not open_ or self.looks >= PATIENCE:
            self.kept[self.sizes] = places
            if len(self.kept) > MOST:
                del self.kept[next(iter(self.kept))]

    @property
    def mixing(self) -> list[str]:
        """Parts with rows that move several examples or are shared by them."""
        return sorted(name for name, places in self.places.items() if any(place.mixes for place in places))
