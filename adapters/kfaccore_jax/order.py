"""Whether rows of an array belong to the examples in whose places they stand: equations that move examples along the
batch (sorted, gathered, reversed, shifted), followed forwards and backwards through a jaxpr at two batch sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax.extend.core import Literal

from kfaccore_jax.alive import alive, reached, within
from kfaccore_jax.batch import jaxprs
from kfaccore_jax.tags import PLACED

if TYPE_CHECKING:
    from kfaccore_jax.behind import Behind

_ALONG = {"sort": "dimension"} | dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), "axis")
Names = list[str]  # what moved each value, "" where nothing did


def grown(p: Any, q: Any) -> list[int]:
    """Axes that grow with the batch, from one value at two batch sizes."""
    pair = zip(p.aval.shape, q.aval.shape, strict=True)
    return [i for i, (a, b) in enumerate(pair) if a != b]


def moved(one: Any, two: Any, count: int, behind: Behind) -> dict[str, str]:
    """{place of an equation: primitive} of the equations, inner ones included, whose operands or results such a
    primitive moves, before or after them, on the way to one of the first `count` outputs. Joins and cuts of whole
    batches are none; what takes rows of several batches elsewhere is one. With "@" are those that move their operands
    themselves, with its number where it is one of those of a jaxpr within."""
    found: dict[str, str] = {}
    one = getattr(one, "jaxpr", one)
    two = getattr(two, "jaxpr", two)
    asked = [i < count for i in range(len(one.outvars))]
    _forwards(found, behind, (one, two), "", [""] * len(one.invars), asked)
    _backwards(found, behind, (one, two), "", [""] * len(one.outvars), asked)
    return found


def places(one: Any, two: Any, prefix: str) -> list[tuple[Any, Any, str]]:
    """Equations at both sizes with the place that the interpreter gives them."""
    found = []
    place = -1
    for p, q in zip(one.eqns, two.eqns, strict=True):
        place += p.primitive.name not in PLACED
        found.append((p, q, f"{prefix}{place}"))
    return found


def _followed(one: Any, two: Any, prefix: str, asked: list[bool]) -> list[tuple[Any, Any, str, list[bool]]]:
    """`places` of equations that a gradient goes through, with what is asked of the jaxpr within them."""
    live = alive(one, asked)
    pairs = [(*place, reached(place[0], live)) for place in places(one, two, prefix)]
    return [(p, q, key, within(p, flags)) for p, q, key, flags in pairs if any(flags)]


def _forwards(
    found: dict[str, str], behind: Behind, both: tuple[Any, Any], prefix: str, given: Names, asked: list[bool]
) -> Names:
    """Marks what stands behind a move; names for the outputs."""
    one, two = both
    why: dict[Any, str] = dict(zip(one.invars, given, strict=True))
    for p, q, key, flags in _followed(one, two, prefix, asked):
        before = _known(why, p.invars)
        name = next((w for w in before if w), "")
        if name:
            found.setdefault(key, name)
        bodies = inner(p, q)
        if bodies is not None:
            after = _forwards(found, behind, bodies, f"{key}.", before, flags)
            while (again := _turned(p, before, after)) != before:  # the next turn starts with what this one left
                before = again
                after = _forwards(found, behind, bodies, f"{key}.", before, flags)
            if p.params.get("length") != q.params.get("length"):  # turns are examples: within one nothing grows
                after = [w or name for w in after]
        else:
            name = ("" if key in behind.exact else _moves(p, q)) or name
            after = [name if grown(v, w) else "" for v, w in zip(p.outvars, q.outvars, strict=True)]
        if key in behind.lost:
            after = [behind.lost[key]] * len(after)
        why.update(zip(p.outvars, after, strict=True))
    return _known(why, one.outvars)


def _backwards(
    found: dict[str, str], behind: Behind, both: tuple[Any, Any], prefix: str, wanted: Names, asked: list[bool]
) -> Names:
    """Marks what a move comes after; names for the inputs."""
    one, two = both
    why: dict[Any, str] = {}
    _mark(why, one.outvars, wanted)
    for p, q, key, flags in reversed(_followed(one, two, prefix, asked)):
        after = _known(why, p.outvars)
        if key in behind.lost:
            after = [behind.lost[key]] * len(after)
        name = next((w for w in after if w), "")
        if name:
            found.setdefault(key, name)
        bodies = inner(p, q)
        if bodies is not None:
            ahead = _backwards(found, behind, bodies, f"{key}.", after, flags)
            while (again := _turned(p, after, ahead, back=True)) != after:
                after = again
                ahead = _backwards(found, behind, bodies, f"{key}.", after, flags)
            found |= {f"{key}@{i}": name for i, name in enumerate(ahead) if name}
            _mark(why, p.invars, ahead)
            continue
        name = ("" if key in behind.exact else _moves(p, q)) or name
        found |= {f"{key}@": name} if name else {}
        _mark(why, p.invars, [name if carries(v) else "" for v in p.invars])
    return _known(why, one.invars)


def _turned(eqn: Any, given: Names, found: Names, back: bool = False) -> Names:
    """What one turn of a scan is given, operands or (back) results, with the names of its carry after a turn."""
    if eqn.primitive.name != "scan":
        return given
    inside = slice(eqn.params["num_consts"], eqn.params["num_consts"] + eqn.params["num_carry"])
    outside = slice(0, eqn.params["num_carry"])
    here, there = (outside, inside) if back else (inside, outside)
    again = list(given)
    again[here] = [old or new for old, new in zip(given[here], found[there], strict=True)]
    return again


def _known(why: dict[Any, str], atoms: Any) -> Names:
    return [why.get(v, "") if not isinstance(v, Literal) else "" for v in atoms]


def _mark(why: dict[Any, str], atoms: Any, names: Names) -> None:
    for v, name in zip(atoms, names, strict=True):
        if name and not isinstance(v, Literal):
            why.setdefault(v, name)


def carries(v: Any) -> bool:
    """Whether a gradient goes through a value."""
    return bool(jnp.issubdtype(v.aval.dtype, jnp.inexact))


def inner(p: Any, q: Any) -> tuple[Any, Any] | None:
    """The jaxpr within an equation, at both sizes, whose operands and results are the equation's."""
    for name in ("jaxpr", "call_jaxpr"):
        if name in p.params and hasattr(p.params[name], "eqns"):
            one, two = (getattr(x.params[name], "jaxpr", x.params[name]) for x in (p, q))
            if len(one.invars) == len(p.invars) and len(one.outvars) == len(p.outvars):
                return one, two
    return None


