"""Training a PINN: one batch, one gradient, one update, with a Preconditioner, Gauss-Newton, Adam or L-BFGS."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kfaccore import GaussNewton, Preconditioner, Quadratic
from kfaccore_numpy.baselines import SGD, Adam
from kfaccore_numpy.equations.network import PINN, Batch, Captured, Passed
from kfaccore_numpy.network import Params
from kfaccore_numpy.train import Progress, _placing

Solver = Preconditioner | GaussNewton | Adam | SGD


@dataclass(frozen=True)
class LBFGS:
    """SciPy's limited-memory BFGS with this many pairs, on a fixed batch."""

    memory: int = 20


@dataclass
class Ahead:
    """The forward that judged a step is the first half of the next one, when that has the same batch.

    Kept with copies of what it was computed from, so that anything changed in between is seen. A batch is expected
    again once it came twice in a row.
    """

    pinn: PINN
    last: Any = None
    passed: Passed | None = None
    source: tuple[Any, ...] = ()

    def capture(self, params: Params, batch: Batch) -> Captured:
        """`PINN.capture`."""
        passed = self.passed
        self.passed = None
        if passed is None or not _equal(self.source, _leaves(params, batch)):
            passed = self.pinn.forward(params, batch)
        return self.pinn.backward(params, batch, passed)

    def judging(self, solver: Any, batch: Batch) -> bool:
        """Whether to keep the forward that judges this step: it is most often the only one."""
        again = batch is self.last
        self.last = batch
        judge = solver.rule if isinstance(solver, Preconditioner) else solver
        return again and isinstance(judge, Quadratic | GaussNewton)

    def loss(self, params: Params, batch: Batch) -> float:
        """`PINN.loss`, kept."""
        self.passed = None  # before the next is made
        self.passed = self.pinn.forward(params, batch)
        self.source = tuple(x.copy() for x in _leaves(params, batch))
        return self.passed.loss


def _leaves(params: Params, batch: Batch) -> tuple[Any, ...]:
    return (*params.values(), *(x for pair in batch for x in pair))


