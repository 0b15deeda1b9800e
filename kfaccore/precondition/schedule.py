"""When things happen, and the numbers of a step: clocks, and functions from the step (an int) to a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kfaccore.method import Hyper
from kfaccore.xp.arrays import Array

Schedule = Callable[..., float]


def constant(value: float) -> Schedule:
    """The same number at every step."""
    return lambda step: value


def exponential(start: float, rate: float, floor: float = 0.0) -> Schedule:
    """max(floor, start * rate^step)."""
    return lambda step: max(floor, start * rate**step)


def linear(start: float, end: float, steps: int) -> Schedule:
    """From start to end over `steps` steps, then end."""
    return lambda step: start + (end - start) * min(step / steps, 1.0)


def cosine(start: float, end: float, steps: int) -> Schedule:
    """Half a cosine from start to end over `steps` steps, then end."""
    return lambda step: end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))


def piecewise(values: tuple[float, ...], boundaries: tuple[int, ...]) -> Schedule:
    """values[i] from step boundaries[i - 1] on; one more value than boundaries."""
    if len(values) != len(boundaries) + 1:
        raise ValueError(f"piecewise got {len(values)} values and {len(boundaries)} boundaries; need one value more")
    return lambda step: values[sum(step >= b for b in boundaries)]


def at(value: float | Schedule, step: int | Array) -> float:
    """A number as it is, a schedule at `step`."""
    return value(step) if callable(value) else value


@dataclass(frozen=True)
class Clocks:
    """Statistics every `update` steps, inverses every `refresh` steps, both at step 0."""

    update: int = 1
    refresh: int = 5

    def __post_init__(self) -> None:
        if self.update < 1 or self.refresh < 1:
            raise ValueError(f"{self}: need at least 1 step between updates and refreshes")


@dataclass(frozen=True)
class Schedules:
    """damping: a number, a function of the step, or a mapping from layer to either; decay: a number or a function.

    Damping is absolute, in units of the curvature of the mean loss; a method's split may make it relative.

    l2             the penalty l2/2 |theta|^2 is part of the loss: its gradient joins the gradient (by the shell, before
                   preconditioning), its curvature joins the damping of every block and the step's quadratic model
    weight_decay   decoupled: the shell subtracts alpha * weight_decay * theta beside the update, alpha being the
                   step's rate; curvature and gradient never see it
    """

    damping: float | Schedule | Mapping[str, float | Schedule] = 0.1
    decay: float | Schedule = 0.95
    l2: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("l2", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"Schedules.{name} is {getattr(self, name)}; need a finite number >= 0")

    def hyper(self, name: str, step: int | Array) -> Hyper:
        """The numbers of layer `name` at `step`."""
        return Hyper(step, at(self.decay, step), at(self.of(name), step))

    def of(self, name: str) -> float | Schedule:
        """The damping of layer `name`, as it was given; ValueError where there is none."""
        if not isinstance(self.damping, Mapping):
            return self.damping
        if name not in self.damping:
            raise ValueError(f"Schedules.damping has no entry for layer {name!r}; it has {sorted(self.damping)}")
        return self.damping[name]
