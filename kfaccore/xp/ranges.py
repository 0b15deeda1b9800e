"""Ranges of the numbers that options take, looked at where an option is given rather than where it is first used.

NaN and infinity compare in their own way and None in no way: a rule that met them in a step would hand on NaN, or the
plain gradient, without a word.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import array_api_compat as aac
import numpy as np


class Range(NamedTuple):
    """What is needed, in words, and whether a number is that."""

    need: str
    holds: Callable[[float], bool]


ANY = Range("a finite number", math.isfinite)
POSITIVE = Range("a finite positive number", lambda x: 0 < x < math.inf)
AT_LEAST_0 = Range("a finite number >= 0", lambda x: 0 <= x < math.inf)
NO_BOUND = Range("a positive number, math.inf for no bound", lambda x: x > 0)
REAL = Range("a number, math.inf for no bound", lambda x: x == x)
SHARE = Range("a number in [0, 1)", lambda x: 0 <= x < 1)
BETWEEN = Range("a number in (0, 1)", lambda x: 0 < x < 1)
PART = Range("a number in (0, 1]", lambda x: 0 < x <= 1)
UNIT = Range("a number in [0, 1]", lambda x: 0 <= x <= 1)
COUNT = Range("a whole number of at least 1", lambda x: 1 <= x < math.inf and x == int(x))
SOME = Range("a whole number of at least 0", lambda x: 0 <= x < math.inf and x == int(x))


def ranged(owner: object, **ranges: Range) -> None:
    """ValueError, or TypeError for what is no number, unless the fields of `owner` are in these ranges."""
    for field, wanted in ranges.items():
        within(f"{type(owner).__name__}.{field}", vars(owner)[field], wanted)


def within(name: str, value: Any, wanted: Range) -> None:
    """As `ranged`, of a value at hand. Arrays of a device or a trace are believed: their numbers are not read."""
    value = value[()] if isinstance(value, np.ndarray) and value.ndim == 0 else value
    if isinstance(value, int | float | np.number):
        if not wanted.holds(float(value)):
            raise ValueError(f"{name} is {value}; need {wanted.need}")
    elif not aac.is_array_api_obj(value):
        raise TypeError(f"{name} is {value!r}; need {wanted.need}")
