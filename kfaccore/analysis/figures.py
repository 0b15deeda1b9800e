"""What `compare` finds out about one method on one layer, and the figure that ranks them: gain.

The block's damped quadratic model falls by t g.x~ - t^2 x~.(F + damping)x~ / 2 along t x~, most at the t of `length`,
and along no direction by more than along x = (F + damping I)^-1 g at t = 1. So

    gain    (g.x~)^2 / (x~.(F + damping)x~  g.x)     1 for x, 0 for what does nothing; x~ may have any length
    length  g.x~ / x~.(F + damping)x~                the length it wants: 1 where its own is right; negative is uphill
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

FITS = 0.3  # the gain below which a method is said not to fit
FLOOR = ("identity", "diagonal")  # what costs next to nothing: a recommendation must beat these
LATER = "not measured"  # how the note begins where time or memory would not do
MARGIN = 0.01  # by this much of the best decrease


@dataclass(frozen=True)
class Figures:
    """One method on one layer; figures a method cannot have are NaN and `note` says why.

    gain, length   (g.x~)^2 / (x~.(F + damping I)x~ g.x), the share of the best decrease that x~ reaches at its best
                   length, and that length; gain_error is how far off `gain` may be where `best` is not exact
    best           g.x, twice the best decrease of the model: what a gain is a share of
    norm, size     ||F|| (or the probes' estimate) and ||x||, which weigh layers against each other
    own            it solves with the very batch it is judged by, so that its gain says nothing about the next one
    seconds        of one update (measure included), one refresh, one solve
    """

    layer: str
    method: str
    gain: float = float("nan")
    gain_error: float = 0.0
    length: float = float("nan")
    cosine: float = float("nan")
    inverse_error: float = float("nan")
    error: float = float("nan")
    standard_error: float = 0.0
    trace_ratio: float = float("nan")
    bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    norm: float = float("nan")
    size: float = float("nan")
    best: float = float("nan")
    damping: float = float("nan")
    shared: int = 1
    own: bool = False
    note: str = ""

    def per_step(self, update: int, refresh: int) -> float:
        """Seconds a step at these clocks."""
        if not self.seconds:
            return float("nan")
        return self.seconds["update"] / update + self.seconds["refresh"] / refresh + self.seconds["solve"]


def gain(gradient: np.ndarray, direction: np.ndarray, curvature: float, best: float) -> tuple[float, float]:
    """(gain, length) of a direction with curvature x~.(F + damping)x~, where `best` is g.x.

    A direction of zero has gain 0 and no length; a gradient of zero leaves nothing to gain: NaN.
    """
    slope = float(np.vdot(gradient, direction))
    if not best > 0:
        return float("nan"), float("nan")
    if not direction.any():
        return 0.0, float("nan")
    length = slope / curvature
    return length * slope / best, length


def ranked(figures: Iterable[Figures]) -> list[Figures]:
    """Best gain first, but last what has none or was given the answer."""
    return sorted(figures, key=lambda f: -f.gain if f.gain == f.gain and not f.own else float("inf"))


def fits(figures: Iterable[Figures]) -> bool:
    """Whether any method reaches a gain of `FITS` on this layer; True as long as none has a gain at all, or one is yet
    to be measured."""
    given = list(figures)
    known = [f.gain for f in given if f.gain == f.gain and not f.own]
    return not known or max(known) >= FITS or any(f.note.startswith(LATER) for f in given)
