"""Evaluates a jaxpr equation by equation and follows parameter leaves through it.

Whatever no leaf enters is evaluated as it is, so derivative rules of the model's own functions are untouched; inner
jaxprs are entered only where a leaf goes in. Needs jax.core.eval_jaxpr and jax.extend.core, nothing private.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from kfaccore_jax.alive import alive, reached, within
from kfaccore_jax.indices import folded
from kfaccore_jax.joined import alike, concatenated
from kfaccore_jax.lifted import spread, sunk, with_each
from kfaccore_jax.meeting import as_calls, met
from kfaccore_jax.tags import (
    JITS,
    PLACED,
    REMATS,
    Joined,
    Lifted,
    Out,
    Param,
    Tag,
    arrays_in,
    moved,
    scaled,
    with_arrays,
)
from kfaccore_jax.walk import Walk


def run(
    walk: Walk, closed: Any, values: list[Any], tags: list[Tag], asked: Sequence[bool]
) -> tuple[list[Any], list[Tag]]:
    """Outputs of a closed jaxpr at `values`, and their tags. `asked` says which outputs are derived: leaves are not
    followed to where no gradient comes from."""
    jaxpr = folded(getattr(closed, "jaxpr", closed))
    live = alive(jaxpr, asked)
    env = dict(zip(jaxpr.constvars, getattr(closed, "consts", ()), strict=True))
    env.update(zip(jaxpr.invars, values, strict=True))
    known = dict(zip(jaxpr.invars, tags, strict=True))
    eqns = [eqn for eqn in jaxpr.eqns if any(reached(eqn, live))]
    atoms = [v for eqn in eqns for v in eqn.invars] + [v for v, flag in zip(jaxpr.outvars, asked, strict=True) if flag]
    uses = Counter(v for v in atoms if not isinstance(v, Literal))

    def value(v: Any) -> Any:
        return v.val if isinstance(v, Literal) else env[v]

    def tag_of(v: Any) -> Tag:
        tag = None if isinstance(v, Literal) or v not in live else known.get(v)
        return None if isinstance(tag, Out) and uses[v] > 1 else tag

    place = -1
    for eqn in jaxpr.eqns:
        # what only places an array is not counted: under shard_map and on meshes the same model has more of it
        place += eqn.primitive.name not in PLACED
        inputs = [value(v) for v in eqn.invars]
        flags = reached(eqn, live)
        if any(flags):
            outs, found = _equation(walk, jaxpr, place, eqn, inputs, [tag_of(v) for v in eqn.invars], flags)
        else:
            outs = _evaluate(jaxpr, eqn, inputs)
            found = [None] * len(flags)
        env.update(zip(eqn.outvars, outs, strict=True))
        known.update(zip(eqn.outvars, found, strict=True))
    found = [tag_of(v) if flag else None for v, flag in zip(jaxpr.outvars, asked, strict=True)]
    return [value(v) for v in jaxpr.outvars], found


def _equation(
    walk: Walk, jaxpr: Any, place: int, eqn: Any, inputs: list, tags: list[Tag], asked: list[bool]
) -> tuple[list, list[Tag]]:
    """Outputs and their tags."""
    name = eqn.primitive.name
    hot = [isinstance(tag, Param | Joined) for tag in tags]
    cold: list[Tag] = [None] * len(eqn.outvars)
    if name in JITS and any(tag is not None for tag in tags):
        return run(walk.inside(place, False), _inner(eqn), inputs, tags, asked)
    if name == "scan" and any(isinstance(tag, Param | Joined | Lifted) for tag in tags):
        return _scan(walk, place, eqn, inputs, tags, within(eqn, asked)), cold
    if any(isinstance(tag, Lifted) for tag in tags):
        inputs, tags, done = spread(walk, place, eqn, inputs, tags, lambda values: _evaluate(jaxpr, eqn, values))
        if done is not None:
            return done
    if any(hot) and name in REMATS:
        return _remat(walk, place, eqn, inputs, tags, asked)
    if any(hot) and any(jnp.iscomplexobj(v.aval) for v in (*eqn.invars, *eqn.outvars)):
        walk.leak(tags, f"complex {name}")  # rows of a record are real
        return _evaluate(jaxpr, eqn, inputs), cold
    if any(isinstance(tag, Joined) for tag in tags):
        done = _parts(walk, place, eqn, inputs, tags)
        if done is not None:
            return done
    first = tags[0] if tags else None
    if isinstance(first, Param | Out) and not any(hot[1:]) and (found := moved(eqn, first)) is not None:
        return _evaluate(jaxpr, eqn, inputs), found
    if (together := concatenated(eqn, inputs, tags)) is not None:
        return _evaluate(jaxpr, eqn, inputs), [together]
    done = _met(walk, jaxpr, place, eqn, inputs, tags)
    if done is not None:
        return done
    inputs = as_calls(walk, place, inputs, tags, name)
    return _evaluate(jaxpr, eqn, inputs), cold


def _met(walk: Walk, jaxpr: Any, place: int, eqn: Any, inputs: list, tags: list[Tag]) -> tuple[list, list[Tag]] | None:
    """Outputs and tags of an equation in which one leaf meets a number or data, as a rule has it."""
    at = [i for i, tag in enumerate(tags) if isinstance(tag, Param)]
    if len(at) != 1 or any(isinstance(tag, Joined) for tag in tags):
        return None
    tag = tags[at[0]]
    assert isinstance(tag, Param)
    if len(eqn.invars) == 2 and (new := scaled(eqn, tag, at[0], inputs[1 - at[0]])) is not None:
        return _evaluate(jaxpr, eqn, inputs), [new]
    outs = _evaluate(jaxpr, eqn, inputs)
    done = met(walk, place, eqn, inputs, tags, at[0], outs[0])
    return None if done is None else ([done[0]], [with_each(walk, done[1])])


def _parts(walk: Walk, place: int, eqn: Any, inputs: list, tags: list[Tag]) -> tuple[list, list[Tag]] | None:
    """An equation on concatenated leaves, done on each of them."""
    at = [i for i, tag in enumerate(tags) if isinstance(tag, Joined)]
    tag = tags[at[0]]
    assert isinstance(tag, Joined)
    found = alike(eqn, tag, at[0], inputs) if len(at) == 1 and not any(isinstance(t, Param) for t in tags) else None
    if found is None:
        return None
    function, args, axis = found
    closed = jax.make_jaxpr(function)(*args)
    given = [*tag.tags, *[None] * (len(args) - len(tag.tags))]
    outs, after = run(walk.beside(place), closed, args, given, [True] * len(closed.jaxpr.outvars))
    after = sunk(walk, after)
    whole = outs[0] if axis < 0 else jnp.concatenate(outs, axis)
    hot = [t for t in after if isinstance(t, Param)]
    return [whole], [Joined(axis, tuple(outs), tuple(hot)) if len(hot) == len(outs) else None]


def _evaluate(jaxpr: Any, eqn: Any, inputs: list[Any]) -> list[Any]:
    """One equation, with its source information, context and name stack."""
    if eqn.primitive.name.startswith("custom_"):  # rules of the model's own functions index constants by tracers
        inputs = [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in inputs]
    given = {v: x for v, x in zip(eqn.invars, inputs, strict=True) if not isinstance(v, Literal)}
    single = jaxpr.replace(constvars=[], invars=list(given), outvars=list(eqn.outvars), eqns=[eqn], effects=eqn.effects)
    return list(jax.core.eval_jaxpr(single, (), *given.values()))


def _inner(eqn: Any) -> Any:
    return eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]


def _remat(
    walk: Walk, place: int, eqn: Any, inputs: list, tags: list[Tag], asked: list[bool]
) -> tuple[list, list[Tag]]:
    """The inner jaxpr under jax.checkpoint again; inputs of its calls are kept, all else is recomputed."""
    seen: list[Any] = []

    def body(values: list, probes: dict) -> tuple[list, dict, list]:
        inner = walk.inside(place, True)
        inner.calls = dict(walk.calls)  # a bias within may be of a call before it
        inner.outputs = dict(walk.outputs)
        inner.probes = None if walk.probes is None else probes
        outs, found = run(inner, _inner(eqn), values, tags, asked)
        found = sunk(inner, found)
        seen[:] = inner, found
        return outs, inner.data, [arrays_in(tag) for tag in found]

    again = jax.checkpoint(body, policy=eqn.params["policy"], prevent_cse=eqn.params["prevent_cse"])
    outs, data, arrays = again(inputs, walk.probes_of(place))
    walk.absorb(seen[0], data)
    return outs, list(map(with_arrays, seen[1], arrays))


def _scan(walk: Walk, place: int, eqn: Any, inputs: list, tags: list[Tag], asked: list[bool]) -> list[Any]:
    """A leaf that is a constant of the scan is shared over its steps, one that is scanned over is stacked blocks."""
    closed = eqn.params["jaxpr"]
    p = eqn.params
    body_in = [v.aval.ndim for v in closed.jaxpr.invars]
    xs = sum(v.aval.ndim != n for v, n in zip(eqn.invars, body_in, strict=True))
    carries = sum(v.aval.ndim == w.aval.ndim for v, w in zip(eqn.outvars, closed.jaxpr.outvars, strict=True))
    consts = len(inputs) - xs - carries
    multiplied: list[Tag] = [t if isinstance(t, Param) and t.by is not None else None for t in tags]
    inputs = as_calls(walk, place, inputs, multiplied, "scan")  # what it was multiplied by is not known inside
    tags = [None if one is not None else tag for one, tag in zip(multiplied, tags, strict=True)]
    span = slice(consts, consts + carries)
    carried = [tag if consts <= i < consts + carries else None for i, tag in enumerate(tags)]
    inputs[span] = as_calls(walk, place, inputs, carried, "scan as its carry")[span]
    walk.leak([tag for tag in tags if isinstance(tag, Joined)], "scan")
    inner_tags: list[Tag] = [*(t if isinstance(t, Param | Lifted) else None for t in tags[:consts]), *[None] * carries]
    for tag in sunk(walk, tags[consts:])[carries:]:
        inner_tags.append(tag.row(walk.depth) if isinstance(tag, Param) else None)
    seen: list[Any] = []

    def body(carry: list, x: tuple) -> tuple[list, tuple]:
        inner = walk.inside(place, True)
        inner.depth = walk.depth + 1
        inner.probes = None if walk.probes is None else x[1]
        outs, found = run(inner, closed, [*inputs[:consts], *carry, *x[0]], inner_tags, asked)
        inner.leak(sunk(inner, found), "scan as its result")
        seen[:] = [inner]
        return outs[:carries], (outs[carries:], inner.data)

    rows = (inputs[consts + carries :], walk.probes_of(place))
    options = {name: p[name] for name in ("length", "reverse", "unroll")}
    last, (ys, data) = jax.lax.scan(body, inputs[consts : consts + carries], rows, **options)
    inner = seen[0]
    inner.calls = {key: call.within(walk.depth) for key, call in inner.calls.items()}
    inner.outputs = {key: y.stacked(p["length"]) for key, y in inner.outputs.items()}
    walk.absorb(inner, data)
    return [*last, *ys]
