"""One method on one layer: all figures that it can have within memory and time."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from kfaccore.analysis.costs import costs, fitted, fitted_and_timed, like_record
from kfaccore.analysis.distance import distance, probed
from kfaccore.analysis.figures import LATER, Figures, gain
from kfaccore.analysis.fitted import on_host
from kfaccore.analysis.operator import LayerOperator
from kfaccore.analysis.price import Price, price, rate
from kfaccore.analysis.survey import Survey
from kfaccore.analysis.target import FEWEST, GIB, Limits, Target, like
from kfaccore.method import Block, Hyper, Method, OwnGradients, State, declares
from kfaccore.record import Record
from kfaccore.xp import Code
from kfaccore.xp.arrays import Array, to_host

SLOW = 0.005  # seconds from which a method is fitted once, in the record's own dtype, and timed while it is,
SMALL = 4096  # on layers of more parameters than these
COLUMNS = 512  # parameters up to which F~ is multiplied out where a method only multiplies by it


def measured(target: Target, label: str, method: Method, survey: Survey) -> Figures:
    """Figures of one method, as far as it can have them."""
    known = _known(target, label, method)
    try:
        cost = price(method, target.record)
    except (ValueError, TypeError) as error:
        return replace(known, note=str(error))
    seconds = survey.pace.seconds(label, cost.work(method.cycles))
    if cost.fit / 2 > target.limits.room:
        return replace(known, note=f"{LATER}: it needs about {cost.fit / 2**31:.2g} GiB (--peak)")
    if seconds > survey.left:
        return replace(known, note=f"{LATER}: it needs about {seconds:.2g} s (--budget)")
    slow = seconds > SLOW and target.size > SMALL
    own = slow or cost.fit > target.limits.room or not target.wide
    return _measured(target, known, method, survey, cost, own)


def too_large(record: Record, limits: Limits) -> str:
    """Why a layer cannot be held against anything at all: its direction alone takes too much; empty if it can."""
    needed = 8 * 8 * record.blocks * record.d_out * record.d_in
    if needed <= limits.room:
        return ""
    return f"{LATER}: directions of {record.d_out} x {record.d_in} need about {needed / GIB:.2g} GiB (--peak)"


def _known(target: Target, label: str, method: Method) -> Figures:
    """What does not depend on the method, in the units of the record as it came."""
    solved = target.solved
    exact = target.exact
    return Figures(
        target.name,
        label,
        damping=float(target.damping * target.unit**2),
        shared=target.record.shared,
        own=declares(method, OwnGradients),
        size=float(np.linalg.norm(solved.x) / target.unit),
        best=solved.product,
        norm=float(exact.norm * target.unit**2) if exact.exact else float("nan"),
        note="" if solved.product > 0 else _why_nothing(target),
    )


def _why_nothing(target: Target) -> str:
    """Why no decrease is to be had."""
    if target.grad.any():
        return "its damping is lost in the rounding of F: give more"
    return "its gradient is zero: there is nothing to gain"


def _measured(target: Target, known: Figures, method: Method, survey: Survey, cost: Price, own: bool) -> Figures:
    """With the state in float64, or one in the record's `own` dtype that is timed while it is made."""
    hyper = Hyper(0, 0.0, target.damping)
    came = target.tame
    record = came if own else target.exact.record
    grad = like(target.grad, record.g)
    start = time.perf_counter()
    try:
        if own:
            fit, solution, seconds, size = fitted_and_timed(method, record, grad, hyper)
        else:
            fit = fitted(method, record, target.damping, target.probe(0) if survey.converged else None)
            its = like_record(fit.state, came)
            seconds, size = costs(method, its, came, like(target.grad, came.g), hyper, survey.repeats)
            solution = method.solve(fit.state, grad, hyper, record)
        survey.pace.saw(known.method, cost.work(fit.cycles), time.perf_counter() - start)
    except (ValueError, TypeError) as error:
        return replace(known, note=str(error))
    found = _direction(target, known, to_host(solution.direction))
    found = replace(found, seconds=seconds, bytes=size, note=_joined(known.note, _told(solution.code)))
    return _with_error(target, found, method, fit.state, survey)


