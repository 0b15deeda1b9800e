"""What of a model can be captured: an abstract trace, the layers found, and a table that says why for each leaf."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax

from kfaccore import Block
from kfaccore_jax.batch import LOST, check_equations, check_rows, doubled, examples, joins_behind, settled, strong
from kfaccore_jax.behind import SCRAMBLED, Behind, followed
from kfaccore_jax.calls import Call
from kfaccore_jax.evaluate import traced
from kfaccore_jax.layers import Layer, gathered
from kfaccore_jax.lifted import Lifts, followed_up, lifts_of
from kfaccore_jax.mesh import Shape, under
from kfaccore_jax.mixing import mixed
from kfaccore_jax.names import check_arrays, named, without_number
from kfaccore_jax.order import moved
from kfaccore_jax.ranges import ranged
from kfaccore_jax.walk import marked, place_of


@dataclass(frozen=True)
class Row:
    """One leaf: its path, shape, the kind of its layer, and why it has none ("" if it has)."""

    leaf: str
    shape: tuple[int, ...]
    kind: str
    reason: str
    note: str

    @property
    def covered(self) -> bool:
        """Whether the leaf has a block."""
        return not self.reason


@dataclass(frozen=True, eq=False)
class Plan:
    """How `apply(params, *args)` is captured; made by `plan`, hashable by identity, printed as the coverage table."""

    apply: Callable
    layers: tuple[Layer, ...]
    calls: dict[str, Call]
    outputs: dict[str, Any]
    table: tuple[Row, ...]
    batched: tuple[int, ...]
    has_aux: bool
    explicit: bool
    coupled: bool  # an example's output depends on other examples, as far as that is seen
    example: Any = field(default=None, repr=False)  # what it was planned with, but for how many
    count: int = 0  # examples that it was planned with
    types: dict[Any, dict[str, Shape]] = field(default_factory=dict, repr=False)  # of outputs, by types of arguments
    ways: dict[Any, tuple] = field(default_factory=dict, repr=False)  # so, what positions lengthen
    lifts: Lifts | None = None  # calls on shared rows that get a row an example

    @property
    def blocks(self) -> dict[str, Block]:
        """Sizes of the layers, as Preconditioner.init takes them."""
        return {layer.name: layer.block for layer in self.layers}

    @property
    def uncovered(self) -> tuple[str, ...]:
        """Leaves that can carry a gradient and have no layer."""
        return tuple(row.leaf for row in self.table if row.reason and not row.reason.startswith(("dtype ", "no ")))

    @property
    def shared(self) -> bool:
        """Whether something is measured by rows that several examples share."""
        return bool(self.uncovered) or any(call.batch is None or call.mixed for call in self.calls.values())

    @property
    def known(self) -> frozenset[str]:
        """Keys of the calls."""
        return frozenset(self.calls)

    def matrices(self, tree: Any) -> dict[str, Any]:
        """{layer: (blocks, d_out, d_in)} of a tree like params, the bias a last column."""
        leaves = named(tree)
        return {layer.name: layer.matrix(leaves) for layer in self.layers}

    def tree(self, like: Any, matrices: Mapping[str, Any]) -> Any:
        """`like`, a tree like params, with the elements of the layers in `matrices` replaced."""
        leaves = named(like)
        for layer in self.layers:
            if layer.name in matrices:
                leaves = layer.scatter(leaves, matrices[layer.name])
        return jax.tree.unflatten(jax.tree.structure(like), list(leaves.values()))

    def __str__(self) -> str:
        cells = [(r.leaf, str(r.shape), r.kind or "-", "NOT" if r.reason else "covered", r.note) for r in self.table]
        wide = [max((len(row[i]) for row in cells), default=0) for i in range(5)]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, wide, strict=True)).rstrip() for row in cells)


def plan(
    apply: Callable,
    params: Any,
    *args: Any,
    batched: tuple[int, ...] = (0,),
    has_aux: bool = False,
    strict: bool = False,
    explicit: bool = False,
    axis_name: str | tuple[str, ...] = (),
) -> Plan:
    """Trace `apply(params, *args)` abstractly and find its layers; arrays or jax.ShapeDtypeStruct will do.

    apply     the prediction, an array with examples on its first axis; with `has_aux` a pair of it and anything
    batched   which of `args` hold examples, on the first axis of each of their arrays
    strict    ValueError naming each leaf that is not covered; otherwise such leaves keep their gradient
    explicit  follow no jaxpr: `apply` takes one more argument, a Tap, and calls it for each layer
    axis_name of axes of shard_map or pmap that `apply` itself sums over, as BatchNorm with axis_name does: the plan is
              made outside of them

    Capture the prediction, not the loss: a penalty on a parameter inside `apply` would make it uncovered.
    """
    check_arrays(params)
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    try:
        return under(names, partial(_planned, apply, params, args, batched, has_aux, strict, explicit))
    except NameError as error:
        error.add_note("an axis of shard_map or pmap that apply sums over is not in force here: plan(axis_name=...)")
        raise


def _planned(
    apply: Callable,
    params: Any,
    args: tuple,
    batched: tuple[int, ...],
    has_aux: bool,
    strict: bool,
    explicit: bool,
) -> Plan:
    """`plan` where the axes are in force that `apply` names."""
    n = examples(args, batched)
    shape = strong(jax.eval_shape(lambda p, a: (p, a), params, args))
    one = shape[1]
    if n == 1:  # an axis of one element looks like no axis
        one = doubled(one, batched)
        n = 2

    def traces(lifts: Lifts | None = None) -> list[tuple]:
        return [traced(apply, shape[0], given, has_aux, explicit, lifts) for given in (one, doubled(one, batched))]

    try:
        pairs = traces()
    except (TypeError, ValueError) as error:
        error.add_note(f"plan traces apply at {n} and {2 * n} examples on the first axis of arguments {batched}")
        raise
    if pairs[0][0].calls.keys() != pairs[1][0].calls.keys():
        raise ValueError("apply runs other layers at another batch size; need the same equations at any size")
    found = _placed(pairs[0], pairs[1], n)
    lifts = lifts_of(pairs[0][2], pairs[1][2], found[0], batched)
    if lifts is not None:
        pairs, lifts = followed_up(traces, lifts)
        found = _placed(pairs[0], pairs[1], n)
    calls, refused, coupled = found
    walk = pairs[0][0]
    layers, table = gathered(params, calls, refused)
    rows = tuple(Row(*row) for row in table)
    missing = [f"{row.leaf} {row.shape}: {row.reason}" for row in rows if not row.covered]
    if strict and missing:
        raise ValueError("leaves that are not covered:\n" + "\n".join(missing))
    given = without_number(shape[0], shape[1], batched)
    return Plan(apply, layers, calls, walk.outputs, rows, batched, has_aux, explicit, coupled, given, n, lifts=lifts)


def _placed(one: tuple, two: tuple, n: int) -> tuple[dict[str, Call], dict[int, list[str]], bool]:
    """The calls with their batch axes, why leaves cannot be captured, and whether anything sums over examples; one,
    two: of `traced` at both sizes."""
    walk, data, jaxpr, shapes = one
    other, data2, second, shapes2 = two
    if jaxpr is not None:
        check_equations(jaxpr, second, n)
        jaxpr, second = ranged(jaxpr, second)
    minor = jaxpr is not None and joins_behind(jaxpr, second, len(shapes))
    behind = followed(jaxpr, second, len(shapes), n) if jaxpr is not None else Behind(n, results=[1] * len(shapes))
    check_rows(shapes, shapes2, n, [k > 1 or k == LOST or (minor and k != 1) for k in behind.results])
    places = moved(jaxpr, second, len(shapes), behind) if jaxpr is not None else {}
    summed = mixed(jaxpr, second, len(shapes), n, behind) if jaxpr is not None else set()
    calls = {}
    refused = dict(walk.leaks)
    for key, call in walk.calls.items():
        x = (data.get(key), data2.get(key))
        y = (walk.outputs[key], other.outputs[key])
        calls[key], why = settled(call, x, y, n, minor, behind.of(key))
        mixing = bool(marked(summed, key)) or behind.of(key)[0] == SCRAMBLED
        calls[key] = replace(calls[key], mixed=mixing)
        name = places.get(place_of(key)) or places.get(marked(places, key))
        if name and not why and calls[key].batch is not None:
            why = f"{call.kind} on examples that {name} moves along the batch"
        if why:
            for leaf in {call.leaf, *([call.bias.leaf] if call.bias else [])}:
                refused.setdefault(leaf, []).append(why)
    return calls, refused, bool(summed)
