"""How a shell draws labels, and where and how precisely the core runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import kfaccore as kf
from kfaccore_torch.losses import FISHERS
from kfaccore_torch.share import parts


@dataclass(frozen=True)
class Settings:
    """How labels are drawn and where the core runs.

    fisher      kfaccore's monte_carlo (default), type2, empirical or forward_only; each draw costs one backward,
                without weight gradients, on steps that update statistics; forward_only takes none, so G = I
    draws       of monte_carlo
    draws_on    share of a batch's examples that draws and statistics are taken on, 1 / k: one of k equal parts, drawn
                by the seed, whose n is 1 / k of the batch's, so that factors are unbiased. Statistics cost a k-th; the
                backward still passes the whole graph. Rules that judge their step refuse it
    seed        draws are a function of (seed, step, micro-batch, rank), on a GPU another than on the CPU
    namespace   "numpy", "cupy" or "torch"; by default NumPy for a model on the CPU and torch on any other device
    precision   a kfaccore.Precision of statistics and solves. Without it everything is in the working dtype, but on
                CUDA, where each layer has what its own product was seen to have: float32 where that runs in float32,
                bfloat16 rows and TF32 solves where it runs in TF32 or half precision
    samples     size of the dataset, for methods that remember examples
    rows        most rows of a batch, for methods that keep rows; 0 leaves it to the method
    skip        patterns of parameter names to leave uncovered
    strict      ValueError when a forward shows that a trainable parameter is not covered
    uncovered   kfaccore.Diagonal() gives parameters that are not covered a diagonal curvature from the same draws;
                without it they keep their plain gradient
    """

    fisher: Callable = kf.monte_carlo
    draws: int = 1
    draws_on: float = 1.0
    seed: int = 0
    namespace: str | None = None
    precision: kf.Precision | None = None
    samples: int = 0
    rows: int = 0
    skip: tuple[str, ...] = ()
    strict: bool = False
    uncovered: kf.Diagonal | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Settings:
        """Those given by name; TypeError that says where others go."""
        known = [one.name for one in fields(cls)]
        unknown = sorted({*given} - {*known})
        if unknown:
            raise TypeError(
                f"there are no settings {unknown} of a shell; there are {known}. Damping, decay and clocks are of the "
                f"core, kfaccore.Preconditioner(kfaccore.KFAC(), clocks=kfaccore.Clocks(update, refresh), "
                f"schedules=kfaccore.Schedules(damping, decay)); rate and momentum are of the torch optimizer beside a "
                f"Preconditioner, and of the core's step in an Optimizer, step=kfaccore.Fixed(rate)"
            )
        return cls(**given)

    def __post_init__(self) -> None:
        if self.fisher not in FISHERS:
            raise ValueError(f"fisher is {self.fisher!r}; need one of kfaccore's {[f.__name__ for f in FISHERS]}")
        if self.draws < 1:
            raise ValueError(f"draws is {self.draws}; need at least 1")
        parts(self.draws_on)
        if self.uncovered is not None and self.fisher is kf.forward_only:
            raise ValueError(f"uncovered={self.uncovered} is made of draws, and fisher=forward_only takes none")
