"""Result codes: failure is data, one code a block."""

from enum import IntEnum


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
    """

    OK = 0
    JITTERED = 1
    FLOAT64 = 2
    PREVIOUS = 3
    IDENTITY = 4
    NONFINITE = 5
    INDEFINITE = 6
    UNCONVERGED = 7
