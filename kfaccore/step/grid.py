"""Momentum, then the best power of two on the batch's loss: m <- momentum m + x, update = 2^-k m, k = 0..points - 1.

The search starts at the rate of the step before and walks downhill, one forward a try: halves until the loss falls,
then doubles or halves while it falls further, so that the result is at least a local minimum of the grid. No try with a
non-finite loss is ever taken, and when none is below the loss before, the step is 0. The buffer m is not scaled by
past rates unless `scaled`: two published forms, m <- momentum m + x (code) and m <- 2^-k (momentum m + x) (text).
Source: Dangel, Mueller & Zeinhofer 2024 (2405.15603). Cost: four to six forwards a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from kfaccore import tree
from kfaccore.method import Hyper
from kfaccore.record import Factored
from kfaccore.step.known import Known
from kfaccore.step.model import Penalty, Records
from kfaccore.step.rule import ByLoss
from kfaccore.step.taken import Taken, of_step, taken
from kfaccore.xp.arrays import Array, namespace
from kfaccore.xp.codes import Code
from kfaccore.xp.ranges import COUNT, SHARE, ranged


@dataclass(frozen=True)
class Trail:
    """One buffer a layer, the rate proposed, losses of the shares tried for the step at hand, which layers it is of
    until it is judged, and counters."""

    buffers: dict[str, Array]
    rate: float = 1.0
    tried: dict[float, float] = field(default_factory=dict)
    rejected: int = 0
    code: int = int(Code.OK)
    layers: Taken = tree.static(default=None)  # noqa: RUF009 a field


@dataclass(frozen=True)
class GridSearch(ByLoss):
    """momentum, how many powers of two the grid has, and whether the buffer keeps the update itself."""

    momentum: float = 0.5
    points: int = 31
    scaled: bool = False

    judges: ClassVar[bool] = True
    traced: ClassVar[bool] = False
    terms: ClassVar[bool] = True

    def __post_init__(self) -> None:
        ranged(self, momentum=SHARE, points=COUNT)

    def init(self, zeros: dict[str, Array]) -> Trail:
        return Trail(zeros)

    def restart(self, motion: Trail) -> bool:
        """Never off the clock."""
        return False

    def hyper(self, motion: Trail, hyper: Hyper) -> Hyper:
        """As scheduled."""
        return hyper

    def begin(self, motion: Trail, records: Records) -> Trail:
        """Nothing to learn from records."""
        return motion

    def gradients(
        self, motion: Trail, grads: Mapping[str, Array | Factored]
    ) -> tuple[Mapping[str, Array | Factored], Trail]:
        """Those of the batch."""
        return grads, motion

    def __call__(
        self,
        motion: Trail,
        directions: dict[str, Array],
        grads: Mapping[str, Array | Factored],
        records: Records | None = None,
        l2: Penalty = 0.0,
        known: Known = Known(),  # noqa: B008 frozen
    ) -> tuple[dict[str, Array], Trail, dict[str, float | Array]]:
        """(updates at the rate of the step before, motion, info); layers left out keep their buffer."""
        old = motion.buffers
        rate = motion.rate
        moved = {name: self.momentum * namespace(d).reshape(old[name], d.shape) + d for name, d in directions.items()}
        kept = {**old, **{name: namespace(m).reshape(m, old[name].shape) for name, m in moved.items()}}
        told: dict[str, float | Array] = {"alpha": rate, "code": Code(motion.code), "rejected": motion.rejected}
        after = replace(motion, buffers=kept, tried={}, layers=taken(directions, old))
        return {name: rate * m for name, m in moved.items()}, after, told

    def judge(self, motion: Trail, share: float, before: float, after: float) -> tuple[float, Trail]:
        """The next share to try, or the best one when both its neighbours were tried; 0 when none lowers the loss."""
        tried = {**motion.tried, share: float(after) if np.isfinite(after) else np.inf}
        best = min(tried, key=lambda s: tried[s])
        least = 2.0 ** (1 - self.points)
        if not tried[best] < before:  # nothing has helped yet: on from the shortest step tried
            best = min(tried)
            if best / 2 * motion.rate < least:
                code = Code.UNCONVERGED if np.isfinite(before) else Code.NONFINITE
                return 0.0, self._ended(replace(motion, rejected=motion.rejected + 1), 0.0, code)
            return best / 2, replace(motion, tried=tried)
        around = [s for s in (2 * best, best / 2) if least <= s * motion.rate <= 1 and s not in tried]
        if around:
            return around[0], replace(motion, tried=tried)
        if best != share:  # found, but another share is in force: ask for it, and end when it is
            return best, replace(motion, tried=tried)
        return share, self._ended(motion, motion.rate * share, Code.OK)

    def _ended(self, motion: Trail, rate: float, code: Code) -> Trail:
        """The state after a step with this rate; after none the next search starts from the top."""
        buffers = motion.buffers
        if self.scaled:
            buffers = of_step(lambda m: rate * m, buffers, motion.layers)
        return replace(motion, buffers=buffers, rate=rate or 1.0, tried={}, code=int(code), layers=None)
