"""The whole cycle of a method on one record: what a quick start, the analysis and the tests begin with."""

from __future__ import annotations

from kfaccore.method import Block, Hyper, Method, S, T
from kfaccore.options import is_method, one_term
from kfaccore.record import Record
from kfaccore.xp.ranges import SOME, within


def cycle(method: Method[S, T], state: S, record: Record | tuple[Record, ...], hyper: Hyper) -> S:
    """One measure, update, refresh."""
    return method.refresh(method.update(state, method.measure(state, record, hyper), hyper), hyper)


def settle(method: Method[S, T], record: Record | tuple[Record, ...], k: int | None = None, damping: float = 1e-3) -> S:
    """State of `method` fitted to one record, or a tuple of one a loss term, without memory (decay 0).

    k cycles (default `method.cycles`), then one more measure and update, for what lives in the basis of the last
    refresh: EKFAC's moments.
    """
    is_method("settle", method)
    within("settle(k)", 0 if k is None else k, SOME)
    one_term(method, record)
    if not all(isinstance(x, Record) for x in (record if isinstance(record, tuple) else (record,))):
        raise TypeError(f"settle got a {type(record).__name__} as record; need Record(a, g, n) of one layer")
    hyper = Hyper(0, 0.0, damping)
    one = record[0] if isinstance(record, tuple) else record
    state = method.init(Block.of(one), one.g)
    for _ in range(method.cycles if k is None else k):
        state = cycle(method, state, record, hyper)
    return method.update(state, method.measure(state, record, hyper), hyper)
