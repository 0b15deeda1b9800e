"""Methods that share coefficients: when they need no records, and what the shell multiplies output gradients by.

A method with `rests(hyper)` takes, in the steps it rests, a gradient whose output gradients went through its
`weighted`; it then needs no record. Under a rule that needs records and the true gradient none ever rests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kfaccore.xp.arrays import Array


def resting(pre: Any, state: Any) -> bool:
    """Whether every layer's method rests in the step to come of a Preconditioner."""
    names = [name for name, _ in state.blocks]
    return bool(names) and all(_rests(pre, name, pre.schedules.hyper(name, state.step)) for name in names)


def rows_at_solve(pre: Any, name: str, hyper: Any) -> bool:
    """Whether a layer's `solve` is given the newest record."""
    return bool(getattr(_method(pre, name), "rows_at_solve", False)) and not _rests(pre, name, hyper)


def own_gradients(pre: Any) -> bool:
    """Whether a method's records must hold the training loss's own output gradients, not sampled ones."""
    methods = pre.methods.values() if isinstance(pre.methods, Mapping) else [pre.methods]
    return any(getattr(method, "own_gradients", False) for method in methods)


def weighted(pre: Any, state: Any, g: Mapping[str, Array], ids: Array | None = None) -> dict[str, Array]:
    """Output gradients {layer: (batch, [positions,] d_out)} for the weight gradients of the step to come.

    A shell forms each layer's weight gradient from these and passes the unchanged ones on to earlier layers. They are
    `g` itself unless the layer's method rests. ids (batch,) are dataset positions, for methods that go by them.
    """
    found = dict(g)
    for name in g:
        hyper = pre.schedules.hyper(name, state.step)
        if _rests(pre, name, hyper):
            found[name] = _method(pre, name).weighted(state.layers[name], g[name], hyper, ids)
    return found


def _rests(pre: Any, name: str, hyper: Any) -> bool:
    method = _method(pre, name)
    return not pre.rule.needs_records and hasattr(method, "rests") and bool(method.rests(hyper))


def _method(pre: Any, name: str) -> Any:
    return pre.methods.get(name) if isinstance(pre.methods, Mapping) else pre.methods
