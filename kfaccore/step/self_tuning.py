"""A step that sets its own rate, momentum and damping.

update = alpha x + mu (previous update), (alpha, mu) minimising the exact quadratic model of the batch plus damping;
damping follows the reduction ratio (Levenberg-Marquardt), and a step that raises the loss of its own batch is taken
back. Source: Martens & Grosse 2015 (1503.05671), sections 6.4-7. Cost: two J v and one forward a step.

The rule's numbers are Python floats on the host, float64 whatever the records are. Under jit they are 0-d arrays in the
widest dtype JAX has, so float32 without its 64-bit mode: there the 2x2 system, scaled to a unit diagonal, loses no more
than the sums it is made of, and calls directions parallel below 1 - cos^2 = 1.2e-4 instead of 1e-6.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from kfaccore import tree
from kfaccore.method import Hyper
from kfaccore.precondition.comm import Communicator, Serial
from kfaccore.record import Factored, Record
from kfaccore.step.height import promised
from kfaccore.step.known import Known
from kfaccore.step.leaving import leaving
from kfaccore.step.model import Expansion, Penalty, counts, expansion, trace
from kfaccore.step.motion import Average, Motion, bounded, lifted, rounding
from kfaccore.step.noise import Noise
from kfaccore.step.plane import capped, combined, gram, minimum
from kfaccore.step.rule import ByModel
from kfaccore.step.sharpness import sharpness, unforgotten
from kfaccore.step.taken import Taken, of_step, taken
from kfaccore.xp.arrays import Array, namespace, scalar
from kfaccore.xp.codes import Code
from kfaccore.xp.numbers import Number, finite, number, pick, stack, when
from kfaccore.xp.ranges import AT_LEAST_0, COUNT, NO_BOUND, PART, POSITIVE, REAL, SHARE, ranged


@dataclass(frozen=True)
class SelfTuning(ByModel):
    """Numbers of the rule; none of them usually needs setting.

    first       first damping over the mean eigenvalue of the Fisher blocks
    drop        damping is multiplied by it when the model predicts well, divided when it predicts badly
    every       steps between looks at the reduction ratio
    grow        factor on damping after a step was taken back
    cap         largest alpha; both alpha and mu are scaled down to it
    tolerance   a step is taken back when it raises the loss of its own batch by more than this share of its height, its
                value if it cannot be negative: at low damping a small rise often pays later, an outburst never does
    floor       where |alpha| falls below it, damping grows by 1/0.8: for damping so low that the direction is noise,
                which the reduction ratio cannot see; 0 is off, 0.02 costs a tenth of the steps from a good start
    memory      share of the running mean of x^T F x / x^T gradient that stays in a step. F is raised to that mean, by
                no more than it may be off: from few rows it is noisy, and a minimum is where it errs to the flat side;
                0 is off
    noise       average and reach, and whether own shares are left out; see its class
    model       (records, gradients, directions) -> Expansion; over several ranks it is also given comm=, and left=
                where own shares are left out
    comm        ranks whose records add up to the batch; set by `over`
    """

    first: float = 0.1
    drop: float = 0.95**5
    every: int = 5
    grow: float = 4.0
    cap: float = 1.0
    tolerance: float = 0.25
    floor: float = 0.0
    memory: float = 0.9
    noise: Noise = Noise()  # noqa: RUF009 frozen
    model: Callable[..., Expansion] = expansion
    comm: Communicator = Serial()  # noqa: RUF009 frozen

    judges: ClassVar[bool] = True
    traced: ClassVar[bool] = True
    terms: ClassVar[bool] = False

    def __post_init__(self) -> None:
        ranged(self, first=POSITIVE, drop=PART, every=COUNT, grow=POSITIVE, cap=NO_BOUND)
        ranged(self, tolerance=REAL, floor=AT_LEAST_0, memory=SHARE)

    def over(self, comm: Communicator) -> SelfTuning:
        """The rule for ranks whose records add up to the batch, all of which call it with the same directions."""
        return replace(self, comm=comm, model=partial(self.model, comm=comm))

    @property
    def wants_own(self) -> bool:
        """Unless its numbers say otherwise."""
        return self.noise.own

    def init(self, zeros: dict[str, Array]) -> Motion:
        return Motion(zeros, average=Average.of(zeros))

    def restart(self, motion: Motion) -> bool | Array:
        """In the first steps, and after one was taken back."""
        return motion.restart

    def hyper(self, motion: Motion, hyper: Hyper) -> Hyper:
        """The damping in force instead of the scheduled one."""
        return replace(hyper, damping=motion.damping)

    def begin(self, motion: Motion, records: Mapping[str, Record]) -> Motion:
        """The first damping, from tr(A) tr(G) of the first records that have any."""
        if not records:
            return motion

        def first() -> Number:
            size = sum(record.blocks * record.d_out * record.d_in for record in records.values())
            damping = self.first * trace(records, self.comm) / size
            damping = pick(finite(damping), damping, motion.damping)
            # both sides of `when` must have one dtype
            return damping if isinstance(motion.damping, int | float) else scalar(damping, motion.damping)

        damping = when(motion.damping > 0, lambda: motion.damping, first)
        return replace(motion, damping=damping, unit=pick(motion.unit > 0, motion.unit, damping))

    def gradients(
        self, motion: Motion, grads: Mapping[str, Array | Factored]
    ) -> tuple[Mapping[str, Array | Factored], Motion]:
        """Their running mean: one batch's direction is mostly its own noise."""
        if not self.noise.average:
            return grads, motion
        average, means = motion.average.moved(grads, self.noise.average)
        return means, replace(motion, average=average)

    def __call__(
        self,
        motion: Motion,
        directions: dict[str, Array],
        grads: Mapping[str, Array | Factored],
        records: Mapping[str, Record],
        l2: Penalty = 0.0,
        known: Known = Known(),  # noqa: B008 frozen
    ) -> tuple[dict[str, Array], Motion, dict[str, float | Array]]:
        """(updates to subtract, motion, info): alpha, mu, damping, predicted change, last ratio, rejections, code; and
        of noise rho, critical_batch, how many layers' own shares are left in (`with_own`), and the gradients over the
        loss's own (`given`).

        l2   the penalty l2/2 |theta|^2 is part of the loss and of `grads`, so its curvature joins the model.
        """
        if not directions:
            return directions, replace(motion, layers=()), {"alpha": 0.0, "code": Code.OK}
        previous = {name: motion.previous[name] for name in directions}
        pair = ({name: _like(v, previous[name]) for name, v in directions.items()}, previous)
        rows, examples = counts(records, self.comm)
        own = leaving(self.noise, motion, {name: records[name] for name in directions}, known, examples)
        left = {} if own.left is None else {"left": own.left}
        found = self.model(records, grads, pair, **left)
        norms = gram(*pair)
        F = unforgotten(found.F + (gram(*pair, l2) if isinstance(l2, Mapping) else l2 * norms), motion.bent)
        sharp, times = sharpness(motion.sharp, F, found.down, rows, self.memory)
        alpha, mu, code = minimum(times * F + motion.damping * norms, found.down, own.repeats(motion.seen, examples))
        step = stack([*capped(alpha, mu, self.cap)])
        first, heights = motion.heights.moved(motion.first, known, step, F, found.down)
        step = self.noise.shortened(step, F if found.batch is None else found.batch, heights.unit(first))
        seen = own.seen(motion.seen, found, examples)
        step = promised(step, F, found.down, self.noise.believed(heights.end(known.loss, first), seen.rho(examples)))
        alpha = number(step[0])
        mu = number(step[1])
        updates = combined(alpha, pair[0], mu, previous)
        sound = code != Code.NONFINITE
        after = replace(
            _moved(motion, updates, sound),
            damping=lifted(motion.damping, alpha, self.floor),
            alpha=alpha,
            mu=mu,
            sharp=sharp,
            predicted=_predicted(step, F, found.down),
            code=int(code) if isinstance(code, Code) else code,
            first=first,
            heights=heights,
            seen=seen,
            bent=pick(sound, number(step @ F @ step), motion.bent),
        )
        told = _told(motion, after, code) | seen.told(examples) | {"with_own": own.whole, "given": found.given}
        return {name: _like(v, directions[name]) for name, v in updates.items()}, after, told

    def judge(self, motion: Motion, share: float, before: Number, after: Number) -> tuple[Number, Motion]:
        """All of the update or none of it, given the batch loss before and after it, and the damping that follows.

        A batch whose own loss is not finite says nothing about the step, nor does a change that was predicted below the
        rounding of the loss: both leave damping alone.
        """
        before = number(before)
        after = number(after)
        told = finite(before)
        heights = motion.heights.shown(before, motion.first).shown(after, motion.first)
        small = rounding(motion)
        good = told & finite(after) & (after <= heights.rise(before, self.tolerance, small))
        falls = motion.predicted < 0
        ratio = pick(falls, (after - before) / pick(falls, motion.predicted, -1.0), 0.0)
        factor = pick(ratio > 0.75, self.drop, pick(ratio < 0.25, 1 / self.drop, 1.0))
        moved = motion.steps > 0
        seen = abs(motion.predicted) > small * abs(before)
        look = good & moved & seen & (motion.steps % self.every == 0)
        kept = pick(moved, bounded(motion.damping * pick(look, factor, 1.0), motion.unit), motion.damping)
        grown = pick(told, bounded(motion.damping * self.grow, motion.unit), motion.damping)
        stays = good | (motion.code == int(Code.NONFINITE))
        return pick(good, share, 0.0), replace(
            motion,
            previous=_kept(stays, motion.previous, motion.layers),
            layers=None,
            bent=pick(stays, motion.bent, 0.0),
            damping=pick(good, kept, grown),
            ratio=pick(look, ratio, motion.ratio),
            rejected=motion.rejected + pick(good, 0, 1),
            restart=pick(good, motion.steps < 3, pick(told, True, motion.restart)),
            code=pick(finite(after), motion.code, int(Code.NONFINITE)),
            last=pick(good, after, pick(told, before, motion.last)),
            heights=heights,
        )


