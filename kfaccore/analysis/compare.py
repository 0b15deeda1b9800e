"""How good each method is on each layer, and what it costs: figures from records alone.

gain, length   of the damped direction of the gradient: see `figures`
error          ||F - F~|| / ||F||, exact up to 4,096 rows of J, else from probes with a standard error
inverse_error  ||x~ - x|| / ||x|| and cosine of the direction, x = (F + damping I)^-1 v

They are what an approximation loses, not rounding: states are fitted in float64 without memory, in the record's own
dtype where that would take too much memory or time. Bytes and seconds are those of the record as it came.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from kfaccore.analysis.exact import ROWS
from kfaccore.analysis.figures import LATER, Figures
from kfaccore.analysis.measure import measured, too_large
from kfaccore.analysis.price import price
from kfaccore.analysis.survey import Survey
from kfaccore.analysis.target import GIB, Limits, Target
from kfaccore.analysis.threads import fitting
from kfaccore.method import Method
from kfaccore.options import by_layer, is_method
from kfaccore.record import Factored, Record
from kfaccore.xp.arrays import Array


def compare(
    records: Mapping[str, Record],
    methods: Mapping[str, Method],
    grads: Mapping[str, Array | Factored] | None = None,
    damping: float | None = None,
    repeats: int = 5,
    rows: int = ROWS,
    converged: bool = False,
    peak: int = GIB,
) -> list[Figures]:
    """Figures of every method on every layer.

    grads     gradients to be preconditioned; by default that of the record's first draw
    damping, converged   see `Survey`
    rows      rows of J up to which nothing is estimated
    peak      bytes that may be held at once

    Raises ValueError for a record without draws or with values that are not finite.
    """
    by_layer(records=records)
    if not isinstance(methods, Mapping):
        raise TypeError(f"methods is a {type(methods).__name__}; need a mapping from name to method")
    for method in methods.values():
        is_method("compare", method)
    survey = Survey(damping, repeats, converged, Limits(peak, rows))
    order = {label: place for place, label in enumerate(methods)}
    found = []
    for name in records:
        figures = figures_of(name, records[name], methods, (grads or {}).get(name), survey)
        found += sorted(figures, key=lambda f: order[f.method])
    return found


def figures_of(
    name: str, record: Record, methods: Mapping[str, Method], grad: Array | Factored | None, survey: Survey
) -> Iterator[Figures]:
    """Figures of every method on one layer, the cheapest first, so that what time there is goes to many."""
    if record.draws == 0:
        raise ValueError(f"the record of layer {name!r} has no draws: its F is not defined")
    keys = survey.kept.keys(record, grad, methods, (survey.damping, survey.converged, survey.limits.rows))
    target: Target | None = None
    refusal = too_large(record, survey.limits)
    for label in sorted(methods, key=lambda label: _work(methods[label], record)):
        known = Figures(name, label, note=refusal) if refusal else survey.kept.get(keys[label], name, label)
        if known is None and survey.left <= 0:
            known = Figures(name, label, note=f"{LATER}: no time was left (--budget)")
        if known is None:
            survey.told(name, label)
            with np.errstate(all="ignore"), fitting(record):
                target = target or Target(name, record, grad, survey.damping, survey.limits)
                known = measured(target, label, methods[label], survey)
            survey.kept.put(keys[label], known)
        yield known


def _work(method: Method, record: Record) -> float:
    """Multiplications; of what refuses the layer none."""
    try:
        return price(method, record).work(method.cycles)
    except (ValueError, TypeError):
        return 0.0
