"""Fitting a method to one record, and what a step of it costs: seconds of its clocks, bytes of its state."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np

from kfaccore import tree
from kfaccore.method import Block, Hyper, Method, S, State, T
from kfaccore.record import Record
from kfaccore.settle import cycle
from kfaccore.xp.arrays import Array, from_host, namespace, to_host

ENOUGH = 0.005  # seconds of rounds after which no more are timed
CLOCKS = ("update", "refresh", "solve")
Seconds = dict[str, float]


def fitted(method: Method[S, T], record: Record, damping: float, probe: np.ndarray | None = None) -> S:
    """State of `method` on one record without memory; with a probe, its sweeps go on until F~ probe moves by less than
    1e-8 of itself, at most 3,000 times."""
    hyper = Hyper(0, 0.0, damping)
    state = _updated(method, cycle(method, _swept(method, record, hyper), record, hyper), record, hyper)
    if probe is None or method.cycles == 1:
        return state
    try:
        old = to_host(method.matvec(state, probe, hyper))
    except (ValueError, TypeError):  # inverses only: no F~ that could stand still
        return state
    for _ in range(3000):
        state = _updated(method, state, record, hyper)
        new = to_host(method.matvec(state, probe, hyper))
        if np.linalg.norm(new - old) <= 1e-8 * np.linalg.norm(new):
            break
        old = new
    return method.refresh(state, hyper)


def costs(
    method: Method[S, T], state: S, record: Record, grad: Array, hyper: Hyper, repeats: int
) -> tuple[Seconds, int]:
    """Median seconds of one update (measure included), refresh and solve, and bytes of the state.

    state   a settled one, which `like_record` has brought to where the record is: nothing needs to be warmed up

    They are taken in turn as a step takes them, fewer than `repeats` rounds once they took `ENOUGH` seconds together.
    """
    times: dict[str, list[float]] = {name: [] for name in CLOCKS}
    while len(times["solve"]) < repeats and sum(map(sum, times.values())) < ENOUGH:
        marks = [time.perf_counter()]
        state = _updated(method, state, record, hyper)
        marks.append(time.perf_counter())
        state = method.refresh(state, hyper)
        marks.append(time.perf_counter())
        to_host(method.solve(state, grad, hyper, record).direction)  # waits for a device
        marks.append(time.perf_counter())
        for name, (start, end) in zip(times, pairwise(marks), strict=True):
            times[name].append(end - start)
    return {name: float(np.median(values)) for name, values in times.items()}, size(state)


def fitted_and_timed(method: Method[S, T], record: Record, grad: Array, hyper: Hyper) -> tuple[S, Seconds, int]:
    """The state of `fitted`, the seconds that its own last update and refresh took, and one solve; bytes of the state.

    For what is too slow to be done twice.
    """
    state = _updated(method, _swept(method, record, hyper), record, hyper)
    marks = [time.perf_counter()]
    state = method.refresh(state, hyper)
    marks.append(time.perf_counter())
    state = _updated(method, state, record, hyper)  # what lives in the basis of the refresh
    marks.append(time.perf_counter())
    to_host(method.solve(state, grad, hyper, record).direction)
    marks.append(time.perf_counter())
    refresh, update, solve = (end - start for start, end in pairwise(marks))
    return state, {"update": update, "refresh": refresh, "solve": solve}, size(state)


def size(state: State) -> int:
    """Bytes of a state."""
    return sum(to_host(leaf).nbytes for leaf in tree.leaves(state))


def like_record(state: S, record: Record) -> S:
    """A state of the host where the record is, its floating leaves in the dtype of the record."""

    def moved(leaf: Array) -> Array:
        here = from_host(np.asarray(leaf), record.g)
        floating = np.issubdtype(np.asarray(leaf).dtype, np.floating)
        return namespace(record.g).astype(here, record.g.dtype) if floating else here

    return tree.map(moved, state)


def _swept(method: Method[S, T], record: Record, hyper: Hyper) -> S:
    """Before the last cycle: methods of more than one round iterate on their averages alone, so that only the last of
    their refreshes counts."""
    state = method.init(Block.of(record), record.g)
    for _ in range(method.cycles - 1):
        state = _updated(method, state, record, hyper)
    return state


def _updated(method: Method[S, T], state: S, record: Record, hyper: Hyper) -> S:
    return method.update(state, method.measure(state, record, hyper), hyper)
