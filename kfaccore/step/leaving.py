"""Which own shares a step leaves out of its model, and what it learns of the noise from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from kfaccore.record import Record
from kfaccore.step.known import Known
from kfaccore.step.model import Expansion
from kfaccore.step.motion import Motion, rounding
from kfaccore.step.noise import Noise, Seen
from kfaccore.step.own import Left, most_examples, remaining
from kfaccore.xp.arrays import Array, is_tracer, namespace
from kfaccore.xp.numbers import Number, number, numbers, pick, when


class Leaving(NamedTuple):
    """What the model leaves out, if anything; whether it was `gathered` in this step; the largest `weight` of the batch
    in a layer's direction; `whole`, how many layers are judged with their own shares; whether the batch is that of the
    step before."""

    left: Left | None
    gathered: bool | Array
    weight: Number
    whole: int
    same: bool | Array

    def repeats(self, seen: Seen, examples: Number) -> Number:
        """Most of the previous update that this batch may ask for again: the one that made it may for all of it."""
        return pick(self.same, float("inf"), seen.repeats(examples))

    def seen(self, before: Seen, found: Expansion, examples: Number) -> Seen:
        """The running slope and noise after a step with this model."""
        if found.slope is None:
            return before
        part = 1 - self.weight / examples
        true = (found.slope - found.own) / pick(part > 0, part, 1.0)
        after = before.moved(_MEMORY, true, found.own / self.weight)
        return Seen(pick(self.gathered, after.slope, before.slope), pick(self.gathered, after.own, before.own))


_MEMORY = 0.8  # of the running means of slope and noise
# of the batch's slope, in the first step: examples that contradict each other are not followed, nor ignored
_FIRST = 0.02
_ALL = 1 - 1e-6  # a weight of 1 but for rounding


def leaving(noise: Noise, motion: Motion, records: Mapping[str, Record], known: Known, examples: Number) -> Leaving:
    """Nothing for the batch of the step before, which holds no noise that the step could follow, and little needs to be
    gathered where rho stays above .9."""
    names = known.own.layers(records) if noise.own else []
    whole = len(records) - len(names)
    same = motion.heights.again(known.loss, motion.last, rounding(motion))
    if not names:
        return Leaving(None, False, 1.0, whole, same)
    weights = {name: motion.average.part(name, noise.average) for name in names}
    weight = weights[names[0]]
    for other in weights.values():
        weight = pick(other > weight, other, weight)
    skipped = motion.seen.clear(examples) & (motion.steps % noise.every != 0)
    idle = same | skipped
    left = when(idle, lambda: _nothing(records), lambda: known.own.shares(records, weights))
    least = pick(motion.steps == 0, _FIRST, 0.0)
    remains = {"factor": remaining(weight > _ALL, examples), "least": least, "layers": frozenset(names)}
    remains["own"] = {name: known.own.records[name] for name in names}
    if is_tracer(idle):
        return Leaving(
            left._replace(**remains | {"factor": pick(idle, 1.0, remains["factor"])}),
            namespace(idle).logical_not(idle),
            weight,
            whole,
            same,
        )
    return Leaving(None if idle else left._replace(**remains), not idle, weight, whole, same)


def _nothing(records: Mapping[str, Record]) -> Left:
    """No shares, of the shape and dtype that `Own.shares` has."""
    record = most_examples(records)
    g = record.g[:, 0, :, 0, 0]
    xp = namespace(g)
    zeros = xp.zeros_like(g)
    s = numbers(xp.where(g != g, zeros, zeros))  # made of g: under shard_map it varies over the axes that shares do
    return Left(s, number(namespace(s).sum(s)))
