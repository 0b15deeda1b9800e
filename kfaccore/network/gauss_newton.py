"""Gauss-Newton in sample space: x = (J^T J + damping I)^-1 J^T r = J^T (J J^T + damping I)^-1 r over all layers.

Rows of J are the residuals' gradients J[b] = sum_s g[b, s] a[b, s]^T of every layer side by side, over sqrt(n) of
their loss term; so is r. The matrix that is factorised is as large as the batch, never as the network. The step is
halved until it lowers the loss of the batch; damping follows the reduction ratio: it falls after a full step that did
what the model said, rises after a short one and jumps when no step helped.

Exact always (over the whole network); records of one draw, least-squares losses 1/(2 n) sum r^2.
Source: Marquardt 1963; push-through form as in Ren & Goldfarb 2019 (1906.02353).
Cost: batch^2 parameters + batch^3 a step; memory batch times parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import numpy as np

from kfaccore import xp as kernels
from kfaccore.record import Record
from kfaccore.tree import added
from kfaccore.xp.arrays import Array, all_finite, device_of, namespace, select, to_host
from kfaccore.xp.codes import Code
from kfaccore.xp.ranges import AT_LEAST_0, COUNT, PART, POSITIVE, ranged

Records = Mapping[str, Record | tuple[Record, ...]]

_MOST = 1e6  # of damping, over the trace


@dataclass(frozen=True)
class State:
    """The damping in force (0: not known before the first batch), slope and curvature of the last step, counters, and
    the trace that damping is in units of, that of the first batch which has one."""

    damping: float = 0.0
    slope: float = 0.0
    curvature: float = 0.0
    steps: int = 0
    stuck: int = 0
    unit: float = added(default=0.0)


@dataclass(frozen=True)
class GaussNewton:
    """Gauss-Newton steps with backtracking; none of the numbers usually needs setting.

    damping   the first one, over the trace of the first J J^T
    drop      damping is multiplied by it after a full step with a reduction ratio over 3/4, divided by it after a step
              of at most 1/4 or a ratio under 1/4
    grow      factor on damping when no step lowered the loss
    points    steps tried: 1, 1/2, ..., 2^(1 - points)
    least     damping never falls below it, over that trace
    """

    damping: float = 1e-9
    drop: float = 0.5
    grow: float = 100.0
    points: int = 16
    least: float = 1e-18

    def __post_init__(self) -> None:
        ranged(self, damping=AT_LEAST_0, drop=PART, grow=POSITIVE, points=COUNT, least=AT_LEAST_0)

    def init(self) -> State:
        return State()

    def step(
        self, state: State, records: Records, residuals: Sequence[Array]
    ) -> tuple[dict[str, Array], State, dict[str, float | Array]]:
        """(full updates to subtract (blocks, d_out, d_in) a layer, state, info); residuals (batch,) a term."""
        _one_batch(records, residuals)
        rows = {name: jacobian(record) for name, record in records.items()}
        kernel = gram(rows)
        r = scaled(records, residuals)
        xp = namespace(kernel)
        unit = state.unit
        if unit == 0:
            trace = float(to_host(xp.sum(xp.linalg.diagonal(kernel))))
            unit = trace if np.isfinite(trace) else 0.0
        damping = state.damping or max(self.damping, self.least) * unit
        weights, code = solve(kernel, r, damping)
        change = kernel @ weights
        slope = float(to_host(xp.sum(change * r)))
        curvature = float(to_host(xp.sum(change * change)))
        seen = {"slope": slope, "curvature": curvature, "unit": unit}
        state = replace(state, damping=damping, steps=state.steps + 1, **seen)
        return pull(rows, weights, records), state, {"damping": damping, "code": code}

    def judge(
        self, state: State, before: float, place: Callable[[float], object], loss: Callable[[], float]
    ) -> tuple[float, State]:
        """Once the full updates are in force: the share of them that stays (0: none lowers the loss), and the state.

        before, place, loss   as of `Preconditioner.judge`
        """
        for k in range(self.points):
            share = 2.0**-k
            if k:
                place(share)
            after = loss()
            if np.isfinite(after) and after < before:
                return share, self._learnt(state, share, after - before)
        place(0.0)
        return 0.0, replace(
            state, damping=min(state.damping * self.grow, _MOST * state.unit or np.inf), stuck=state.stuck + 1
        )

    def _learnt(self, state: State, share: float, change: float) -> State:
        """The damping to come, from how the change of the loss compares with the predicted one."""
        predicted = -share * state.slope + 0.5 * share**2 * state.curvature
        ratio = change / predicted if predicted < 0 else 0.0
        poor = share <= 0.25 or ratio < 0.25
        factor = 1 / self.drop if poor else 1.0
        if share == 1 and ratio > 0.75:
            factor = self.drop
        return replace(state, damping=max(state.damping * factor, self.least * state.unit))


def _one_batch(records: Records, residuals: Sequence[Array]) -> None:
    """ValueError where records or residuals are not of the same examples, term by term."""
    sizes = {name: [term.batch for term in (x if isinstance(x, tuple) else (x,))] for name, x in records.items()}
    wanted = [int(r.shape[0]) for r in residuals]
    odd = {name: size for name, size in sizes.items() if size != wanted}
    if odd:
        raise ValueError(
            f"Gauss-Newton got residuals of {wanted} examples, one number a term, and records of {odd} in layers "
            f"{list(odd)}: it needs a row of J for each residual. A layer with one row for all examples, such as an "
            f"embedding of their positions, has none: freeze it, or take Quadratic()"
        )


def jacobian(record: Record | tuple[Record, ...]) -> Array:
    """Rows of J of one layer, (examples of all terms, blocks d_out d_in), each over sqrt(n) of its term."""
    terms = record if isinstance(record, tuple) else (record,)
    found = []
    for term in terms:
        if term.draws != 1:
            raise ValueError(f"Gauss-Newton got {term.draws} draws; a residual has one gradient")
        xp = namespace(term.g)
        rows = xp.permute_dims(term.examples()[0, ...], (1, 0, 2, 3))
        found.append(xp.reshape(rows, (term.batch, -1)) / float(term.n) ** 0.5)
    return found[0] if len(found) == 1 else namespace(*found).concat(found, axis=0)


def gram(rows: Mapping[str, Array]) -> Array:
    """J J^T over all layers, (examples, examples)."""
    return reduce(add, (kernels.gram(part.mT[None, ...])[0, ...] for part in rows.values()))


def scaled(records: Records, residuals: Sequence[Array]) -> Array:
    """Residuals of all terms, each over sqrt(n) of its term, (examples,)."""
    first = next(iter(records.values()))
    terms = first if isinstance(first, tuple) else (first,)
    parts = [r / float(term.n) ** 0.5 for term, r in zip(terms, residuals, strict=True)]
    return namespace(*parts).concat(parts)


def solve(kernel: Array, r: Array, damping: float) -> tuple[Array, Array]:
    """(kernel + damping I)^-1 r and a code (1,): zero weights where nothing is finite."""
    xp = namespace(kernel)
    eye = xp.eye(kernel.shape[-1], dtype=kernel.dtype, device=device_of(kernel))
    inverse, code = kernels.spd_inverse((kernel + damping * eye)[None, ...])
    weights = inverse[0, ...] @ r
    # one step of iterative refinement: the inverse loses digits at small damping, its residual does not
    correction = inverse[0, ...] @ (r - kernel @ weights - damping * weights)
    weights = (weights + correction)[None, :]
    ok = all_finite(weights) & (code < int(Code.INDEFINITE))
    return select(ok, weights, xp.zeros_like(weights))[0, :], code


def pull(rows: Mapping[str, Array], weights: Array, records: Records) -> dict[str, Array]:
    """J^T weights, (blocks, d_out, d_in) a layer."""
    found = {}
    for name, part in rows.items():
        record = records[name]
        term = record[0] if isinstance(record, tuple) else record
        update = namespace(part).reshape(weights @ part, (term.blocks, term.d_out, term.d_in))
        found[name] = select(all_finite(update), update, namespace(part).zeros_like(update))
    return found
