"""Methods that share coefficients: when they need no records, and what the shell multiplies output gradients by.

A method with `rests(hyper)` takes, in the steps it rests, a gradient whose output gradients went through its
`weighted`; it then needs no record. So does a network-level method, whose `weighted` is on dicts. Under a rule that
needs records and the true gradient none ever rests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kfaccore.xp.arrays import Array


def resting(pre: Any, state: Any) -> set[str]:
    """Layers whose method rests in the step to come of a Preconditioner."""
    return {name for name, _ in state.blocks if _rests(pre, state, name)}


def own_gradients(pre: Any) -> bool:
    """Whether a method's records must hold the training loss's own output gradients, not sampled ones."""
    methods = pre.methods.values() if isinstance(pre.methods, Mapping) else [pre.methods]
    return any(getattr(method, "own_gradients", False) for method in (*methods, pre.network))


def weighted(pre: Any, state: Any, g: dict[str, Array], ids: Array | None = None) -> dict[str, Array]:
    """Output gradients {layer: (batch, [positions,] d_out)} for the weight gradients of the step to come.

    A shell forms each layer's weight gradient from these and passes the unchanged ones on to earlier layers. They are
    `g` itself unless a layer's method rests. ids (batch,) are dataset positions, for methods that go by them.
    """
    hypers = {name: pre.schedules.hyper(name, state.step) for name in g if _rests(pre, state, name)}
    ours, found = {name: g[name] for name in hypers if name not in state.layers}, {}
    for name in hypers.keys() - ours.keys():
        found[name] = _method(pre, state, name).weighted(state.layers[name], g[name], hypers[name], ids)
    found |= pre.network.weighted(state.network, ours, hypers, ids) if ours else {}
    return {name: found.get(name, x) for name, x in g.items()} if found else g


def _rests(pre: Any, state: Any, name: str) -> bool:
    method = _method(pre, state, name)
    if pre.rule.needs_records or not hasattr(method, "rests"):
        return False
    return bool(method.rests(pre.schedules.hyper(name, state.step)))


def _method(pre: Any, state: Any, name: str) -> Any:
    if name not in state.layers:
        return pre.network
    return pre.methods.get(name) if isinstance(pre.methods, Mapping) else pre.methods
