"""How far each method is from the exact block of each layer, and what it costs: figures from records alone.

error          ||F - F~|| / ||F||, exact up to 4,096 rows of J, else from probes with a standard error
inverse_error  ||x~ - x|| / ||x|| and cosine of the damped direction of the gradient, x = (F + damping I)^-1 v

Errors are what an approximation loses, not rounding: states are fitted in float64 without memory. Bytes and seconds are
those of the record as it came.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from kfaccore import tree
from kfaccore.analysis.exact import ROWS, ExactBlock, distance, probed
from kfaccore.analysis.fitted import on_host
from kfaccore.analysis.operator import LayerOperator
from kfaccore.method import Block, Hyper, Method, State
from kfaccore.record import Record
from kfaccore.record.jacobian import adjoint
from kfaccore.settle import cycle, settle
from kfaccore.xp import Code
from kfaccore.xp.arrays import Array, from_host, namespace, to_host

PROBES = 64


@dataclass(frozen=True)
class Figures:
    """One method on one layer; figures a method cannot have are NaN and `note` says why.

    norm, size     ||F|| (or the probes' estimate) and ||x||, which weigh layers against each other
    seconds        of one update (measure included), one refresh, one solve
    """

    layer: str
    method: str
    error: float = float("nan")
    standard_error: float = 0.0
    inverse_error: float = float("nan")
    cosine: float = float("nan")
    trace_ratio: float = float("nan")
    bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    norm: float = float("nan")
    size: float = float("nan")
    damping: float = float("nan")
    shared: int = 1
    note: str = ""

    def per_step(self, update: int, refresh: int) -> float:
        """Seconds a step at these clocks."""
        if not self.seconds:
            return float("nan")
        return self.seconds["update"] / update + self.seconds["refresh"] / refresh + self.seconds["solve"]


def compare(
    records: Mapping[str, Record],
    methods: Mapping[str, Method],
    grads: Mapping[str, Array] | None = None,
    damping: float | None = None,
    repeats: int = 5,
    rows: int = ROWS,
    converged: bool = False,
) -> list[Figures]:
    """Figures of every method on every layer.

    grads     gradients to be preconditioned; by default that of the record's first draw
    damping   absolute; by default a tenth of the mean eigenvalue of the layer's exact block
    rows      rows of J up to which nothing is estimated
    converged methods that iterate go on until F~ stands still, instead of their usual number of cycles
    """
    found = []
    for name, record in records.items():
        exact = ExactBlock(record, rows)
        if record.draws == 0:
            raise ValueError(f"the record of layer {name!r} has no draws: its F is not defined")
        chosen = max(0.1 * exact.trace / np.prod(exact.shape), 1e-12) if damping is None else damping
        grad = (grads or {}).get(name)
        target = _Target(name, record, exact, float(chosen), grad)
        for label, method in methods.items():
            found.append(_figures(target, label, method, repeats, converged))
    return found


class _Target:
    """What the methods of one layer are held against; made once."""

    def __init__(self, name: str, record: Record, exact: ExactBlock, damping: float, grad: Array | None) -> None:
        self.name = name
        self.record = record
        self.exact = exact
        self.damping = damping
        self.grad = _first_draw(exact) if grad is None else to_host(grad).astype(float).reshape(exact.shape)
        self.x = exact.solve(self.grad, damping)
        rng = np.random.default_rng(0)
        self.probes = [rng.choice((-1.0, 1.0), exact.shape) for _ in range(PROBES)]
        self._images: list[np.ndarray] = []

    @property
    def images(self) -> list[np.ndarray]:
        """F z of the probes, only when asked."""
        self._images = self._images or [self.exact.matvec(z) for z in self.probes]
        return self._images


def _figures(target: _Target, label: str, method: Method, repeats: int, converged: bool) -> Figures:
    """All figures of one method, as far as it can have them."""
    exact = target.exact
    known = Figures(
        target.name, label, damping=target.damping, shared=target.record.shared, size=float(np.linalg.norm(target.x))
    )
    norm = exact.norm if exact.exact else float("nan")
    hyper = Hyper(0, 0.0, target.damping)
    try:
        state = fitted(method, exact.record, target.damping, target.probes[0] if converged else None)
        solution = method.solve(state, target.grad, hyper, exact.record)
        seconds, size = _costs(method, target.record, _like(target.grad, target.record.g), hyper, repeats)
    except (ValueError, TypeError) as error:
        return replace(known, norm=norm, note=str(error))
    inverse_error, cosine = _direction_error(target.x.ravel(), to_host(solution.direction).ravel())
    known = replace(known, seconds=seconds, bytes=size, inverse_error=inverse_error, cosine=cosine)
    try:
        error, spread, norm, ratio = _block_error(target, method, state)
    except (ValueError, TypeError) as error:
        return replace(known, norm=norm, note=str(error))
    found = replace(known, error=error, standard_error=spread, norm=norm, trace_ratio=ratio)
    return replace(found, note=_told(solution.code))


def _told(code: Array) -> str:
    """The worst code of a solve, where it is not OK."""
    worst = Code(int(to_host(code).max()))
    return "" if worst == Code.OK else f"code {worst.name}"


def fitted(method: Method, record: Record, damping: float, probe: np.ndarray | None = None) -> State:
    """State of `method` on one record without memory; with a probe, its sweeps go on until F~ probe moves by less than
    1e-8 of itself, at most 3,000 times."""
    state = settle(method, record, damping=damping)
    hyper = Hyper(0, 0.0, damping)
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


def _direction_error(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """||y - x|| / ||x|| and the cosine between them."""
    size = np.linalg.norm(x)
    product = size * np.linalg.norm(y)
    without_size = float("inf") if y.any() else 0.0
    error = float(np.linalg.norm(y - x) / size) if size else without_size
    return error, float(x @ y / product) if product else float("nan")


def _block_error(target: _Target, method: Method, state: State) -> tuple[float, float, float, float]:
    """||F - F~|| / ||F||, its standard error, ||F|| and tr F~ / tr F."""
    exact = target.exact
    op = LayerOperator(method, on_host(state), Block.of(exact.record))
    if exact.exact and op.measurable:
        ratio = float(op.trace()) / exact.trace if exact.trace else float("nan")
        return distance(exact, op), 0.0, exact.norm, ratio
    error, spread = probed(exact, op, target.probes, target.images)
    norm = exact.norm if exact.exact else float(np.sqrt(np.mean([(z**2).sum() for z in target.images])))
    trace = float(op.trace()) if op.measurable else float(np.mean([(z * op.matvec(z)).sum() for z in target.probes]))
    return error, spread, norm, trace / exact.trace


def _costs(
    method: Method, record: Record, grad: Array, hyper: Hyper, repeats: int, budget: float = 3.0
) -> tuple[dict[str, float], int]:
    """Median seconds of one update (measure included), refresh and solve, taken in turn as a step takes them, fewer
    than `repeats` rounds once they took `budget` seconds together; and bytes of the state."""
    state = cycle(method, method.init(Block.of(record), record.g), record, hyper)
    times: dict[str, list[float]] = {"update": [], "refresh": [], "solve": []}
    while len(times["solve"]) < repeats and sum(map(sum, times.values())) < budget:
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
    return seconds, sum(to_host(leaf).nbytes for leaf in tree.leaves(state))


def _first_draw(exact: ExactBlock) -> np.ndarray:
    """The gradient g^T a / n of the first draw."""
    host = exact.record
    w: np.ndarray = np.zeros((host.draws, host.batch))
    w[0] = 1.0 / host.n
    return to_host(adjoint(host, w))


def _like(v: np.ndarray, g: Array) -> Array:
    """v where and of the dtype g is."""
    return namespace(g).astype(from_host(v, g), g.dtype)
