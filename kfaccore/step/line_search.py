"""Momentum, then a line search on a grid: m <- momentum m + x, update = s m with the s of least loss on the batch.

The shell evaluates the loss of all steps at once (`grid`) and hands the losses to `choose`; when none is lower than
the loss before, the step is 0. The buffer is not scaled by past s.
Source: Dangel, Mueller & Zeinhofer 2024 (2405.15603), in the form of the authors' runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from kfaccore.method import Hyper
from kfaccore.record import Factored, Record
from kfaccore.xp.arrays import Array, namespace


@dataclass(frozen=True)
class LineSearch:
    """momentum, and steps 2^-(points - 1), ..., 1/2, 1."""

    momentum: float = 0.5
    points: int = 31

    needs_records: ClassVar[bool] = False

    def init(self, zeros: dict[str, Array]) -> dict[str, Array]:
        """State: one buffer a layer."""
        return zeros

    def restart(self, state: dict[str, Array]) -> bool:
        """Never off the clock."""
        return False

    def hyper(self, state: dict[str, Array], hyper: Hyper) -> Hyper:
        """As scheduled."""
        return hyper

    def begin(self, state: dict[str, Array], records: dict[str, Record]) -> dict[str, Array]:
        """Nothing to learn from records."""
        return state

    def judge(self, state: dict[str, Array], before: float, after: float) -> tuple[bool, dict[str, Array]]:
        """Every step stays: `choose` has seen to it."""
        return True, state

    def __call__(
        self,
        state: dict[str, Array],
        directions: dict[str, Array],
        grads: dict[str, Array | Factored],
        records: object = None,
    ) -> tuple[dict[str, Array], dict[str, Array], dict[str, Any]]:
        """(buffers, to be scaled by the chosen step, state, info); layers left out keep their buffer."""
        moved = {n: self.momentum * namespace(d).reshape(state[n], d.shape) + d for n, d in directions.items()}
        return moved, {**state, **{n: namespace(m).reshape(m, state[n].shape) for n, m in moved.items()}}, {}

    def grid(self) -> np.ndarray:
        """The steps tried, ascending."""
        return 2.0 ** np.arange(1 - self.points, 1)

    def choose(self, before: float, losses: Any) -> float:
        """The step of the least finite loss, 0 when none is below `before`."""
        losses = np.asarray(losses, dtype=np.float64)
        losses = np.where(np.isfinite(losses), losses, np.inf)
        best = int(np.argmin(losses))
        return float(self.grid()[best]) if losses[best] < before else 0.0
