"""What the losses of a step were multiplied by past `pre.loss`: their curvatures do not know of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
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
    """A warning for forwards of several losses each, added up by weights in one backward pass, that were all multiplied
    by a number: where that makes them a mean of micro-batches, their curvatures are the sum all the same."""
    if len(losses) < 2 or any(len(slopes) < 2 for slopes in losses):
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


def past(slopes: Sequence[torch.Tensor], scale: torch.Tensor | None) -> float:
    """What the losses were all multiplied by, without the `scale` of a scaler; 1 where that is not known, or no
    number to divide by."""
    if not slopes:
        return 1.0
    found = abs(_read(slopes)[0]) / (1.0 if scale is None else float(scale))
    return found if math.isfinite(found) and found else 1.0


def _read(slopes: Sequence[torch.Tensor]) -> list[float]:
    return torch.stack([slope.double() for slope in slopes]).tolist()


def _alike(numbers: Sequence[float]) -> bool:
    """Equal as far as half precision tells; scales that overflowed are not told apart."""
    if not all(map(math.isfinite, numbers)):
        return True
    return max(numbers) - min(numbers) <= _EVEN * max(map(abs, numbers))


def _shown(numbers: Sequence[float]) -> list[float]:
    return [float(f"{number:.4g}") for number in numbers]
