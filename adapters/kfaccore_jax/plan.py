"""What of a model can be captured: an abstract trace, the layers found, and a table that says why for each leaf."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from kfaccore import Block
from kfaccore_jax.batch import check_equations, check_rows, doubled, examples, joins_behind, settled, strong
from kfaccore_jax.calls import Call
from kfaccore_jax.interpret import run
from kfaccore_jax.layers import Layer, gathered
from kfaccore_jax.layout import Layout
from kfaccore_jax.meeting import as_calls
from kfaccore_jax.mesh import Shape
from kfaccore_jax.mixing import mixed
from kfaccore_jax.names import check_arrays, named, without_number
from kfaccore_jax.order import moved
from kfaccore_jax.ranges import ranged
from kfaccore_jax.tags import Param, Tag
from kfaccore_jax.tap import Tap
from kfaccore_jax.walk import Walk


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
) -> Plan:
    """Trace `apply(params, *args)` abstractly and find its layers; arrays or jax.ShapeDtypeStruct will do.

    apply     the prediction, an array with examples on its first axis; with `has_aux` a pair of it and anything
    batched   which of `args` hold examples, on the first axis of each of their arrays
    strict    ValueError naming each leaf that is not covered; otherwise such leaves keep their gradient
    explicit  follow no jaxpr: `apply` takes one more argument, a Tap, and calls it for each layer

    Capture the prediction, not the loss: a penalty on a parameter inside `apply` would make it uncovered.
    """
    check_arrays(params)
    n = examples(args, batched)
    shape = strong(jax.eval_shape(lambda p, a: (p, a), params, args))
    one = shape[1]
    if n == 1:  # an axis of one element looks like no axis
        one = doubled(one, batched)
        n = 2
    try:
        pairs = [traced(apply, shape[0], given, has_aux, explicit) for given in (one, doubled(one, batched))]
    except (TypeError, ValueError) as error:
        error.add_note(f"plan traces apply at {n} and {2 * n} examples on the first axis of arguments {batched}")
        raise
    walk = pairs[0][0]
    if walk.calls.keys() != pairs[1][0].calls.keys():
        raise ValueError("apply runs other layers at another batch size; need the same equations at any size")
    calls, refused, coupled = _placed(pairs[0], pairs[1], n)
    layers, table = gathered(params, calls, refused)
    rows = tuple(Row(*row) for row in table)
    missing = [f"{row.leaf} {row.shape}: {row.reason}" for row in rows if not row.covered]
    if strict and missing:
        raise ValueError("leaves that are not covered:\n" + "\n".join(missing))
    given = without_number(shape[0], shape[1], batched)
    return Plan(apply, layers, calls, walk.outputs, rows, batched, has_aux, explicit, coupled, given, n)


def _placed(one: tuple, two: tuple, n: int) -> tuple[dict[str, Call], dict[int, list[str]], bool]:
    """The calls with their batch axes, why leaves cannot be captured, and whether anything sums over examples; one,
    two: of `traced` at both sizes."""
    walk, data, jaxpr, shapes = one
    other, data2, second, shapes2 = two
    if jaxpr is not None:
        check_equations(jaxpr, second, n)
        jaxpr, second = ranged(jaxpr, second)
    minor = jaxpr is not None and joins_behind(jaxpr, second, len(shapes))
    check_rows(shapes, shapes2, n, minor)
    places = moved(jaxpr, second, len(shapes)) if jaxpr is not None else {}
    summed = mixed(jaxpr, second, len(shapes), n) if jaxpr is not None else set()
    calls = {}
    refused = dict(walk.leaks)
    for key, call in walk.calls.items():
        x = (data.get(key), data2.get(key))
        y = (walk.outputs[key], other.outputs[key])
        calls[key], why = settled(call, x, y, n, minor)
        calls[key] = replace(calls[key], mixed=key.partition("@")[0] + "@" * ("@" in key) in summed)
        name = places.get(key.split("@")[0])
        if name and not why and calls[key].batch is not None:
            why = f"{call.kind} on examples that {name} moves along the batch"
        if why:
            for leaf in {call.leaf, *([call.bias.leaf] if call.bias else [])}:
                refused.setdefault(leaf, []).append(why)
    return calls, refused, bool(summed)


def traced(apply: Callable, params: Any, args: tuple, has_aux: bool, explicit: bool) -> tuple[Walk, dict, Any, list]:
    """What one abstract evaluation finds: the walk, shapes of the inputs kept, the jaxpr (None if explicit), and the
    shapes of the prediction, its first outputs."""
    asked: frozenset[str] = frozenset()
    while True:
        found: list[Any] = []

        def abstract(params: Any, args: tuple, found: list = found, asked: frozenset[str] = asked) -> dict:
            pred, _, walk, jaxpr = evaluated(apply, params, args, has_aux, explicit, None, asked=asked)
            found[:] = [walk, jaxpr, [x.shape for x in jax.tree.leaves(pred)]]
            return walk.data

        data = jax.eval_shape(abstract, params, args)
        if found[0].late <= asked:
            return found[0], data, found[1], found[2]
        asked |= found[0].late


def evaluated(
    apply: Callable,
    params: Any,
    args: tuple,
    has_aux: bool,
    explicit: bool,
    probes: dict | None,
    known: frozenset[str] | None = None,
    asked: frozenset[str] = frozenset(),
) -> tuple[Any, Any, Walk, Any]:
    """(prediction, aux, walk, jaxpr) of `apply` with probes added to the outputs of its calls."""
    leaves, structure = jax.tree.flatten((params, args))
    count = len(jax.tree.leaves(params))
    walk = Walk(probes, known, asked)
    if explicit:
        out = apply(params, *args, Tap(walk, leaves[:count]))
        pred, aux = out if has_aux else (out, None)
        return pred, aux, walk, None

    def flat(*leaves: Any) -> Any:
        params, args = jax.tree.unflatten(structure, leaves)
        return apply(params, *args)

    closed, shape = jax.make_jaxpr(flat, return_shape=True)(*leaves)
    tags: list[Tag] = [Param(i, Layout.of(x.shape)) if followed(x) else None for i, x in enumerate(leaves[:count])]
    tags += [None] * (len(leaves) - count)
    count = jax.tree.structure(shape[0] if has_aux else shape).num_leaves
    derived = [i < count for i in range(len(closed.jaxpr.outvars))]
    outs, found = run(walk, closed, leaves, tags, derived)
    outs[:count] = as_calls(walk, -1, outs[:count], found[:count], "the output itself")
    out = jax.tree.unflatten(jax.tree.structure(shape), outs)
    pred, aux = out if has_aux else (out, None)
    _check_prediction(pred)
    return pred, aux, walk, closed


def _check_prediction(pred: Any) -> None:
    """TypeError for what draws cannot be taken of."""
    arrays = list(pred.values()) if isinstance(pred, dict) else [pred]
    if not arrays or not all(hasattr(x, "shape") for x in arrays):
        raise TypeError(
            f"apply gave a {type(pred).__name__}; need one array, a dict of arrays by head, or a pair of it and aux "
            f"with has_aux=True"
        )
    wrong = [str(x.dtype) for x in arrays if not jnp.issubdtype(x.dtype, jnp.floating)]
    if any("complex" in dtype for dtype in wrong):
        raise TypeError(
            f"apply gave a prediction of dtype {wrong[0]}; losses take real numbers: stack real and imaginary parts, "
            f"jnp.stack([f.real, f.imag], -1)"
        )
    if wrong:
        raise TypeError(f"apply gave a prediction of dtype {wrong[0]}; need a floating dtype")


def followed(x: Any) -> bool:
    """Whether a leaf can carry a gradient: of real numbers, one or more."""
    return bool(jnp.issubdtype(x.dtype, jnp.floating)) and 0 not in x.shape
