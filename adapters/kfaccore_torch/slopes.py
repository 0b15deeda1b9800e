"""What the losses of a step were multiplied by past `pre.loss`: their curvatures do not know of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kfaccore_torch.unread import read

_EVEN = 0.01  # of the largest: what half precision tells apart


def check_even(slopes: Sequence[torch.Tensor]) -> None:
    """ValueError for losses on one forward that were multiplied by different numbers past `pre.loss`: their curvatures
    were measured before, and would count alike. Read on the host, where there are several losses, and nowhere else."""
    if len(slopes) < 2:
        return
    numbers = _read(slopes)
    if not _alike(numbers):
        raise ValueError(
            f"losses of one forward were multiplied by {_shown(numbers)} on their way to backward, and their "
            f"curvatures would count alike: give each its own, pre.loss(f, target, weight=...)"
        )


def check_shares(losses: Sequence[Sequence[torch.Tensor]], shares: Sequence[Any], apart: bool) -> None:
    """A warning for forwards whose losses were multiplied by numbers that are neither equal nor as their shares n, so
    that gradients and curvatures weigh them differently; where weights add them up, `apart`, both are to be equal."""
    told = [(slopes[0], n) for slopes, n in zip(losses, shares, strict=True) if slopes]
    if len(told) < 2:
        return
    slopes = _read([slope for slope, _ in told])
    ns = [read(n) for _, n in told]
    if _alike(slopes) and (not apart or _alike(ns)):
        return
    if not apart and _alike([slope / n for slope, n in zip(slopes, ns, strict=True)]):
        return
    warnings.warn(
        f"the losses of {len(told)} forwards were multiplied by {_shown(slopes)} on their way to backward, but their "
        f"curvatures count by {_shown(ns)}: give each its own, pre.loss(f, target, weight=...)",
        stacklevel=2,
    )


def check_sum(losses: Sequence[Sequence[torch.Tensor]], scale: torch.Tensor | None) -> None:
    """A warning for forwards whose losses, added up by weights in one backward pass, were all multiplied by a number:
    where that makes them a mean of micro-batches, their curvatures are the sum all the same."""
    if len(losses) < 2 or not all(losses):
        return
    factor = past(losses[0], scale)
    if abs(factor - 1.0) <= _EVEN:
        return
    warnings.warn(
        f"the losses of {len(losses)} forwards were multiplied by {factor:.4g} on their way to one backward pass, but "
        f"their curvatures are added up by their weights alone: give each its share, pre.loss(f, target, weight="
        f"{factor:.4g} * weight), or a backward pass to each forward",
        stacklevel=2,
    )


@dataclass(frozen=True)
class Passed:
    """How losses of a step came to backward.

    scale      what a scaler multiplied them by
    world      ranks
    total      whether they are sums
    untouched  whether the gradients are as backward left them
    """

    scale: torch.Tensor | None
    world: int
    total: bool
    untouched: Callable[[], bool]

    def weighs(self, factor: float) -> bool:
        """Whether a factor above 1 weighs a mean: no number of ranks, nor that of a scaler that is not known, which has
        divided the gradients by it, or will divide the directions by what is a power of two, to round nothing."""
        if self.total or _alike([factor, self.world]):
            return False
        return self.scale is not None or (math.frexp(factor)[0] != 0.5 and self.untouched())


@dataclass(eq=False)
class Common:
    """Numbers that losses were all multiplied by past `pre.loss`: those of accumulation make a mean of forwards, as
    their curvatures are; others a mean of several losses of one forward, or of a loss that is a sum, whose curvatures
    are the sum, or weigh a loss beside other terms, whose curvature is that of the whole.

    said   whether a warning was given
    turn   steps that updated: the host looks at the first, second, fourth, eighth and so on
    """

    said: bool = False
    turn: int = 0
    _parts: list[float] = field(default_factory=list)  # of accumulation, as steps have shown

    def check(self, losses: Sequence[Sequence[torch.Tensor]], passed: Passed) -> None:
        """A warning, once, where that is no part of as many forwards, here or on all ranks, nor one that was: the last
        micro-batches of an epoch may be fewer."""
        most = max(map(len, losses), default=0)
        if self.said or not self._looks(most):
            return
        factors = _factors([slopes[0] for slopes in losses], passed.scale)
        if not _alike(factors) or not 0.0 < factors[0] < math.inf or _alike([factors[0], 1.0]):
            return
        if factors[0] > 1.0:
            self.said = passed.weighs(factors[0])
        elif any(_alike([sum(factors) * ranks, 1.0]) for ranks in (1, passed.world)):
            self._parts.append(factors[0])
            self._parts[:] = dict.fromkeys(self._parts)
        else:
            self.said = not any(_alike([part, factors[0]]) for part in self._parts)
        if self.said:
            warnings.warn(_told(factors[0], most, passed.total), stacklevel=2)

    def _looks(self, most: int) -> bool:
        if not most:
            return False
        self.turn += 1
        return not self.turn & (self.turn - 1)


def _told(number: float, most: int, total: bool) -> str:
    """What is said of a factor past `most` losses of a forward."""
    factor = f"{number:.4g}"
    other = ""
    when = "that makes a mean"
    if most > 1:
        what = f"the {most} losses of one forward were all"
    elif total:
        what = "the loss, which is a sum, was"
        other = ", or take reduction='mean'"
    else:
        what = "the loss was"
        when = "that is its weight"
        other = f"; where F is to stay that of the whole loss, pre.attach({factor} * criterion(f, target), f, target)"
    how = "their curvatures were added up" if most > 1 else "its curvature was taken"
    wrong = "large" if number < 1.0 else "small"
    return (
        f"{what} multiplied by {factor} on the way to backward, and {how} without it: where {when}, F is too {wrong} "
        f"by as much. Let it be known, pre.loss(f, target, weight={factor}), times a weight that it has{other}"
    )


def means(losses: Sequence[Sequence[torch.Tensor]], scale: torch.Tensor | None) -> bool:
    """Whether forwards were multiplied by parts that add up to 1, as those of a mean over them are."""
    return all(losses) and _alike([sum(_factors([slopes[0] for slopes in losses], scale)), 1.0])


def past(slopes: Sequence[torch.Tensor], scale: torch.Tensor | None) -> float:
    """What the losses were all multiplied by, without the `scale` of a scaler; 1 where that is not known, or no
    number to divide by."""
    if not slopes:
        return 1.0
    found = _factors(slopes, scale)[0]
    return found if math.isfinite(found) and found else 1.0


def _factors(slopes: Sequence[torch.Tensor], scale: torch.Tensor | None) -> list[float]:
    """How large each is without the `scale` of a scaler."""
    unit = 1.0 if scale is None else float(scale)
    return [abs(number) / unit for number in _read(slopes)]


def _read(slopes: Sequence[torch.Tensor]) -> list[float]:
    return torch.stack([slope.double() for slope in slopes]).tolist()


def _alike(numbers: Sequence[float]) -> bool:
    """Equal as far as half precision tells; scales that overflowed are not told apart."""
    if not all(map(math.isfinite, numbers)):
        return True
    return max(numbers) - min(numbers) <= _EVEN * max(map(abs, numbers))


def _shown(numbers: Sequence[float]) -> list[float]:
    return [float(f"{number:.4g}") for number in numbers]
