"""What the noise of a batch does to a step: how much of its slope is real, and how far it may go on the word of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kfaccore.linalg.shares import critical_batch
from kfaccore.precondition.comm import Communicator, Serial
from kfaccore.record import Factored, Record
from kfaccore.step.height import Heights, promised
from kfaccore.step.known import Known
from kfaccore.step.model import counts, expansion, inners
from kfaccore.step.own import remaining
from kfaccore.xp.arrays import Array
from kfaccore.xp.numbers import Number, finite, number, pick, root, stack
from kfaccore.xp.ranges import COUNT, NO_BOUND, PART, SHARE, ranged

_CLEAR = 0.9  # rho from which own shares are next to nothing


@dataclass(frozen=True)
class Noise:
    """Numbers of a length that knows the noise of its batch; the same for all tasks.

    average   share of the mean of directions that stays in a step; 0 takes each batch's own
    reach     most that a step may change the model's predictions, x^T F x, over the unit of heights of the loss: that
              of the first step, or the largest that their running mean comes to later
    every     where rho stays above .9, own shares are gathered at every so manieth step only
    own       whether examples are left out of the model that judges their own direction
    promise   most of the height that a step may promise to take off, as a share of it, where slopes are all noise; rho
              where that is more. The draws of a net that is sure of itself hold next to no curvature, and its model
              then promises whatever the few examples ask that contradict it
    """

    average: float = 0.8
    reach: float = 0.02
    every: int = 10
    own: bool = True
    promise: float = 0.25

    def __post_init__(self) -> None:
        ranged(self, average=SHARE, reach=NO_BOUND, promise=PART, every=COUNT)

    def __call__(self, directions: Mapping[str, Array], grads: Mapping[str, Array | Factored], lr: float) -> float:
        return 1.0  # as rescale= of Fixed, see modelled

    def modelled(
        self,
        directions: Mapping[str, Array],
        grads: Mapping[str, Array | Factored],
        records: Mapping[str, Record],
        known: Known,
        first: Number,
        heights: Heights,
        comm: Communicator = Serial(),  # noqa: B008 frozen
    ) -> tuple[dict[str, Number], Number, Heights]:
        """The length of a step along this batch's own direction x: `scale` = slope / (x^T F x + damping |x|^2) with
        own shares left out, no longer than the reach and the loss allow, at most 1; and what follows of the heights.

        For an optimizer that comes after, whose momentum is the average.
        """
        names = known.own.layers(records) if self.own else []
        examples = counts(records, comm)[1]
        left = known.own.shares(records, dict.fromkeys(names, 1.0)) if names else None
        if left is not None:
            left = left._replace(
                factor=remaining(True, examples),
                layers=frozenset(names),
                own={name: known.own.records[name] for name in names},
            )
        x = {name: d if d.ndim == 3 else d[None, ...] for name, d in directions.items()}
        found = expansion(records, grads, (x, x), comm, left)
        squares = inners(*(({name: d}, {name: d}) for name, d in x.items()))
        norms = sum(known.damping[name] * square for name, square in zip(x, squares, strict=True))
        F = found.F[:1, :1]
        down = found.down[:1]
        below = number(F[0, 0]) + norms
        good = finite(below) & finite(number(down[0])) & (below > 0)
        alpha = pick(good, number(down[0]) / pick(good, below, 1.0), 0.0)
        step = stack([pick(alpha < 1.0, alpha, 1.0)])
        first, heights = heights.moved(first, known, step, F, down)
        step = self.shortened(step, F if found.batch is None else found.batch[:1, :1], heights.unit(first))
        whole = len(records) - len(names)
        slope = number(down[0]) if found.slope is None else found.slope
        seen = Seen(slope - found.own, found.own)
        step = promised(step, F, down, self.believed(heights.end(known.loss, first), seen.rho(examples)))
        told = {"scale": number(step[0]), **seen.told(examples), "with_own": whole, "given": found.given}
        return told, first, heights

    def shortened(self, step: Array, F: Array, unit: Number) -> Array:
        """`step` times min(1, sqrt(reach unit / step^T F step)); as it is where the unit is not known, 0."""
        change = number(step @ F @ step)
        most = self.reach * unit
        long = (most > 0) & (change > most)
        return step * pick(long, root(pick(long, most, 1.0) / pick(long, change, 1.0)), 1.0)

    def believed(self, height: Number | None, rho: Number) -> Number | None:
        """Most that a step may promise to take off the loss: a share of its height, max(promise, rho)."""
        if height is None:
            return None
        return pick(rho > self.promise, rho, self.promise) * height


@dataclass(frozen=True)
class Seen:
    """Running sums of one batch's slope without noise and of its examples' own part, with common weights; 0 at first.

    Their ratio is all that counts.
    """

    slope: Number = 0.0
    own: Number = 0.0

    def moved(self, memory: float, slope: Number, own: Number) -> Seen:
        """After a step whose gradient has <G, P G> = slope, unbiased, and sum_b h_b . P h_b / n^2 = own."""
        good = finite(slope) & finite(own) & (own > 0)
        return Seen(
            pick(good, memory * self.slope + (1 - memory) * slope, self.slope),
            pick(good, memory * self.own + (1 - memory) * own, self.own),
        )

    def critical(self, examples: Number) -> Number:
        """See `critical_batch`; 0 before anything was seen."""
        slope = self.slope * (1 - 1 / examples) + self.own
        return pick(self.own > 0, critical_batch(slope, self.own, examples), 0.0)

    def repeats(self, examples: Number) -> Number:
        """Most of the previous update that a batch may ask for again, or back: 1 / (1 - rho), 1 + examples / critical.

        What a batch without noise says of it holds; where all is noise, a batch that sees next to no curvature along it
        would repeat it many times over, and no batch knows more of it than the one that made it. One example alone
        shows no noise: there is no bound.
        """
        critical = self.critical(examples)
        known = (critical > 0) & (examples > 1)
        return pick(known, 1 + examples / pick(known, critical, 1.0), float("inf"))

    def rho(self, examples: Number) -> Number:
        """The true slope along a batch's direction over that of the batch: 1 without noise, 0 where all is noise."""
        return 1 / (1 + self.critical(examples) / examples)

    def told(self, examples: Number) -> dict[str, Number]:
        """For the info of a step."""
        return {"rho": self.rho(examples), "critical_batch": self.critical(examples)}

    def clear(self, examples: Number) -> bool | Array:
        """Whether noise is next to nothing."""
        return (self.own > 0) & (self.rho(examples) > _CLEAR)
