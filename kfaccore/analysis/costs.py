"""Fitting a method to one record, and what a step of it costs: seconds of its clocks, bytes of its state."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np

from kfaccore import tree
from kfaccore.method import Block, Hyper, Method, State
from kfaccore.record import Record
from kfaccore.settle import cycle
from kfaccore.xp.arrays import Array, to_host

ENOUGH = 0.03  # seconds of rounds after which no more are timed
CLOCKS = ("update", "refresh", "solve")


def fitted(method: Method, record: Record, damping: float, probe: np.ndarray | None = None) -> State:
    """State of `method` on one record without memory; with a probe, its sweeps go on until F~ probe moves by less than
    1e-8 of itself, at most 3,000 times."""
    hyper = Hyper(0, 0.0, damping)
    state = _settled(method, record, hyper)
    state = method.update(state, method.measure(state, record, hyper), hyper)
    if probe is None or method.cycles == 1:
        return state
    try:
        old = to_host(method.matvec(state, probe, hyper))
    except (ValueError, TypeError):  # inverses only: no F~ that could stand still
        return state
    for _ in range(3000):
        state = method.update(state, method.measure(state, record, hyper), hyper)
        new = to_host(method.matvec(state, probe, hyper))
        if np.linalg.norm(new - old) <= 1e-8 * np.linalg.norm(new):
            break
        old = new
    return method.refresh(state, hyper)


def _settled(method: Method, record: Record, hyper: Hyper) -> State:
    """What `settle` comes to before its last update: methods of more than one round iterate on their averages alone, so
    that only the last of their refreshes counts."""
    state = method.init(Block.of(record), record.g)
    for _ in range(method.cycles - 1):
        state = method.update(state, method.measure(state, record, hyper), hyper)
    return cycle(method, state, record, hyper)


def costs(
    method: Method, record: Record, grad: Array, hyper: Hyper, repeats: int, warm: bool = True
) -> tuple[dict[str, float], int, State]:
    """Median seconds of one update (measure included), refresh and solve, taken in turn as a step takes them, fewer
    than `repeats` rounds once they took `ENOUGH` seconds together; bytes of the state; and the state.

    One round goes before those that are timed; without `warm` all but the last that settle the method, so that the
    state is that of `fitted`.
    """
    state = method.init(Block.of(record), record.g)
    if warm:
        state = cycle(method, state, record, hyper)
    elif method.cycles > 1:
        state = _settled(method, record, hyper)
    times: dict[str, list[float]] = {name: [] for name in CLOCKS}
    while len(times["solve"]) < repeats and sum(map(sum, times.values())) < ENOUGH:
        marks = [time.perf_counter()]
        state = method.update(state, method.measure(state, record, hyper), hyper)
        marks.append(time.perf_counter())
        state = method.refresh(state, hyper)
        marks.append(time.perf_counter())
        to_host(method.solve(state, grad, hyper, record).direction)  # waits for a device
        marks.append(time.perf_counter())
        for name, (start, end) in zip(times, pairwise(marks), strict=True):
            times[name].append(end - start)
    seconds = {name: float(np.median(values)) for name, values in times.items()}
    return seconds, sum(to_host(leaf).nbytes for leaf in tree.leaves(state)), state
