"""How many threads BLAS may use on a layer: threads that share out small products wait for each other longer than they
work (twice the seconds on two cores for a detector of 100,000 parameters)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

from threadpoolctl import ThreadpoolController

from kfaccore.record import Record

WIDE = 1024  # a side from which on threads pay


def one_thread(record: Record) -> bool:
    """Whether the sides of a layer are narrow."""
    return max(record.d_in, record.d_out) < WIDE


def fitting(record: Record) -> AbstractContextManager[object]:
    """One thread for a layer of narrow sides, else as many as there were."""
    return _pools().limit(limits=1, user_api="blas") if one_thread(record) else nullcontext()


@cache
def _pools() -> ThreadpoolController:
    """The libraries of this process; to look for them takes milliseconds."""
    return ThreadpoolController()
