"""The whole cycle of a method on one record: what a quick start, the analysis and the tests begin with."""

from __future__ import annotations

from kfaccore.method import Block, Hyper, Method, S, T, Terms, declares
from kfaccore.record import Record


def cycle(method: Method[S, T], state: S, record: Record | tuple[Record, ...], hyper: Hyper) -> S:
    """One measure, update, refresh."""
    return method.refresh(method.update(state, method.measure(state, record, hyper), hyper), hyper)


def settle(method: Method[S, T], record: Record | tuple[Record, ...], k: int | None = None, damping: float = 1e-3) -> S:
    """State of `method` fitted to one record, or a tuple of one a loss term, without memory (decay 0).

    k cycles (default `method.cycles`), then one more measure and update, for what lives in the basis of the last
    refresh: EKFAC's moments.
    """
    one_term(method, record)
    hyper = Hyper(0, 0.0, damping)
    one = record[0] if isinstance(record, tuple) else record
    state = method.init(Block.of(one), one.g)
    for _ in range(method.cycles if k is None else k):
        state = cycle(method, state, record, hyper)
    return method.update(state, method.measure(state, record, hyper), hyper)


def one_term(method: object, given: object) -> None:
    """ValueError for a tuple of loss terms and a method that takes one; micro-batches of one term are a list."""
    if isinstance(given, tuple) and not declares(method, Terms):
        raise ValueError(
            f"a tuple of {len(given)} records came, which is one record a term of the loss, each with its own n; "
            f"{type(method).__name__} takes one term: use PINNKFAC({len(given)}), or give micro-batches of one term as "
            f"a list"
        )
