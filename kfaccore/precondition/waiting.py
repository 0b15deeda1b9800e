"""What may wait for a step in place of a batch's records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from kfaccore.method import RowsAtSolve, declares
from kfaccore.record import Record


def measured(pre: Any, state: Any, name: str, record: Record) -> Any:
    """Stats of one layer's record, as the step of a Preconditioner to come would measure them; None where that step
    needs the rows themselves, which must then be kept."""
    together = pre.network.covers(dict(state.blocks)) if pre.network is not None else ()
    method = pre.methods[name] if isinstance(pre.methods, Mapping) else pre.methods
    if pre.rule.needs_records or name in together or declares(method, RowsAtSolve):
        return None
    with np.errstate(all="ignore"):  # what is not finite is counted by the Stats
        return method.measure(state.layers[name], record, pre.schedules.hyper(name, state.step))
