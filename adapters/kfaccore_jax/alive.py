"""Which values of a jaxpr a gradient of its prediction goes through: neither auxiliary results, nor what stands behind
`stop_gradient`, a comparison or an index, nor what is printed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Literal

from kfaccore_jax.tags import JITS, REMATS

_CONSTANT = {"stop_gradient", "floor", "ceil", "round", "sign"}  # results of which every derivative is zero


def alive(jaxpr: Any, outs: Sequence[bool]) -> set[Any]:
    """The variables of a jaxpr, not of those within, that the results flagged in `outs` have a derivative by."""
    found = {v for v, flag in zip(jaxpr.outvars, outs, strict=True) if flag and _derived(v)}
    for eqn in reversed(jaxpr.eqns):
        flags = reached(eqn, found)
        if any(flags):
            found |= _operands(eqn, flags)
    return found


def reached(eqn: Any, found: set[Any]) -> list[bool]:
    """Whether each result of an equation is among the variables, and has a derivative by its operands."""
    return [v in found and eqn.primitive.name not in _CONSTANT for v in eqn.outvars]


def within(eqn: Any, flags: list[bool]) -> list[bool]:
    """Of the jaxpr within an equation whose results have these flags, those of its own results: a scan's carry that
    the next turn asks for is asked for."""
    body = _body(eqn)
    if body is None:
        return [True] * len(flags)
    while eqn.primitive.name == "scan":
        known = alive(body, flags)
        turned = fed_back(flags, [v in known for v in body.invars], eqn.params["num_consts"], eqn.params["num_carry"])
        if turned == flags:
            break
        flags = turned
    return flags


def fed_back(outs: list[bool], ins: list[bool], consts: int, carries: int) -> list[bool]:
    """Flags of a scan's results with those of its carry as it goes in."""
    first = [a or b for a, b in zip(outs[:carries], ins[consts : consts + carries], strict=True)]
    return first + outs[carries:]


def _operands(eqn: Any, flags: list[bool]) -> set[Any]:
    """What the flagged results of an equation have a derivative by. A function with a rule of its own may have one by
    whatever it is given."""
    body = _body(eqn)
    if body is None:
        return {v for v in eqn.invars if _derived(v)}
    known = alive(body, within(eqn, flags))
    return {v for v, inner in zip(eqn.invars, body.invars, strict=True) if inner in known and _derived(v)}


def _body(eqn: Any) -> Any:
    """The jaxpr within an equation whose derivative is that of its equations, operand by operand; None without one."""
    if eqn.primitive.name not in JITS | REMATS | {"scan"}:
        return None
    closed = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
    return getattr(closed, "jaxpr", closed)


def _derived(v: Any) -> bool:
    """Whether there are derivatives by a value."""
    return not isinstance(v, Literal) and bool(jnp.issubdtype(v.aval.dtype, jnp.inexact))
