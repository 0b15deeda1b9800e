"""Curvature along the direction, guarded against the noise of few rows.

A minimum of the model lies where the model errs to the flat side. The curvature of a step is therefore raised to its
running mean, by no more than it may be off.

A batch may also not see a direction at all: one of zeros sees biases alone, one of a single example a few rows of J.
The previous update then looks flat, and its factor mu has nothing but damping to end it. What its own batch saw of it
is remembered, and a quarter of that counts at least.
"""

from __future__ import annotations

from kfaccore.xp.arrays import Array, namespace
from kfaccore.xp.numbers import Number, finite, number, pick, stack

_ERRORS = 3.0  # standard errors that a model of few rows is taken to be off by
_SHARE = 0.25  # of the curvature seen before


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


def unforgotten(F: Array, bent: Number) -> Array:
    """F (2, 2), the previous update's curvature raised to a quarter, at least, of what the batch before saw of it."""
    cross = number(F[0, 1])
    p = number(F[1, 1])
    least = _SHARE * bent
    flat = stack([number(F[0, 0]), cross, cross, pick(p < least, least, p)])
    return namespace(flat).reshape(flat, (2, 2))