def _direction(target: Target, known: Figures, y: np.ndarray) -> Figures:
    """Gain, length, cosine and error of the direction y of shape (blocks, d_out, d_in)."""
    y = y.astype(np.float64, copy=False)
    solved = target.solved
    largest = np.abs(y).max()
    # in units of its largest entry, so that its squares do not overflow: gain does not depend on length
    unit = y / largest if largest > 0 else y
    curvature = target.exact.curvature(unit) + target.damping * float(np.vdot(unit, unit))
    share, length = gain(target.grad, unit, curvature, solved.product)
    size = np.linalg.norm(solved.x)
    product = size * np.linalg.norm(unit)
    without_size = float("inf") if y.any() else 0.0
    return replace(
        known,
        gain=share,
        gain_error=share * solved.slack / solved.product if solved.slack else 0.0,
        length=length / float(largest) if largest > 0 else length,
        cosine=float(np.vdot(solved.x, unit) / product) if product else float("nan"),
        inverse_error=float(np.linalg.norm(y - solved.x) / size) if size else without_size,
    )


def _with_error(target: Target, known: Figures, method: Method, state: State, survey: Survey) -> Figures:
    """And the error and the trace of F~, where the method has one and there is time."""
    exact = target.exact
    op = LayerOperator(method, on_host(state), Block.of(exact.record), limit=COLUMNS)
    try:
        if exact.exact and target.wide and op.measurable and _seconds_of_distance(target) <= survey.left:
            ratio = float(op.trace()) / exact.trace if exact.trace else float("nan")
            return replace(known, error=distance(exact, op), trace_ratio=ratio)
        count = _probes(target, survey)
        if not count:
            return replace(known, note=_joined(known.note, f"F error {LATER}: too slow (--budget)"))
        return _with_probes(target, known, op, count)
    except (ValueError, TypeError) as error:
        return replace(known, note=_joined(known.note, str(error)))


def _with_probes(target: Target, known: Figures, op: LayerOperator, count: int) -> Figures:
    """From `count` random vectors."""
    exact = target.exact
    over = []
    below = []
    traces = []
    for i, image in enumerate(target.images(count)):
        z = target.probe(i)
        applied = op.matvec(z)
        traces.append(float(np.vdot(z, applied)))
        over.append(float(((image - applied) ** 2).sum()))
        below.append(float((image.astype(np.float64) ** 2).sum()))
    error, spread = probed(over, below)
    norm = known.norm if exact.exact else float(np.mean(below) ** 0.5 * target.unit**2)
    trace = float(op.trace()) if op.measurable and target.wide else float(np.mean(traces))
    ratio = trace / exact.trace if exact.trace else float("nan")
    return replace(known, error=error, standard_error=spread, norm=norm, trace_ratio=ratio)


def _probes(target: Target, survey: Survey) -> int:
    """How many probes there is memory and time for; 0 if too few to say how far off they are."""
    record = target.record
    size = float(np.prod(target.exact.shape))
    each = 2 * target.exact.rows * record.shared * size + 2 * size * (record.d_in + record.d_out)
    count = int(min(target.probes, survey.left / 2 * rate() / each))
    return count if count >= FEWEST else 0


def _seconds_of_distance(target: Target) -> float:
    """Of the overlap of F with F~ in a Kronecker basis."""
    record = target.record
    d_in = record.d_in
    d_out = record.d_out
    positions = target.exact.rows * record.shared * record.blocks
    return positions * (d_in**2 + d_out**2 + (2 * d_in * d_out if record.shared > 1 else 0)) / rate()


def _told(code: Array) -> str:
    """The worst code of a solve, where it is not OK."""
    worst = Code(int(to_host(code).max()))
    return "" if worst == Code.OK else f"code {worst.name}"


def _joined(*notes: str) -> str:
    return "\n".join(filter(None, notes))
