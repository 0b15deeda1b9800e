"""What a step knows beside directions, gradients and records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kfaccore.step.own import Own
from kfaccore.xp.numbers import Number


@dataclass(frozen=True)
class Known:
    """loss     of the batch before the step, penalty included; None where the caller did not say
    own      the gradients of the loss itself, by example, and how the layers solve
    lengths  {layer: norm} of the updates that another rule would take, for Graft
    damping  in force, a layer
    nonnegative   whether the loss cannot be below 0; None where the caller did not say
    """

    loss: Number | None = None
    own: Own = field(default_factory=Own)
    lengths: Mapping[str, Number] | None = None
    damping: Mapping[str, Number] = field(default_factory=dict)
    nonnegative: bool | None = None