def _equal(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    return len(first) == len(second) and all(np.array_equal(x, y) for x, y in zip(first, second, strict=True))


def initial_state(pinn: PINN, params: Params, solver: Solver) -> Any:
    """What `step` needs of the solver before the first update."""
    if isinstance(solver, Preconditioner):
        return solver.init(pinn.network.blocks(), next(iter(params.values())))
    return solver.init() if isinstance(solver, GaussNewton) else solver.init(params)


def step(
    pinn: PINN,
    params: Params,
    batch: Batch,
    solver: Solver,
    state: Any,
    index: int,
    rows: int = 0,
    ahead: Ahead | None = None,
) -> tuple[float, Any, Any]:
    """One update of `params`: (loss of the batch before it, state, Info or None).

    rows    bounds memory: points times slots of one pass, whose statistics and gradients are added up; 0 is all at
            once. Only where statistics are enough: the quadratic step and Gauss-Newton hold the whole batch's records
    ahead   one for all steps of a run saves a forward a step on a batch that stays
    """
    if not isinstance(solver, Preconditioner | GaussNewton):
        loss, grads = pinn.gradient(params, batch)
        solver.step(params, grads, state, index)
        return loss, state, None
    enough = isinstance(solver, Preconditioner) and not solver.rule.needs_records
    if rows and enough:
        found = streamed(pinn, params, batch, solver, state, rows)
    else:
        found = ahead.capture(params, batch) if ahead else pinn.capture(params, batch)
    if isinstance(solver, GaussNewton):
        updates, state, info = solver.step(state, found.records, found.residuals)
    else:
        updates, state, info = solver.step(state, found.records, found.grads)
    before = found.loss
    found = None  # the records go before the next forward
    loss = ahead.loss if ahead and ahead.judging(solver, batch) else pinn.loss
    place = _placing(params, updates, 0.0)
    place(1.0)
    with np.errstate(all="ignore"):  # a loss that is not finite is an answer here
        _, state = solver.judge(state, before, place, lambda: loss(params, batch))
    return before, state, info


def streamed(pinn: PINN, params: Params, batch: Batch, solver: Any, state: Any, rows: int) -> Captured:
    """As `capture` with the method's Stats for records: no more than `rows` points times slots are held at once."""
    total: Captured | None = None
    for part in pinn.parts(params, batch, rows):
        total = _added(total, part, solver, state)
        del part  # with its records, before the next are made
    assert total is not None
    return total


def _added(total: Captured | None, part: Captured, solver: Any, state: Any) -> Captured:
    """`total` and the next part, whose records become the method's Stats."""
    stats: dict[str, Any] = {}
    for name, record in part.records.items():
        method = solver.methods[name] if isinstance(solver.methods, dict) else solver.methods
        stats[name] = method.measure(state.layers[name], record, solver.schedules.hyper(name, state.step))
        if total is not None:
            stats[name] = method.combine(total.records[name], stats[name])
    if total is None:
        return replace(part, records=stats)
    grads = {name: g + part.grads[name] for name, g in total.grads.items()}
    return Captured(total.loss + part.loss, (), grads, stats)


def fit(
    pinn: PINN,
    params: Params,
    batches: Iterator[Batch],
    solver: Solver | LBFGS,
    steps: int,
    *,
    rows: int = 0,
    state: Any = None,
    start: int = 0,
) -> Iterator[Progress]:
    """Train in place; yields after every step (L-BFGS: when it is done), timing only the steps.

    With its parameters, its `state` and batches from `start` on a run continues bit for bit; L-BFGS keeps no state.
    """
    if isinstance(solver, LBFGS):
        if start:
            raise ValueError(f"{solver} keeps no state to start from at step {start}")
        yield from _lbfgs(pinn, params, next(batches), solver, steps)
        return
    if isinstance(solver, Preconditioner) and (solver.schedules.penalised or solver.schedules.weight_decay):
        raise ValueError(
            f"{solver.schedules} has a penalty; the loss of a PINN has none here: leave l2 and weight_decay 0"
        )
    state = initial_state(pinn, params, solver) if state is None else state
    seconds = 0.0
    ahead = Ahead(pinn)
    for index in range(start, steps):
        batch = next(batches)
        begun = time.perf_counter()
        loss, state, info = step(pinn, params, batch, solver, state, index, rows, ahead)
        seconds += time.perf_counter() - begun
        yield Progress(index + 1, loss, seconds, params, state, info)


def flatten(params: Params) -> np.ndarray:
    """All matrices as one vector."""
    return np.concatenate([W.reshape(-1) for W in params.values()])


def unflatten(vector: np.ndarray, like: Params) -> Params:
    """The vector as matrices shaped like those of `like`."""
    cuts = np.cumsum([W.size for W in like.values()])[:-1]
    return {name: v.reshape(like[name].shape) for name, v in zip(like, np.split(vector, cuts), strict=True)}


def _lbfgs(pinn: PINN, params: Params, batch: Batch, solver: LBFGS, steps: int) -> Iterator[Progress]:
    from scipy.optimize import minimize

    begun = time.perf_counter()
    seen = []

    def value(vector: np.ndarray) -> tuple[float, np.ndarray]:
        loss, grads = pinn.gradient(unflatten(vector, params), batch)
        return loss, flatten(grads)

    def look(intermediate_result: Any) -> None:
        vector = np.array(intermediate_result.x)
        index = seen[-1][0] + 1 if seen else 1
        seen.append((index, float(intermediate_result.fun), time.perf_counter() - begun, vector))
        if len(seen) > 512:
            del seen[1:-1:2]

    options = {"maxiter": steps, "maxfun": 4 * steps, "maxcor": solver.memory, "ftol": 0.0, "gtol": 0.0}
    with np.errstate(all="ignore"):
        minimize(value, flatten(params), jac=True, method="L-BFGS-B", callback=look, options=options)
    for index, loss, seconds, vector in seen:
        params.update(unflatten(vector, params))
        yield Progress(index, loss, seconds, params, None)
