"""One call of one parameter: what went in, the gradient edge of what came out, and how its axes are rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import GradientEdge

from kfaccore_torch.views import Ref


@dataclass(frozen=True)
class Call:
    """One call of one weight.

    x          the input, detached; of an embedding the index of each row
    edge       of the output
    shape      of the output
    rows       sizes of the axes of the output that are not features
    version    how often the input's memory had been written
    options    arguments by name, other than tensors
    normalised what a gain was multiplied with, like the output
    channel    the axis of the features
    before     nodes of the input, where it has a graph
    narrow     the same call before its output was widened by an addition
    arrange    (..., *shape) -> (..., *rows, d), blocks before the rows, where axes alone do not say it
    factor     what the parameter was multiplied with before, None where it was not
    """

    x: torch.Tensor
    edge: GradientEdge
    shape: tuple[int, ...]
    rows: tuple[int, ...]
    version: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    normalised: Callable[[], torch.Tensor] | None = None
    channel: int = -1
    before: tuple[Any, ...] = ()
    narrow: Call | None = None
    arrange: Callable[[torch.Tensor], torch.Tensor] | None = None
    factor: float | torch.Tensor | None = None

    def of_parameter(self, g: torch.Tensor) -> torch.Tensor:
        """A gradient of the output as the parameter sees it."""
        return g if self.factor is None else g * self.factor

    @property
    def node(self) -> Any:
        """Where its gradient passes."""
        return self.edge.node

    def features_last(self, g: torch.Tensor, d: int) -> torch.Tensor:
        """A gradient of the output (..., *shape) as (..., *rows, d)."""
        if self.arrange is not None:
            return self.arrange(g)
        lead = g.shape[: g.ndim - len(self.shape)]
        if self.channel == -1:
            return g.reshape(*lead, *self.rows, d)
        tail = 1
        for size in self.shape[self.channel :]:
            tail *= size
        if tail == d:  # a norm over several axes
            return g.reshape(*lead, *self.rows, d)
        return g.movedim(self.channel, -1).reshape(*lead, *self.rows, d)


@dataclass(frozen=True)
class Remade:
    """Makes a normalised input again: memory that whoever asked for it may write to."""

    make: Callable[[], torch.Tensor]

    def __call__(self) -> torch.Tensor:
        return self.make()


@dataclass(frozen=True)
class Mark:
    """What an operation takes a parameter for: a layer kind without bias, and the parts that are weight and bias.

    scaled   whether one of them is multiplied with a number first, so that weight and bias are no one matrix
    """

    kind: Any
    weight: Ref | None
    bias: Ref | None = None
    scaled: bool = False

    def __post_init__(self) -> None:
        if any(ref is not None and ref.factor is not None for ref in (self.weight, self.bias)):
            object.__setattr__(self, "scaled", True)

    @property
    def names(self) -> set[str]:
        """The parameters it is of."""
        return {ref.name for ref in (self.weight, self.bias) if ref is not None}


@dataclass(frozen=True)
class Use:
    """One operation on a parameter."""

    mark: Mark
    call: Call
