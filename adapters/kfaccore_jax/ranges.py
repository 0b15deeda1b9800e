"""Gathers and scatters whose index along the examples is a range, as in h[jnp.arange(len(h)), last]: each example takes
from, or is written to, its own place. For what asks about examples they are written as batched along that axis."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from kfaccore_jax.order import grown
from kfaccore_jax.tags import JITS, REMATS


def _iota(p: dict) -> Any:
    line = np.arange(p["shape"][p["dimension"]])
    return line.reshape([-1 if i == p["dimension"] else 1 for i in range(len(p["shape"]))])


def _placed(p: dict, x: Any) -> Any:
    places = dict(zip(p["broadcast_dimensions"], x.shape, strict=True))
    return x.reshape([places.get(i, 1) for i in range(len(p["shape"]))])


_VALUES: dict[str, Callable[..., Any]] = {
    "iota": _iota,
    "broadcast_in_dim": _placed,
    "reshape": lambda p, x: x.reshape(p["new_sizes"]),
    "convert_element_type": lambda p, x: x,
    "lt": lambda p, a, b: a < b,
    "add": lambda p, a, b: a + b,
    "sub": lambda p, a, b: a - b,
    "mul": lambda p, a, b: a * b,
    "select_n": lambda p, which, *cases: np.choose(which.astype(int), cases),
}


class _Known:
    """Whole numbers that a jaxpr has from literals, ranges and constants alone; None for all else."""

    def __init__(self, jaxpr: Any, given: dict[Any, Callable[[], Any]]) -> None:
        self.made = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
        self.given = given

    def __call__(self, v: Any) -> Any:
        if v.aval.dtype.kind not in "ib":
            return None
        if isinstance(v, Literal):
            return np.asarray(v.val)
        if v in self.given:
            return self.given[v]()
        eqn = self.made.get(v)
        if eqn is None or eqn.primitive.name not in _VALUES:
            return None
        found = [self(x) for x in eqn.invars]
        if any(x is None for x in found):
            return None
        return np.broadcast_to(_VALUES[eqn.primitive.name](eqn.params, *found), v.aval.shape)

    def column(self, v: Any, k: int) -> Any:
        """Along its last axis."""
        eqn = None if isinstance(v, Literal) else self.made.get(v)
        if eqn is not None and eqn.primitive.name == "concatenate" and eqn.params["dimension"] == v.aval.ndim - 1:
            for part in eqn.invars:
                if k < part.aval.shape[-1]:
                    return self.column(part, k)
                k -= part.aval.shape[-1]
        whole = self(v)
        return None if whole is None else whole[..., k]


def ranged(one: Any, two: Any) -> tuple[Any, Any]:
    """Two jaxprs, of one model at two batch sizes, with such equations as batched ones; not to be run."""
    (first, consts), (second, more) = ((getattr(x, "jaxpr", x), getattr(x, "consts", ())) for x in (one, two))
    return _ranged(first, second, _constants(first, consts), _constants(second, more))


def _constants(jaxpr: Any, consts: Iterable[Any]) -> dict[Any, Callable[[], Any]]:
    def value(x: Any) -> Any:
        return None if isinstance(x, jax.core.Tracer) else np.asarray(x)

    return {v: lambda x=x: value(x) for v, x in zip(jaxpr.constvars, consts, strict=True)}


def _ranged(one: Any, two: Any, given: dict, also: dict) -> tuple[Any, Any]:
    known = _Known(one, given), _Known(two, also)
    pairs = [_within(p, q, known) for p, q in zip(one.eqns, two.eqns, strict=True)]
    return one.replace(eqns=[p for p, _ in pairs]), two.replace(eqns=[q for _, q in pairs])


def _within(p: Any, q: Any, known: tuple[_Known, _Known]) -> tuple[Any, Any]:
    """An equation at both sizes, and what is inside it."""
    name = p.primitive.name
    if name == "gather" or name.startswith("scatter"):
        return _batched(p, q, known)
    found: tuple[dict, dict] = {}, {}
    for key, a in p.params.items():
        b = q.params[key]
        several = isinstance(a, tuple | list) and len(a) > 0 and all(hasattr(x, "eqns") for x in a)
        if not several and not hasattr(a, "eqns"):
            continue
        done = [_inside(x, y, p, q, known) for x, y in (zip(a, b, strict=True) if several else [(a, b)])]
        for into, side in zip(found, zip(*done, strict=True), strict=True):
            into[key] = jax.tree.unflatten(jax.tree.structure(a), side) if several else side[0]
    if not found[0]:
        return p, q
    return p.replace(params=p.params | found[0]), q.replace(params=q.params | found[1])


def _inside(a: Any, b: Any, p: Any, q: Any, known: tuple[_Known, _Known]) -> tuple[Any, Any]:
    bodies = [getattr(x, "jaxpr", x) for x in (a, b)]
    given = [_constants(body, getattr(x, "consts", ())) for body, x in zip(bodies, (a, b), strict=True)]
    if p.primitive.name in JITS | REMATS:  # operands as they are
        for more, body, eqn, values in zip(given, bodies, (p, q), known, strict=True):
            more.update({v: lambda x=x, of=values: of(x) for v, x in zip(body.invars, eqn.invars, strict=True)})
    done = _ranged(*bodies, *given)
    if bodies[0] is a:
        return done
    return a.replace(jaxpr=done[0]), b.replace(jaxpr=done[1])


def _batched(p: Any, q: Any, known: tuple[_Known, _Known]) -> tuple[Any, Any]:
    numbers = p.params["dimension_numbers"]
    names = ("start_index_map", "collapsed_slice_dims", "start_indices_batching_dims")
    if p.primitive.name != "gather":
        names = ("scatter_dims_to_operand_dims", "inserted_window_dims", "scatter_indices_batching_dims")
    starts, dropped, paired = (tuple(getattr(numbers, name)) for name in names)
    examples, rows = (grown(p.invars[i], q.invars[i]) for i in (0, 1))
    if len(rows) != 1 or len(examples) != 1 or examples[0] not in starts:
        return p, q
    axis, row = examples[0], rows[0]
    for eqn, values in zip((p, q), known, strict=True):
        line = values.column(eqn.invars[1], starts.index(axis))
        if line is None or not _range(line, row, eqn.invars[0].aval.shape[axis]):
            return p, q
    new = {names[0]: tuple(i for i in starts if i != axis), names[1]: tuple(i for i in dropped if i != axis)}
    new |= {"operand_batching_dims": (*numbers.operand_batching_dims, axis), names[2]: (*paired, row)}
    changed = numbers._replace(**new)
    return tuple(eqn.replace(params=eqn.params | {"dimension_numbers": changed}) for eqn in (p, q))


def _range(line: Any, axis: int, size: int) -> bool:
    """Whether numbers are 0, 1, ... size - 1 along an axis, whatever the others."""
    if line.shape[axis] != size:
        return False
    return bool(np.all(line == np.arange(size).reshape([-1 if i == axis else 1 for i in range(line.ndim)])))
