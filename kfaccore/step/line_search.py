"""Backtracking on the loss of the batch: the plan for records whose draws cannot model the loss.

update = t x, t tried from twice the last accepted rate and halved until the batch loss is finite and no higher.
Source: Nocedal & Wright 2006, algorithm 3.1, with simple decrease. Cost: one forward a try.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from kfaccore.method import Hyper
from kfaccore.record import Factored
from kfaccore.step.known import Known
from kfaccore.step.model import Penalty, Records
from kfaccore.step.rule import ByLoss
from kfaccore.xp.arrays import Array
from kfaccore.xp.codes import Code
from kfaccore.xp.ranges import BETWEEN, POSITIVE, UNIT, ranged


@dataclass(frozen=True)
class Search:
    """The rate proposed last, steps given up, and the code of the last step."""

    rate: float
    rejected: int = 0
    code: int = int(Code.OK)


@dataclass(frozen=True)
class LineSearch(ByLoss):
    """No records, no momentum, no quadratic model: works with empirical draws, and never keeps a non-finite loss.

    cap     largest rate, and the first one tried
    grow    factor on the last accepted rate
    shrink  factor after a try that raised the loss
    least   a share of the proposed update below which the step is given up
    """

    cap: float = 1.0
    grow: float = 2.0
    shrink: float = 0.5
    least: float = 1e-4

    judges: ClassVar[bool] = True
    traced: ClassVar[bool] = False
    terms: ClassVar[bool] = True

    def __post_init__(self) -> None:
        ranged(self, cap=POSITIVE, grow=POSITIVE, shrink=BETWEEN, least=UNIT)

    def init(self, zeros: dict[str, Array]) -> Search:
        return Search(self.cap)

    def restart(self, motion: Search) -> bool:
        """Never off the clock."""
        return False

    def hyper(self, motion: Search, hyper: Hyper) -> Hyper:
        """As scheduled."""
        return hyper

    def begin(self, motion: Search, records: Records) -> Search:
        """Nothing to learn from records."""
        return motion

    def gradients(
        self, motion: Search, grads: Mapping[str, Array | Factored]
    ) -> tuple[Mapping[str, Array | Factored], Search]:
        """Those of the batch."""
        return grads, motion

    def __call__(
        self,
        motion: Search,
        directions: dict[str, Array],
        grads: Mapping[str, Array | Factored],
        records: Records | None = None,
        l2: Penalty = 0.0,
        known: Known = Known(),  # noqa: B008 frozen
    ) -> tuple[dict[str, Array], Search, dict[str, float | Array]]:
        """(updates to try first, motion, info)."""
        told: dict[str, float | Array] = {"alpha": motion.rate, "code": Code(motion.code), "rejected": motion.rejected}
        return {name: motion.rate * x for name, x in directions.items()}, motion, told

    def judge(self, motion: Search, share: float, before: float, after: float) -> tuple[float, Search]:
        """`share` when the loss is finite and no higher, else less of it; 0 when the step is given up."""
        if np.isfinite(after) and after <= before:
            rate = min(self.cap, self.grow * share * motion.rate)
            return share, replace(motion, rate=rate, code=int(Code.OK))
        if share * self.shrink >= self.least:
            return share * self.shrink, motion
        code = Code.UNCONVERGED if np.isfinite(before) else Code.NONFINITE
        return 0.0, replace(motion, rejected=motion.rejected + 1, code=int(code))