def _moves(p: Any, q: Any) -> str:
    """The primitive's name where it puts examples into other places, else ""; of a branch or a loop what it holds."""
    name = p.primitive.name
    for one, two in zip(jaxprs(p), jaxprs(q), strict=True):
        if found := next((found for a, b in zip(one.eqns, two.eqns, strict=True) if (found := _moves(a, b))), ""):
            return found
    if not p.invars or isinstance(p.invars[0], Literal):
        return ""
    axes = grown(p.invars[0], q.invars[0])
    if name in _ALONG:
        return name if p.params[_ALONG[name]] in axes else ""
    if name == "top_k":
        return name if p.params.get("axis", p.invars[0].aval.ndim - 1) in axes else ""
    if name == "rev":
        return name if set(p.params["dimensions"]) & set(axes) else ""
    numbers = p.params.get("dimension_numbers")
    if name == "gather":
        return name if set(numbers.start_index_map) & set(axes) else ""
    if name.startswith("scatter"):
        return name if set(numbers.scatter_dims_to_operand_dims) & set(axes) else ""
    if name == "split":
        return name if p.params["axis"] in axes else ""
    if name == "concatenate":
        return name if p.params["dimension"] in grown(p.outvars[0], q.outvars[0]) else ""
    if name == "pad":
        return name if any(p.params["padding_config"][axis] != (0, 0, 0) for axis in axes) else ""
    if name in ("slice", "dynamic_slice"):
        out = q.outvars[0].aval.shape
        return name if any(q.invars[0].aval.shape[axis] != out[axis] for axis in axes) else ""
    return ""
