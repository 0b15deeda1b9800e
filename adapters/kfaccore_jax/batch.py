"""Which axis of a captured array is the batch, told from the same model traced at two batch sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest
from math import prod
from typing import Any

import jax

from kfaccore_jax.alive import alive, reached, within
from kfaccore_jax.calls import Call, View

LOST = -2  # in place of how many batches lie one behind the other: several did, and cannot be told apart any more


def doubled(args: tuple, batched: tuple[int, ...]) -> tuple:
    """`args` with twice the examples in the arguments `batched`, as shapes."""

    def double(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((2 * x.shape[0], *x.shape[1:]), x.dtype)

    return tuple(jax.tree.map(double, arg) if i in batched else arg for i, arg in enumerate(args))


def strong(tree: Any) -> Any:
    """A tree of arrays none of which has a weak type, as uint8 / 255.0 has: the equations of a model depend on it."""

    def one(x: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        return jax.lax.convert_element_type(x, x.dtype) if isinstance(x, jax.Array) and jax.typeof(x).weak_type else x

    return jax.tree.map(one, tree)


def examples(args: tuple, batched: tuple[int, ...]) -> int:
    """The batch size, the first axis of every array in the arguments `batched`."""
    leaves = [x for i in batched for x in jax.tree.leaves(args[i])]
    other = [type(x).__name__ for x in leaves if not hasattr(x, "shape")]
    if other:
        raise TypeError(
            f"arguments {batched} of apply (params not counted) hold a {other[0]}; need arrays with examples on their "
            f"first axis: pass what all examples share as another argument, and say batched= which hold examples"
        )
    sizes = {x.shape[0] if x.shape else None for x in leaves}
    if len(sizes) != 1 or None in sizes:
        raise ValueError(f"arguments {batched} of apply (params not counted) have first axes {sizes}; need one batch")
    return int(sizes.pop() or 0)


def check_rows(one: list, two: list, n: int, unseen: list[bool]) -> None:
    """ValueError where a prediction, of these shapes at n and 2 n examples, has not the rows of each example in turn on
    its first axis; `unseen` where it is not known that a joined axis has."""
    for a, b, minor in zip(one, two, unseen, strict=True):
        if not a or a[0] % n or tuple(b) != (2 * a[0], *a[1:]):
            raise ValueError(
                f"apply gave a prediction of shape {tuple(a)} for {n} examples and {tuple(b)} for {2 * n}; need the "
                f"examples on its first axis, (batch, *positions, outputs): give each example its own output, no mean "
                f"over the batch, and move its axis to the front{_compared(a, b)}"
            )
        if a[0] != n and minor:
            raise ValueError(
                f"apply gave a prediction of shape {tuple(a)} for {n} examples, and the model joins the batch axis "
                f"behind another one, so that whose rows they are cannot be seen: make it (batch, *positions, outputs)"
            )


def _compared(a: Any, b: Any) -> str:
    """What to do with a prediction (batch, batch), whose shapes at two batch sizes these are."""
    if len(a) != len(b) or sum(p != q for p, q in zip(a, b, strict=True)) < 2:
        return ""
    return (
        ". Where examples of a batch are compared with each other, as in contrastive losses, give embeddings, and "
        "pull draws of the logits back to them by jax.vjp: adapters/kfaccore_jax/examples/contrastive.py"
    )


def settled(
    call: Call, x: tuple[Any, Any], y: tuple[Any, Any], n: int, minor: bool, outer: tuple[int, int] = (0, 0)
) -> tuple[Call, str]:
    """The call with its batch axis, and why it cannot be captured ("" if it can). x, y: shapes at n and 2 n.

    minor   somewhere the model joins the batch axis behind another one, so a joined axis cannot be told apart
    outer   (batches one behind the other, the axis's size) where that is known, (LOST, 0) where it no longer is
    """
    views = [(call.y, y)] if call.kind in ("bias", "scale") else [(call.y, y), (call.x, x)]
    if all(one.shape == two.shape for _, (one, two) in views):
        return replace(call, batch=None), ""  # made once for all examples: what they share has one row of J
    places = []
    sizes = set()
    for view, (one, two) in views:
        grown = [i for i, (p, q) in enumerate(zip(one.shape, two.shape, strict=True)) if p != q]
        if not grown:
            return call, f"{call.kind} on data without a batch axis"
        if len(grown) > 1:
            return call, f"{call.kind} on {len(grown)} axes that grow with the batch"
        axis = _after(grown[0], view)
        if axis not in view.shared or two.shape[grown[0]] != 2 * one.shape[grown[0]] or one.shape[grown[0]] % n:
            return call, f"{call.kind} over the batch axis itself"
        sizes.add(one.shape[grown[0]])
        places.append(view.shared.index(axis))
    seen = outer[0] > 0 and sizes == {outer[1]}
    if outer[0] == LOST or (minor and not seen and sizes != {n}):
        return call, f"{call.kind} on a batch axis joined behind another one"
    if len(set(places)) > 1:
        return call, f"{call.kind} that moves the batch axis"
    return replace(call, batch=places[0], outer=outer[0] if seen else 1), ""


def check_equations(one: Any, two: Any, n: int) -> None:
    """ValueError where a model, here at n and 2 n examples, is not the same equations at both."""
    one = getattr(one, "jaxpr", one)
    two = getattr(two, "jaxpr", two)
    for p, q in zip_longest(one.eqns, two.eqns):
        names = [eqn.primitive.name if eqn is not None else "nothing" for eqn in (p, q)]
        bodies = [list(jaxprs(eqn)) if eqn is not None else [] for eqn in (p, q)]
        if names[0] != names[1] or len(bodies[0]) != len(bodies[1]):
            raise ValueError(
                f"apply is other equations at {n} examples than at {2 * n}: {names[0]} where there is {names[1]}, so "
                f"that they cannot be compared; plan with fewer examples (jax.random.permutation has more rounds from "
                f"1626 elements on), or make what depends on their number outside and pass it as an argument"
            )
        for a, b in zip(*bodies, strict=True):
            check_equations(a, b, n)


def joins_behind(one: Any, two: Any, count: int) -> bool:
    """Whether a jaxpr (here at two batch sizes) reshapes or concatenates the batch axis behind another axis, on the way
    to one of its first `count` outputs."""
    return _first_turn(one, two, count) != 0


def deals_out(one: Any, two: Any, count: int) -> bool:
    """Whether the first such reshape takes examples out to an axis before them, and so undoes none."""
    return _first_turn(one, two, count) < 0


def _first_turn(one: Any, two: Any, count: int) -> int:
    one = getattr(one, "jaxpr", one)
    two = getattr(two, "jaxpr", two)
    return next(_turned(one, two, [i < count for i in range(len(one.outvars))]), 0)


def _turned(one: Any, two: Any, asked: list[bool]) -> Iterator[int]:
    """`turns` of the equations that do, in their order, inner ones included, where a gradient of the outputs asked for
    goes through them."""
    live = alive(one, asked)
    for p, q in zip(one.eqns, two.eqns, strict=True):
        name = p.primitive.name
        flags = reached(p, live)
        if not p.invars or not any(flags):
            continue
        before = _grown(p.invars[0], q.invars[0])
        after = _grown(p.outvars[0], q.outvars[0])
        if name == "concatenate" and p.params["dimension"] in after:
            yield 1
        if name == "reshape" and before and after and (way := turns(p, before[0], after[0])):
            yield way
        for a, b in zip(jaxprs(p), jaxprs(q), strict=True):
            one_body, two_body = (getattr(x, "jaxpr", x) for x in (a, b))
            its = within(p, flags)
            every = [True] * len(one_body.outvars)  # a loop's condition has other results
            yield from _turned(one_body, two_body, its if len(its) == len(every) else every)


def turns(eqn: Any, before: int, after: int) -> int:
    """Whether a reshape puts elements of earlier axes into the axis of the batch (1), takes some out of it (-1), or
    leaves what stands before it (0)."""
    old = prod(eqn.invars[0].aval.shape[:before])
    new = prod(eqn.outvars[0].aval.shape[:after])
    return (old > new) - (old < new)


def _grown(p: Any, q: Any) -> list[int]:
    pair = zip(p.aval.shape, q.aval.shape, strict=True)
    return [i for i, (a, b) in enumerate(pair) if a != b]


def jaxprs(eqn: Any):
    """The jaxprs among an equation's parameters."""
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns"):
                yield item


def _after(axis: int, view: View) -> int:
    """Its number once `view.split` has divided an axis in two."""
    return axis + 1 if view.split and axis > view.split[0] else axis
