"""What a rule is told of a step, from what the caller gave and from how its layers were solved."""

from __future__ import annotations

from collections.abc import Mapping

from kfaccore.method import Hyper, State
from kfaccore.precondition.assigned import Assigned
from kfaccore.record import Record
from kfaccore.step.known import Known
from kfaccore.step.own import Own
from kfaccore.xp.arrays import Array
from kfaccore.xp.numbers import number


def knowing(
    whose: Assigned,
    own: Mapping[str, Record],
    layers: Mapping[str, State],
    hypers: Mapping[str, Hyper],
    loss: float | Array | None,
    lengths: Mapping[str, float | Array] | None,
    nonnegative: bool | None = None,
) -> Known:
    """`layers` are the states that solved; those of a network-level method are not among them."""
    solving = {name: (whose.of(name), layers[name], hypers[name]) for name in own if name in layers}
    dampings = {name: hyper.damping for name, hyper in hypers.items()}
    ends = None if nonnegative is None else bool(nonnegative)  # no tracer: it decides what is computed
    return Known(None if loss is None else number(loss), Own(own, solving), lengths, dampings, ends)