def _moved(motion: Motion, updates: dict[str, Array], sound: bool | Array) -> Motion:
    """After a step with these updates, which stand for nothing where they are not sound."""
    previous = tree.map(partial(pick, sound), {**motion.previous, **updates}, motion.previous)
    return replace(motion, previous=previous, layers=taken(updates, motion.previous), steps=motion.steps + 1)


def _predicted(step: Array, F: Array, down: Array) -> Number:
    """What the undamped model says the loss changes by; 0 where that is not finite."""
    change = number(-step @ down + 0.5 * step @ F @ step)
    return pick(finite(change), change, 0.0)


def _told(before: Motion, after: Motion, code: Number) -> dict[str, float | Array]:
    """The info of a step: its factors, the damping they were found with, and what the last look found."""
    found = {"alpha": after.alpha, "mu": after.mu, "damping": before.damping, "predicted": after.predicted}
    return {**found, "ratio": before.ratio, "rejected": before.rejected, "code": code}


def _kept(good: bool | Array, previous: dict[str, Array], layers: Taken) -> dict[str, Array]:
    """The update, or zeros after one that was taken back."""
    if isinstance(good, bool) and good:
        return previous
    return of_step(lambda x: pick(good, x, namespace(x).zeros_like(x)), previous, layers)


def _like(v: Array, like: Array) -> Array:
    return namespace(v).reshape(v, like.shape)
