"""Result codes: failure is data, one code a block."""

from __future__ import annotations

from enum import IntEnum

from kfaccore.xp.arrays import Array, device_of, filled, namespace


class Code(IntEnum):
    """What happened to a block; 0 is the only code that says nothing was repaired.

    OK            solved as asked
    JITTERED      the factor was not positive definite in rounding; a multiple of eps was added to its diagonal
    FLOAT64       float32 was not enough; the factorisation was redone in float64
    PREVIOUS      the refresh failed; the inverse of the last successful refresh is in use
    IDENTITY      never refreshed: the direction is the gradient
    NONFINITE     NaN or Inf in the statistics (state left unchanged) or in the gradient (zero direction)
    INDEFINITE    a matrix that must be positive definite is not, beyond rounding
    UNCONVERGED   an iteration stopped at its limit
    EMPIRICAL     no longer given (draws are told, not guessed); files of older versions count it
    """

    OK = 0
    JITTERED = 1
    FLOAT64 = 2
    PREVIOUS = 3
    IDENTITY = 4
    NONFINITE = 5
    INDEFINITE = 6
    UNCONVERGED = 7
    EMPIRICAL = 8


def choose(condition: Array, yes: Code, no: Code | Array) -> Array:
    """int32 codes: `yes` where the condition (blocks,) holds, `no` (a code, or codes) elsewhere."""
    xp = namespace(condition)
    if isinstance(no, Code):
        no = xp.full(condition.shape, int(no), dtype=xp.int32, device=device_of(condition))
    return filled(no, condition, int(yes))
