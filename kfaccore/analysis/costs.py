"""Fitting a method to one record, and what a step of it costs: seconds of its clocks, bytes of its state."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Generic

import numpy as np

from kfaccore import tree
from kfaccore.convolution.patches import Patches
from kfaccore.method import Block, Hyper, Method, MovesWithBasis, Restless, S, Solution, State, T, declares
from kfaccore.record import Record
from kfaccore.xp.arrays import Array, eps, from_host, namespace, to_host
from kfaccore.xp.chunks import at_once

ENOUGH = 0.002  # seconds of rounds after which no more are timed
CLOCKS = ("update", "refresh", "solve")
Seconds = dict[str, float]


@dataclass(frozen=True)
class Fit(Generic[S]):
    """A state on one record without memory, and the cycles that it took."""

    state: S
    cycles: int


def fitted(method: Method[S, T], record: Record, damping: float, probe: np.ndarray | None = None) -> Fit[S]:
    """`method` on one record, for `method.cycles` rounds or until another moves no number by more than rounding; with
    a probe, its sweeps go on until F~ probe moves by less than 1e-8 of itself, at most 3,000 times."""
    hyper = Hyper(0, 0.0, damping)
    swept = _swept(method, record, hyper, method.cycles)
    state = method.refresh(swept.state, hyper)
    if _tells_more(method, swept.cycles < method.cycles):
        state = _updated(method, state, record, hyper)
    if probe is None or method.cycles == 1:
        return Fit(state, swept.cycles)
    try:
        old = to_host(method.matvec(state, probe, hyper))
    except (ValueError, TypeError):  # inverses only: no F~ that could stand still
        return Fit(state, swept.cycles)
    for _ in range(3000):
        state = _updated(method, state, record, hyper)
        new = to_host(method.matvec(state, probe, hyper))
        if np.linalg.norm(new - old) <= 1e-8 * np.linalg.norm(new):
            break
        old = new
    return Fit(method.refresh(state, hyper), swept.cycles)


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


def fitted_and_timed(
    method: Method[S, T], record: Record, grad: Array, hyper: Hyper
) -> tuple[Fit[S], Solution, Seconds, int]:
    """What `fitted` makes and its solution, the seconds that its own last update and refresh and the solve took, and
    bytes of the state.

    For what is too slow to be done twice.
    """
    swept = _swept(method, record, hyper, method.cycles - 1)
    marks = [time.perf_counter()]
    state = _updated(method, swept.state, record, hyper)
    marks.append(time.perf_counter())
    state = method.refresh(state, hyper)
    marks.append(time.perf_counter())
    if _tells_more(method, swept.cycles < method.cycles - 1):
        state = _updated(method, state, record, hyper)
    start = time.perf_counter()
    solution = method.solve(state, grad, hyper, record)
    to_host(solution.direction)  # waits for a device
    seconds = {"solve": time.perf_counter() - start}
    seconds |= dict(zip(CLOCKS, (end - begin for begin, end in pairwise(marks)), strict=False))
    return Fit(state, swept.cycles + 1), solution, seconds, size(state)


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


def _swept(method: Method[S, T], record: Record, hyper: Hyper, cycles: int) -> Fit[S]:
    """Updates alone: methods of more than one round iterate on their averages, so that only the last of their refreshes
    counts. They end where one moves nothing: all others would do the same."""
    state = method.init(Block.of(record), record.g)
    if cycles > 1:
        record = _unfolded(record)
    for done in range(cycles):
        new = _updated(method, state, record, hyper)
        if cycles > 1 and _still(state, new):
            return Fit(new, done + 1)
        state = new
    return Fit(state, cycles)


def _unfolded(record: Record) -> Record:
    """With its patches as rows, where they are one chunk: every sweep would unfold them anew."""
    if isinstance(record.a, Patches) and record.batch <= at_once(record.blocks * record.shared * record.d_in):
        return replace(record, a=record.rows())
    return record


def _tells_more(method: Method[S, T], still: bool) -> bool:
    """Whether an update after the last refresh tells the state anything new of the same record; `still` says that its
    sweeps stood still before."""
    return declares(method, MovesWithBasis) or (not still and (method.cycles > 1 or declares(method, Restless)))


def _still(old: State, new: State) -> bool:
    """Whether no leaf moved by more than rounding of its largest entry, which the sum over rows leaves."""
    pairs = zip(tree.leaves(old), tree.leaves(new), strict=True)
    return all(x is y or _close(x, y) for x, y in pairs)


def _close(x: Array, y: Array) -> bool:
    xp = namespace(y)
    if 0 in y.shape:
        return True
    if not xp.isdtype(y.dtype, "real floating"):
        return bool(xp.all(x == y))
    return bool(xp.max(xp.abs(y - x)) <= 16 * eps(y.dtype, xp) * xp.max(xp.abs(y)))


def _updated(method: Method[S, T], state: S, record: Record, hyper: Hyper) -> S:
    return method.update(state, method.measure(state, record, hyper), hyper)
