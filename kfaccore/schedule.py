"""Schedules: functions from the step (an int) to a number, evaluated once a step by the preconditioner."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def constant(value: float) -> Schedule:
    """The same number at every step."""
    return lambda step: value


def exponential(start: float, rate: float, floor: float = 0.0) -> Schedule:
    """max(floor, start * rate^step)."""
    return lambda step: max(floor, start * rate**step)


def linear(start: float, end: float, steps: int) -> Schedule:
    """From start to end over `steps` steps, then end."""
    return lambda step: start + (end - start) * min(step / steps, 1.0)


def cosine(start: float, end: float, steps: int) -> Schedule:
    """Half a cosine from start to end over `steps` steps, then end."""
    return lambda step: end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))


def piecewise(values: tuple[float, ...], boundaries: tuple[int, ...]) -> Schedule:
    """values[i] from step boundaries[i - 1] on; one more value than boundaries."""
    if len(values) != len(boundaries) + 1:
        raise ValueError(f"piecewise got {len(values)} values and {len(boundaries)} boundaries; need one value more")
    return lambda step: values[sum(step >= b for b in boundaries)]


def at(value: float | Schedule, step: int) -> float:
    """A number as it is, a schedule at `step`."""
    return value(step) if callable(value) else value
