"""When things happen, and the numbers of a step: clocks, and functions from the step (an int) to a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from kfaccore.method import Hyper
from kfaccore.xp.arrays import Array
from kfaccore.xp.ranges import ANY, AT_LEAST_0, COUNT, SHARE, ranged, within

Schedule = Callable[..., float]
PIECES = 8  # more would refresh too few matrices at once for a GPU: 8 cut the longest step to a third


def constant(value: float) -> Schedule:
    """The same number at every step."""
    within("constant(value)", value, ANY)
    return lambda step: value


def exponential(start: float, rate: float, floor: float = 0.0) -> Schedule:
    """max(floor, start * rate^step)."""
    _finite("exponential", start=start, rate=rate, floor=floor)
    return lambda step: max(floor, start * rate**step)


def linear(start: float, end: float, steps: int) -> Schedule:
    """From start to end over `steps` steps, then end."""
    _finite("linear", start=start, end=end)
    within("linear(steps)", steps, COUNT)
    return lambda step: start + (end - start) * min(step / steps, 1.0)


def cosine(start: float, end: float, steps: int) -> Schedule:
    """Half a cosine from start to end over `steps` steps, then end."""
    _finite("cosine", start=start, end=end)
    within("cosine(steps)", steps, COUNT)
    return lambda step: end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))


def piecewise(values: tuple[float, ...], boundaries: tuple[int, ...]) -> Schedule:
    """values[i] from step boundaries[i - 1] on; one more value than boundaries."""
    if len(values) != len(boundaries) + 1:
        raise ValueError(f"piecewise got {len(values)} values and {len(boundaries)} boundaries; need one value more")
    _finite("piecewise", **{f"values[{i}]": value for i, value in enumerate(values)})
    _finite("piecewise", **{f"boundaries[{i}]": boundary for i, boundary in enumerate(boundaries)})
    return lambda step: values[sum(step >= b for b in boundaries)]


def _finite(of: str, **given: float) -> None:
    for name, value in given.items():
        within(f"{of}({name})", value, ANY)


def at(value: float | Schedule, step: int | Array) -> float:
    """A number as it is, a schedule at `step`."""
    return value(step) if callable(value) else value


@dataclass(frozen=True)
class Clocks:
    """Statistics every `update` steps, inverses every `refresh` steps, both at step 0.

    staggered   after step 0 the layers are refreshed in pieces of equal cost, up to `PIECES` of them, spread over the
                steps of a period that do not update (over all, where all update): each layer once every `refresh`
                steps, as before, and no step pays for all. A refresh that a rule asks for is one of all layers, and a
                network-level method is one layer
    """

    update: int = 1
    refresh: int = 5
    staggered: bool = False

    def __post_init__(self) -> None:
        ranged(self, update=COUNT, refresh=COUNT)

    def slots(self) -> tuple[int, ...]:
        """The steps of a period at which pieces are refreshed: at most `PIECES`, evenly spread; (0,) unstaggered."""
        if not self.staggered:
            return (0,)
        free = [step for step in range(self.refresh) if step % self.update] or list(range(self.refresh))
        count = min(PIECES, len(free))
        return tuple(free[i * len(free) // count] for i in range(count))


@dataclass(frozen=True)
class Schedules:
    """damping: a number, a function of the step, or a mapping from layer to either; decay: a number or a function.

    Damping is absolute, in units of the curvature of the mean loss; a method's split may make it relative.

    l2             a number, a function of the step, or a mapping from layer to either, as damping;
                   the penalty l2/2 |theta|^2 is part of the loss: its gradient joins the gradient (by the shell, before
                   preconditioning), its curvature joins the damping of every block and the step's quadratic model
    weight_decay   decoupled: the shell subtracts alpha * weight_decay * theta beside the update, alpha being the
                   step's rate; curvature and gradient never see it
    """

    damping: float | Schedule | Mapping[str, float | Schedule] = 0.1
    decay: float | Schedule = 0.95
    l2: float | Schedule | Mapping[str, float | Schedule] = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for field, given, wanted in (
            ("damping", self.damping, AT_LEAST_0),
            ("decay", self.decay, SHARE),
            ("l2", self.l2, AT_LEAST_0),
            ("weight_decay", self.weight_decay, AT_LEAST_0),
        ):
            each = given.items() if isinstance(given, Mapping) else [(None, given)]
            for name, value in each:
                if not callable(value):  # a schedule is looked at where it answers
                    within(f"Schedules.{field}" + ("" if name is None else f"[{name!r}]"), value, wanted)

    def hyper(self, name: str, step: int | Array) -> Hyper:
        """The numbers of layer `name` at `step`."""
        return Hyper(step, at(self.decay, step), at(_of_layer("damping", self.damping, name), step))

    def hypers(self, names: Iterable[str], step: int | Array, changed: Callable[[Hyper], Hyper]) -> dict[str, Hyper]:
        """The numbers of layers once `changed`, made once for all of one schedule; the curvature of the l2 penalty is
        l2 I: it joins the damping."""
        # with each its sources, by whose identity it is known: one that a mapping makes when asked must not go before
        known: dict[tuple[int, int], tuple[object, Hyper]] = {}
        found = {}
        penalised = self.penalised
        for name in names:
            made_of = (_of_layer("damping", self.damping, name), _of_layer("l2", self.l2, name))
            key = (id(made_of[0]), id(made_of[1]))
            if key not in known:
                damping, l2 = (at(source, step) for source in made_of)
                hyper = changed(Hyper(step, at(self.decay, step), damping))
                known[key] = (made_of, replace(hyper, damping=hyper.damping + l2) if penalised else hyper)
            found[name] = known[key][1]
        return found

    def penalty(self, name: str, step: int | Array) -> float:
        """The l2 of layer `name` at `step`."""
        return at(_of_layer("l2", self.l2, name), step)

    def joint(self, names: Iterable[str], step: int | Array) -> float | dict[str, float]:
        """The l2 of all layers: one number where they share it, else {layer: l2}."""
        return self.penalties(names, step) if isinstance(self.l2, Mapping) else at(self.l2, step)

    def penalties(self, names: Iterable[str], step: int | Array) -> dict[str, float]:
        """{layer: l2} at `step`; empty where there is no penalty at all."""
        return {name: self.penalty(name, step) for name in names} if self.penalised else {}

    @property
    def penalised(self) -> bool:
        """Whether there is any l2."""
        every = self.l2.values() if isinstance(self.l2, Mapping) else [self.l2]
        return any(callable(value) or value != 0 for value in every)


def _of_layer(field: str, given: float | Schedule | Mapping[str, float | Schedule], name: str) -> float | Schedule:
    """What one layer has of a field; ValueError where a mapping does not say."""
    if not isinstance(given, Mapping):
        return given
    if name not in given:
        raise ValueError(f"Schedules.{field} has no entry for layer {name!r}; it has {sorted(given)}")
    return given[name]
