"""Shares n of the normaliser that a device knows: the host waits for none that it can do without."""

from __future__ import annotations

import math
from typing import Any

import torch


def known_at_once(x: torch.Tensor) -> bool:
    """Whether the host knows numbers made of x without waiting for a device."""
    return x.device.type == "cpu" or not x.numel()


def unread(n: Any) -> torch.Tensor | None:
    """A normaliser that lies on a device, NaN in the place of 0: means over nothing are refused, as others that are not
    finite. None for a number of the host."""
    return n / (n > 0) if isinstance(n, torch.Tensor) else None


def read(n: float | torch.Tensor) -> float:
    """An n on the host, 0 where nothing counts."""
    known = float(n)
    return 0.0 if math.isnan(known) else known
