"""A model run by the interpreter of its jaxpr: abstractly, while it is planned, or with probes at its calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from kfaccore_jax.batch import examples
from kfaccore_jax.interpret import run
from kfaccore_jax.layout import Layout
from kfaccore_jax.lifted import Lifts, sunk
from kfaccore_jax.meeting import as_calls
from kfaccore_jax.tags import Param, Tag
from kfaccore_jax.tap import Tap
from kfaccore_jax.walk import Walk


def traced(
    apply: Callable, params: Any, args: tuple, has_aux: bool, explicit: bool, lifts: Lifts | None = None
) -> tuple[Walk, dict, Any, list]:
    """What one abstract evaluation finds: the walk, shapes of the inputs kept, the jaxpr (None if explicit), and the
    shapes of the prediction, its first outputs."""
    asked: frozenset[str] = frozenset()
    while True:
        found: list[Any] = []

        def abstract(params: Any, args: tuple, found: list = found, asked: frozenset[str] = asked) -> dict:
            pred, _, walk, jaxpr = evaluated(apply, params, args, has_aux, explicit, None, asked=asked, lifts=lifts)
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
    lifts: Lifts | None = None,
) -> tuple[Any, Any, Walk, Any]:
    """(prediction, aux, walk, jaxpr) of `apply` with probes added to the outputs of its calls."""
    leaves, structure = jax.tree.flatten((params, args))
    count = len(jax.tree.leaves(params))
    walk = Walk(probes, known, asked)
    if lifts is not None:
        walk.lifts = replace(lifts, n=examples(args, lifts.batched))
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
    outs[:count] = as_calls(walk, -1, outs[:count], sunk(walk, found[:count]), "the output itself")
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
