"""What may wait for a step in place of a batch's records."""

from __future__ import annotations

import numpy as np

from kfaccore.method import RowsAtSolve, Stats, declares
from kfaccore.precondition.preconditioner import Preconditioner, State
from kfaccore.record import Record


def measured(pre: Preconditioner, state: State, name: str, record: Record) -> Stats | None:
    """Stats of one layer's record, as the step of a Preconditioner to come would measure them; None where that step
    needs the rows themselves, which must then be kept."""
    if pre.rule.needs_records or name not in state.layers or declares(pre.assigned.of(name), RowsAtSolve):
        return None
    with np.errstate(all="ignore"):  # what is not finite is counted by the Stats
        return pre.assigned.of(name).measure(state.layers[name], record, pre.schedules.hyper(name, state.step))
