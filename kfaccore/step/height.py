"""How much of a loss there is to take off: what a step's reach, and the end of its promise, are shares of.

A loss that cannot be negative is as high as its value. The value of any other says nothing, as a constant may have
joined it: it is as high as what has been taken off it and what the model of a batch promises to take off yet, and
nothing but differences of it counts. Which it is must be known: a loss says so, or a value below 0 shows it, or one
that its gradient would take far below 0.

A unit for the whole run does not hang on one batch: it is the first height, or the largest that a running mean comes to
later. The largest height so far is left out of that mean, so that one outburst raises nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kfaccore.step.known import Known
from kfaccore.tree import added
from kfaccore.xp.arrays import Array
from kfaccore.xp.numbers import Number, finite, number, pick, root

_SAME = 1e-5  # relative: losses this close are of the same batch; a value this little below 0 is rounding
_ROUNDINGS = 16.0  # errors of a loss, in units of its rounding
_MEMORY = 0.95  # of the running mean of heights
_FAR = 1e4  # a value that a model would take down by this many times itself is not bounded by 0
_CUT = 1 - 1e-6  # of the height, so that rounding promises no more than there is


@dataclass(frozen=True)
class Mean:
    """The running mean of numbers but the largest of them, `held`, which is let go as a larger one comes; 0 stands for
    nothing yet."""

    value: Number = 0.0
    weight: Number = 0.0
    held: Number = 0.0

    def moved(self, x: Number) -> Mean:
        """After one more number; as it is after one that is not finite."""
        good = finite(x)
        some = good & (self.held != 0)
        larger = good & ((x > self.held) | (self.held == 0))
        less = pick(larger, self.held, x)
        weight = _MEMORY * self.weight + (1 - _MEMORY)
        value = self.value + (1 - _MEMORY) / weight * (less - self.value)
        return Mean(pick(some, value, self.value), pick(some, weight, self.weight), pick(larger, x, self.held))

    def unit(self, so_far: Number) -> Number:
        """The largest mean so far, given what it was before: at first the first number, with no mean yet."""
        most = pick((self.weight > 0) & (self.value > so_far), self.value, so_far)
        return pick(so_far == 0, self.held, most)


@dataclass(frozen=True)
class Heights:
    """What is known of the heights of a loss: the `losses` themselves, what models of its batches promised at their
    minimum, the unit that these `promises` make, `room`, what the last one promised, at most that unit; and whether the
    loss is known to have no end at 0, `endless`, 1 for yes, which stays."""

    losses: Mean = added(era=5, default_factory=Mean)  # noqa: RUF009 a field
    promises: Mean = added(era=5, default_factory=Mean)  # noqa: RUF009 a field
    promise: Number = added(era=5, default=0.0)  # noqa: RUF009 a field
    room: Number = added(era=5, default=0.0)  # noqa: RUF009 a field
    endless: Number = added(era=5, default=0.0)  # noqa: RUF009 a field

    def moved(self, first: Number, known: Known, step: Array, F: Array, down: Array) -> tuple[Number, Heights]:
        """The unit of losses, `first` before, and the rest, once a model has its minimum at `step`."""
        most = number(step @ down - 0.5 * (step @ F @ step))
        most = pick(finite(most) & (most > 0), most, 0.0)
        losses = self.losses if known.loss is None else self.losses.moved(known.loss)
        top = losses.unit(first)
        promises = self.promises.moved(most)
        unit = promises.unit(self.promise)
        room = pick(most < unit, most, unit)
        after = Heights(losses, promises, unit, room, self.endless).shown(known.loss, first)
        if known.nonnegative is False:
            return top, replace(after, endless=1.0 + 0.0 * unit)
        if known.nonnegative or known.loss is None:
            return top, after
        far = finite(known.loss) & (most > _FAR * abs(known.loss))
        return top, replace(after, endless=pick(far, 1.0, after.endless))

    def shown(self, loss: Number | None, first: Number) -> Heights:
        """After a look at the loss: a value below 0, by more than rounding of its unit, shows that it has no end."""
        if loss is None:
            return self
        below = finite(loss) & (loss < -_SAME * abs(first))
        return replace(self, endless=pick(below, 1.0, self.endless))

    def unit(self, first: Number) -> Number:
        """The unit of the whole run; `first` is that of losses."""
        fallen = pick(self.losses.weight > 0, first - self.losses.value, 0.0)
        return pick(self.endless > 0, self.promise + fallen, first)

    def end(self, loss: Number | None, first: Number) -> Number | None:
        """How high the loss is: its value, or the unit of the run."""
        return None if loss is None else pick(self.endless > 0, self.unit(first), loss)

    def rise(self, before: Number, tolerance: float, rounding: float) -> Number:
        """The largest loss after a step that stays: higher by a share of the height that its own batch saw."""
        endless = before + tolerance * self.room + _ROUNDINGS * rounding * abs(before)
        return pick(self.endless > 0, endless, (1.0 + tolerance) * before)

    def again(self, loss: Number | None, last: Number, rounding: float) -> bool | Array:
        """Whether a batch is that of the last step: its loss is what that step left, `last`, 0 before any."""
        if loss is None:
            return False
        apart = abs(loss - last)
        close = pick(self.endless > 0, _SAME * self.room + _ROUNDINGS * rounding * abs(last), _SAME * abs(last))
        some = (last > 0) | ((self.endless > 0) & (last < 0))
        return some & (apart <= close)


def promised(step: Array, F: Array, down: Array, height: Number | None) -> Array:
    """`step`, or the part of it that promises no more than `height`.

    Along t step the model falls by t p - t^2 c / 2, p = down . step, c = step^T F step: the smallest t at which that is
    the height. Where it is not known, or 0, there is no such end.
    """
    if height is None:
        return step
    p = number(step @ down)
    c = number(step @ F @ step)
    end = _CUT * height
    beyond = (height > 0) & (p - 0.5 * c > end)
    inside = pick(beyond, p * p - 2 * c * end, 1.0)
    inside = pick(inside > 0, inside, 0.0)
    return step * pick(beyond, 2 * end / pick(beyond, p + root(inside), 1.0), 1.0)
