"""Whether a model runs the calls that it was planned with, whatever arguments it is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from kfaccore_jax.calls import Call
from kfaccore_jax.plan import Plan
from kfaccore_jax.walk import OTHER


def check_calls(plan: Plan, calls: Mapping[str, Call], n: int) -> None:
    """ValueError where these are not the plan's calls, on the same elements of the same leaves in the same way."""
    if calls.keys() != plan.calls.keys():
        raise ValueError(OTHER)
    for key, call in calls.items():
        planned = plan.calls[key]
        same = replace(call, batch=planned.batch, mixed=planned.mixed)
        if n == 1:  # an axis of one element looks like no axis
            same = replace(same, x=planned.x, y=planned.y)
        if same != planned:
            names = [row.leaf for row in plan.table]
            raise ValueError(
                f"{OTHER}: {names[call.leaf]} is used as {_use(call)}, where the plan has {names[planned.leaf]} as "
                f"{_use(planned)}"
            )


def _use(call: Call) -> str:
    """Of a call what tells uses of one leaf apart."""
    sizes = [tuple(size for size, _ in axes) for axes in (call.blocks, call.outs, call.ins)]
    window = f", {call.window}, edges {call.edges}" if call.window else ""
    return f"{call.kind} (blocks {sizes[0]}, outputs {sizes[1]}, inputs {sizes[2]}, from element {call.offset}{window})"
