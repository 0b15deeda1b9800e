"""Indices that a jaxpr computes from numbers alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jax.extend.core import Literal

INDICES: dict[str, Callable[..., Any]] = {
    "lt": lambda a, b: a < b,
    "add": lambda a, b: a + b,
    "select_n": lambda which, *cases: cases[int(which)],
}


def folded(jaxpr: Any) -> Any:
    """The jaxpr with indices computed from literals alone as literals; jax 0.6 writes a[-1] so. Their equations stay:
    the others keep their places."""
    numbers: dict[Any, Literal] = {}
    eqns = []

    def known(atoms: Any) -> list[Any]:
        return [v if isinstance(v, Literal) else numbers.get(v, v) for v in atoms]

    for eqn in jaxpr.eqns:
        ins = known(eqn.invars)
        name = eqn.primitive.name
        if name in INDICES and all(isinstance(v, Literal) and v.aval.ndim == 0 for v in ins):
            aval = eqn.outvars[0].aval
            if np.dtype(aval.dtype).kind in "ib":
                value = INDICES[name](*(v.val for v in ins))
                numbers[eqn.outvars[0]] = Literal(np.asarray(value, aval.dtype)[()], aval)
        eqns.append(eqn.replace(invars=ins) if numbers else eqn)
    return jaxpr.replace(eqns=eqns, outvars=known(jaxpr.outvars)) if numbers else jaxpr
