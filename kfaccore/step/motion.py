"""What the self-tuning step keeps from one step to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kfaccore.record import Factored
from kfaccore.step.height import Heights
from kfaccore.step.noise import Seen
from kfaccore.step.taken import Taken
from kfaccore.tree import added, static
from kfaccore.xp.arrays import Array, all_finite, eps, is_tracer, namespace
from kfaccore.xp.codes import Code
from kfaccore.xp.lists import times, weighted
from kfaccore.xp.numbers import Number, number, pick, read

_LEAST = 1e-8  # of damping, over the first one: the loss may be in any unit
_MOST = 1e10


@dataclass(frozen=True)
class Average:
    """A running mean of gradients: sums that start at zero, and the `weight` of each layer's, for layers that were
    frozen meanwhile. Directions of older inverses are not worth averaging: their steps to a target are half as many
    again."""

    sums: dict[str, Array] = field(default_factory=dict)
    weight: dict[str, Number] = field(default_factory=dict)

    @classmethod
    def of(cls, zeros: Mapping[str, Array]) -> Average:
        """Before the first step."""
        return cls({name: namespace(x).zeros_like(x) for name, x in zeros.items()}, dict.fromkeys(zeros, 0.0))

    def moved(self, grads: Mapping[str, Array | Factored], keep: float) -> tuple[Average, dict[str, Array]]:
        """keep times the old sums and 1 - keep times the gradients; and the means, shaped like these. One that is not
        finite is left out, and is its own mean."""
        sums = dict(self.sums)
        weight = dict(self.weight)
        means = {}
        dense = {name: grad.dense() if isinstance(grad, Factored) else grad for name, grad in grads.items()}
        vs = list(dense.values())
        good = dict(zip(dense, _finite(vs), strict=True))
        old = [_typed(namespace(v).reshape(sums[name], v.shape), v) for name, v in dense.items()]
        fresh = weighted(keep, old, 1 - keep, vs)
        total: dict[str, Any] = {name: pick(good[name], x, y) for name, x, y in zip(dense, fresh, old, strict=True)}
        for name, x in total.items():
            weight[name] = pick(good[name], keep * self.weight[name] + (1 - keep), self.weight[name])
            sums[name] = namespace(x).reshape(x, sums[name].shape)
        mean = times(list(total.values()), [1 / pick(good[name], weight[name], 1.0) for name in dense])
        for (name, v), x in zip(dense.items(), mean, strict=True):
            means[name] = pick(good[name], x, v)
        return Average(sums, weight), means

    def part(self, name: str, keep: float) -> Number:
        """How much of the mean is the newest gradient: 1 for layers that are not averaged, and in the first step."""
        weight = number(self.weight[name])
        return pick(weight > 0, (1 - keep) / pick(weight > 0, weight, 1.0), 1.0)


def _finite(arrays: Sequence[Array]) -> list[bool | Array]:
    """Whether all of each is finite; bools where they can be read."""
    good = [all_finite(v[None, ...])[0] for v in arrays]
    return [x if is_tracer(x) else bool(known) for x, known in zip(good, read(good), strict=True)]


def _typed(x: Array, like: Array) -> Array:
    """x in the dtype of `like`."""
    return x if x.dtype == like.dtype else namespace(x).astype(x, like.dtype)


@dataclass(frozen=True)
class Motion:
    """The previous update, the damping in force, what was predicted and found, and counters.

    alpha, mu   factors of the last step, whether it stayed or not
    sharp       running mean of x^T F x / x^T gradient, x the direction; 0 before the first step
    ratio       change of the loss over the predicted one at the last look
    restart     whether inverses are refreshed off the clock
    code        of the last step
    average     of the gradients
    first, last the unit of losses and the loss after the last step, 0 where not known
    seen        slope and noise, averaged over steps
    bent        u^T F u of the previous update u as its own batch saw it; 0 where there is none
    unit        the first damping, which its bounds are relative to; 0 where not known
    heights     of the loss, seen so far
    layers      of the last step, until it is judged
    """

    previous: dict[str, Array]
    damping: Number = 0.0
    alpha: Number = 0.0
    mu: Number = 0.0
    sharp: Number = 0.0
    predicted: Number = 0.0
    ratio: Number = 1.0
    steps: int | Array = 0
    rejected: int | Array = 0
    restart: bool | Array = True
    code: int | Array = int(Code.OK)
    average: Average = added(default_factory=Average)  # noqa: RUF009 a field
    first: Number = added(default=0.0)  # noqa: RUF009 a field
    last: Number = added(default=0.0)  # noqa: RUF009 a field
    seen: Seen = added(default_factory=Seen)  # noqa: RUF009 a field
    bent: Number = added(era=2, default=0.0)  # noqa: RUF009 a field
    unit: Number = added(era=4, default=0.0)  # noqa: RUF009 a field
    heights: Heights = added(era=5, default_factory=Heights)  # noqa: RUF009 a field
    layers: Taken = static(default=None)  # noqa: RUF009 a field


def rounding(motion: Motion) -> float:
    """Relative error of a loss of arrays like these."""
    x = next(iter(motion.previous.values()))
    return eps(x.dtype, namespace(x))


def bounded(damping: Number, unit: Number) -> Number:
    """The damping, no less than 1e-8 and no more than 1e10 of `unit`; as it is where that is 0."""
    least = _LEAST * unit
    most = pick(unit > 0, _MOST * unit, float("inf"))
    high = pick(damping < least, least, damping)
    return pick(high > most, most, high)


def lifted(damping: Number, alpha: Number, floor: float) -> Number:
    """The damping, larger where it left a step alpha that is shorter than `floor`."""
    low = (abs(alpha) > 0) & (abs(alpha) < floor)
    return pick(low, damping / 0.8, damping)
