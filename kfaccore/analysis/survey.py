"""How figures are made: what is asked for, what it may take, and what was learnt on the way."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from kfaccore.analysis.kept import Kept
from kfaccore.analysis.price import Pace
from kfaccore.analysis.target import Limits

Told = Callable[[str, str], None]


@dataclass
class Survey:
    """Settings, and the state of one run of `compare`.

    damping    absolute; by default a tenth of the mean eigenvalue of the layer's exact block
    converged  methods that iterate go on until F~ stands still, instead of their usual number of cycles
    seconds    what all of it may take: what would not fit is left out, and its note says so
    kept       figures of earlier surveys, which are not measured again
    told       called with layer and method before each is measured
    """

    damping: float | None = None
    repeats: int = 5
    converged: bool = False
    limits: Limits = field(default_factory=Limits)
    seconds: float = float("inf")
    kept: Kept = field(default_factory=Kept)
    told: Told = lambda layer, method: None
    pace: Pace = field(default_factory=Pace)
    until: float = float("inf")  # on the clock of `perf_counter`
    start: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        if self.damping is not None and not 0 < self.damping < float("inf"):
            raise ValueError(f"damping is {self.damping}; need a positive number, or None for a tenth of the mean")

    def grant(self, share: float) -> None:
        """Give what comes next this share of the time that is left."""
        now = time.perf_counter()
        self.until = now + share * max(0.0, self.seconds - (now - self.start))

    @property
    def left(self) -> float:
        """Seconds for what is being measured."""
        return self.until - time.perf_counter()
