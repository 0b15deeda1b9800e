"""Curvature along the direction, guarded against the noise of few rows.

A minimum of the model lies where the model errs to the flat side. The curvature of a step is therefore raised to its
running mean, by no more than it may be off.
"""

from __future__ import annotations

from kfaccore.xp.arrays import Array
from kfaccore.xp.numbers import Number, finite, number, pick

_ERRORS = 3.0  # standard errors that a model of few rows is taken to be off by


def sharpness(mean: Number, F: Array, down: Array, rows: Number, memory: float) -> tuple[Number, Number]:
    """The running mean of x^T F x / x^T gradient after this step, and the factor >= 1 on F.

    mean, memory   the mean so far, 0 before the first step, and the share of it that stays
    rows           how many normal numbers sample the curvature: its relative variance is 2 / rows
    """
    curvature = number(F[0, 0])
    slope = number(down[0])
    known = finite(curvature) & finite(slope) & (curvature > 0) & (slope > 0)
    now = pick(known, curvature, 1.0) / pick(known, slope, 1.0)
    moved = pick(mean > 0, memory * mean + (1 - memory) * now, now)
    most = 1 + _ERRORS * (2 / rows) ** 0.5
    raised = moved / now
    raised = pick(most < raised, most, raised)
    return pick(known, moved, mean), pick(known & (moved > now), raised, 1.0)
