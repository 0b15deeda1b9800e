"""Whether a model runs the calls that it was planned with, whatever arguments it is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax

from kfaccore_jax.calls import Call
from kfaccore_jax.evaluate import evaluated
from kfaccore_jax.mesh import Shape
from kfaccore_jax.names import without_number
from kfaccore_jax.plan import Plan
from kfaccore_jax.walk import OTHER


def check_calls(plan: Plan, calls: Mapping[str, Call], n: int) -> None:
    """ValueError where these are not the plan's calls, on the same elements of the same leaves in the same way."""
    if calls.keys() != plan.calls.keys():
        raise ValueError(OTHER)
    for key, call in calls.items():
        planned = plan.calls[key]
        same = replace(call, batch=planned.batch, mixed=planned.mixed, outer=planned.outer)
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


def probed(plan: Plan, params: Any, args: tuple, n: int) -> dict[str, Shape]:
    """Types of the outputs of the calls at this batch; ValueError if they are not the plan's calls."""
    found: dict[str, Shape] = {}

    def abstract(params: Any, args: tuple) -> None:
        given = plan.known, frozenset(), plan.lifts
        walk = evaluated(plan.apply, params, args, plan.has_aux, plan.explicit, None, *given)[2]
        check_calls(plan, walk.calls, n)
        found.update(walk.outputs)

    key = types_of(params, args)
    if key in plan.types:  # another program of the same step: the model is traced once less
        return plan.types[key]
    try:
        jax.eval_shape(abstract, params, args)
        _check_batches(plan, params, args)
    except ValueError as error:
        if OTHER in str(error) and (told := _differing(plan, params, args)):
            raise ValueError(f"{error}. Of what apply takes, {told}") from error
        raise
    if key is not None:
        plan.types[key] = found
    return found


def _check_batches(plan: Plan, params: Any, args: tuple) -> None:
    """ValueError where batches lie one behind the other and arrays have other shapes than planned: how many do may go
    by them, as with the steps of time that stand before the examples."""
    shapes = jax.eval_shape(lambda *both: both, params, args)
    here, planned = (
        [shape for shape, _ in x[1]] for x in (without_number(shapes[0], shapes[1], plan.batched), plan.example)
    )
    if here != planned and any(call.outer > 1 for call in plan.calls.values()):
        raise ValueError(f"{OTHER}, as apply joins rows of several batches along one axis")


def _differing(plan: Plan, params: Any, args: tuple) -> str:
    """Which arrays have another dtype than what was planned with, or another shape but for the number of examples; ""
    where none has."""
    shapes = jax.eval_shape(lambda *both: both, params, args)
    found = without_number(shapes[0], shapes[1], plan.batched)
    if found[0] != plan.example[0]:
        return "the trees have another structure"
    told = []
    paths = jax.tree_util.tree_leaves_with_path((params, *args))
    for (path, _), (shape, dtype), (planned, was) in zip(paths, found[1], plan.example[1], strict=True):
        place = path[0].idx  # of (params, *args)
        name = f"argument {place - 1} (params not counted)" if place else "params"
        name += jax.tree_util.keystr(path[1:])
        if dtype != was:
            told.append(f"{name} is {dtype} and was {was}: cast it, or plan with what the loop gives")
        if shape != planned:
            told.append(f"{name} has shape {shape}, examples not counted, and had {planned}")
    return "; ".join(told[:5])


def of_other_number(plan: Plan, params: Any, args: tuple) -> bool:
    """Whether a batch differs from what was planned with in the number of its examples alone."""
    shapes = jax.eval_shape(lambda *both: both, params, args)
    return plan.example == without_number(shapes[0], shapes[1], plan.batched)


def types_of(params: Any, args: tuple) -> Any:
    """What the types of the outputs of calls follow from; None where it cannot be looked up."""
    leaves, structure = jax.tree.flatten((params, args))
    key = structure, tuple(jax.typeof(x) for x in leaves)
    try:
        hash(key)
    except TypeError:  # a tree whose own class has data that are not hashable
        return None
    return key
