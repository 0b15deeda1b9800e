"""One call from a record and a gradient to a direction."""

from __future__ import annotations

from kfaccore.method import Hyper, Method
from kfaccore.methods.kronecker.kfac import KFAC
from kfaccore.record import Factored, Record
from kfaccore.settle import settle
from kfaccore.xp.arrays import Array


def direction(record: Record, grad: Array | Factored, method: Method | None = None, damping: float = 1e-3) -> Array:
    """(F~ + damping)^-1 grad with the curvature of one record: no averages, no state; for a first look and analysis.

    record   one mini-batch of one layer
    grad     (d_out, d_in), (blocks, d_out, d_in) or Factored; the direction comes back in the same shape
    method   default KFAC(); it is settled on the record for its own number of cycles

    What cannot be solved is handled as `Method.solve` says (zeros for a non-finite gradient); codes are not returned
    here: use `settle` and `method.solve` to see them. ValueError for a damping below 0 or NaN.
    """
    if damping is None or (isinstance(damping, int | float) and not damping >= 0):
        raise ValueError(f"damping is {damping!r}; need a number of at least 0")
    chosen: Method = KFAC() if method is None else method
    state = settle(chosen, record, damping=damping)
    return chosen.solve(state, grad, Hyper(0, 0.0, damping), record).direction
