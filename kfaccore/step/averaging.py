"""The average of the iterates: what to evaluate when batches are small.

mean_k = xi mean_{k-1} + (1 - xi) theta_k with xi = min(decay, 1 - 1/k), a plain mean until the window is full.
Source: Martens & Grosse 2015 (1503.05671), section 14; Polyak & Juditsky 1992.
"""

from __future__ import annotations

from dataclasses import dataclass

from kfaccore.xp.arrays import Array
from kfaccore.xp.ranges import UNIT, ranged


@dataclass(frozen=True)
class IterateAverage:
    """Numbers of the average; its state is one array a parameter."""

    decay: float = 0.97

    def __post_init__(self) -> None:
        ranged(self, decay=UNIT)

    def __call__(self, mean: dict[str, Array], params: dict[str, Array], k: int) -> dict[str, Array]:
        """The mean after step k = 1, 2, ...; at k = 1 it is a copy of `params` and `mean` is not read."""
        keep = min(self.decay, 1 - 1 / k)  # 0 at k = 1
        return {name: keep * mean[name] + (1 - keep) * x if keep else x + 0 for name, x in params.items()}
