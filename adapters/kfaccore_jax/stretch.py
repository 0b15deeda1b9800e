"""Whose positions they are: which calls' outputs get longer with which arrays, told from the model traced so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import jax

from kfaccore_jax.agreement import types_of
from kfaccore_jax.direction import directions
from kfaccore_jax.evaluate import evaluated
from kfaccore_jax.mesh import Shape

if TYPE_CHECKING:
    from kfaccore_jax.plan import Plan

MANY = 8  # arrays of one length up to which it is asked which of them go together
ROWS = ("bias", "scale")  # kinds of calls that may have a row of a table for each position
Axes = tuple[tuple[int, int], ...]  # of arrays, by their place among the leaves of (params, args)


@dataclass(frozen=True)
class Way:
    """Axes that the model takes at another length only together, and types of the calls' outputs where they are so.

    size, other   their length as it is, and as it was traced
    ours          whether arrays of examples have them; else tables of params alone
    order         which way they run at each place, as `directions` has it
    """

    size: int
    other: int
    ours: bool
    outputs: Mapping[str, Shape]
    order: dict[str, int]

    def stretches(self, before: Shape, key: str, axis: int) -> bool:
        """Whether an axis of a call's output is as much longer."""
        return self.outputs[key].shape[axis] * self.size == before.shape[axis] * self.other


def ways(plan: Plan, params: Any, args: tuple, axis: int, size: int) -> tuple[Way, ...]:
    """One for each set of arrays whose positions, `size` on their axis `axis`, are one and the same; () where the model
    does not run at twice nor at half the length, or too many arrays have it."""
    types = types_of(params, args)
    key = types, axis, size
    if types is None or key not in plan.ways:
        found = _found(plan, params, args, axis, size)
        if types is None:
            return found
        plan.ways[key] = found
    return plan.ways[key]


def _found(plan: Plan, params: Any, args: tuple, axis: int, size: int) -> tuple[Way, ...]:
    half = (size // 2,) if size > 2 and size % 2 == 0 else ()  # of one that broadcasts nothing is seen
    ours = _ours(plan, params, args)
    _, jaxpr = _traced(plan, params, args) or (None, None)
    for other in (2 * size, *half):
        for axes in _candidates(plan, params, args, axis, size):
            run = _Run(plan, params, args, size, other, frozenset((i, axis) for i in ours), jaxpr)
            whole = run.of(axes)
            if whole is not None:
                # one element broadcasts, so that all arrays seem to go alone
                return (whole,) if size == 1 or len(axes) == 1 else tuple(run.parted(axes, whole))
    return ()


def _ours(plan: Plan, params: Any, args: tuple) -> list[int]:
    """Places of the arrays that hold examples."""
    count = len(jax.tree.leaves(params))
    found = []
    for i, arg in enumerate(args):
        leaves = len(jax.tree.leaves(arg))
        if i in plan.batched:
            found += range(count, count + leaves)
        count += leaves
    return found


def _candidates(plan: Plan, params: Any, args: tuple, axis: int, size: int) -> list[Axes]:
    """Axes that may be the positions: that of arrays of examples; with tables that rows are added from; with the other
    axes of that length, as a mask (batch, positions, positions) has."""
    leaves = jax.tree.leaves((params, args))
    ours = [(i, k) for i in _ours(plan, params, args) for k, n in enumerate(leaves[i].shape) if k and n == size]
    first = tuple(one for one in ours if one[1] == axis)
    if not first:
        return []
    tables = {call.leaf for call in plan.calls.values() if call.batch is None or (call.kind in ROWS and call.ins)}
    also = tuple((i, leaves[i].shape.index(size)) for i in sorted(tables) if size in leaves[i].shape)
    return list(dict.fromkeys([first, (*first, *also), tuple(ours), (*ours, *also)]))


@dataclass(frozen=True)
class _Run:
    """Traces of the model with some axes, `size` long, of length `other`; axes in `ours` are of examples. `jaxpr` is
    that of the model as it is."""

    plan: Plan
    params: Any
    args: tuple
    size: int
    other: int
    ours: frozenset[tuple[int, int]]
    jaxpr: Any

    def of(self, axes: Axes) -> Way | None:
        """None where it does not run so."""
        leaves, structure = jax.tree.flatten((self.params, self.args))
        for i, k in axes:
            shape = list(leaves[i].shape)
            shape[k] = self.other
            leaves[i] = jax.ShapeDtypeStruct(tuple(shape), leaves[i].dtype)
        traced = _traced(self.plan, *jax.tree.unflatten(structure, leaves))
        if traced is None:
            return None
        order = {} if self.jaxpr is None else directions(self.jaxpr, traced[1], {i for i, _ in self.ours})
        return Way(self.size, self.other, not self.ours.isdisjoint(axes), traced[0], order)

    def parted(self, axes: Axes, whole: Way) -> Iterator[Way]:
        """The least sets of axes at which it runs: what runs with all and with some runs with the others."""
        left = list(axes)
        many = 1
        while 2 * many <= len(left):
            if many == 2 and len(left) > MANY:
                return
            sets: Sequence[Axes] = list(combinations(left, many))
            if 2 * many == len(left):  # the others are as many
                sets = [some for some in sets if left[0] in some]
            found = next(((some, way) for some in sets if (way := self.of(some)) is not None), None)
            if found is None:
                many += 1
                continue
            left = [one for one in left if one not in found[0]]
            yield found[1]
        if left:
            yield (whole if len(left) == len(axes) else self.of(tuple(left))) or whole


def _traced(plan: Plan, params: Any, args: tuple) -> tuple[Mapping[str, Shape], Any] | None:
    """Types of the calls' outputs, and the jaxpr, None where it is not followed; None where it does not run so."""
    found: dict[str, Shape] = {}
    jaxprs = []

    def abstract(params: Any, args: tuple) -> None:
        given = plan.known, frozenset(), plan.lifts
        *_, walk, jaxpr = evaluated(plan.apply, params, args, plan.has_aux, plan.explicit, None, *given)
        found.update(walk.outputs)
        jaxprs.append(jaxpr)

    try:
        jax.eval_shape(abstract, params, args)
    except Exception:  # whatever a model raises: asserts, and errors of its library, at a length that it does not take
        return None
    return (found, jaxprs[0]) if found.keys() == plan.calls.keys() else None
