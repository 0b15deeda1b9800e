"""The core's gradients of a loss: of covered layers, Factored where that is cheaper, and of the rest."""

from __future__ import annotations

from typing import Any

import torch

import kfaccore as kf
from kfaccore.layers import Linear
from kfaccore_torch.bridge import detached, to_core
from kfaccore_torch.calls import Call
from kfaccore_torch.capture import Capture
from kfaccore_torch.draw import Batch
from kfaccore_torch.observe import Observed
from kfaccore_torch.places import Place, Together
from kfaccore_torch.rows import output_rows, rows
from kfaccore_torch.scaling import Scaler
from kfaccore_torch.step import Engine


def gradients(
    engine: Engine,
    value: torch.Tensor,
    seen: Capture,
    observed: Observed | None,
    batch: Batch,
    l2: dict[str, float],
    scaler: Scaler | None = None,
) -> tuple[dict[str, Any], tuple]:
    """The core's gradients of covered layers, Factored where that is cheaper, and those of the rest; of a `scaler`'s
    loss, and back."""
    whole = bool(l2) or engine.core.comm.world > 1
    resting = kf.own_gradients(engine.core) and not engine.due  # every weight gradient is then made of given rows
    if resting:
        heads = engine.objective.heads(batch.f)
        sight = engine.sight(seen, heads)
        observed = engine.observer.look(sight, engine.plan.layers, heads, batch.told)
    layers = engine.plan.layers
    calls = _placed(seen, observed)
    edges = {n: c[0] for n, c in calls.items() if resting or (not whole and _factors(layers[n].kind, c))}
    odd = [n for n in edges if resting and (len(calls[n]) > 1 or not isinstance(layers[n].kind, Linear))]
    if odd:
        raise ValueError(f"layers {odd} are not linear layers called once: give them another method than FNGD")
    dense = [(name, role, p) for name in layers if name not in edges for role, p in layers[name].parameters.items()]
    wanted = [c.edge for c, _ in edges.values()] + [p for *_, p in dense] + list(engine.plan.rest.values())
    found: Any = torch.autograd.grad(value if scaler is None else scaler.scaled(value), wanted, allow_unused=True)
    found = found if scaler is None else scaler.unscaled(found)
    grads: dict[str, Any] = {}
    for (name, (call, place)), g in zip(edges.items(), found[: len(edges)], strict=True):
        if g is not None:
            a = rows(layers[name], call, place, engine.namespace)
            g = call.of_parameter(detached(g))
            g = to_core(output_rows(layers[name], call, g, place), engine.namespace)
            if resting:
                ids = None if batch.ids is None else to_core(batch.ids, engine.namespace)
                g = kf.weighted(engine.core, engine.state, {name: g}, ids)[name]
            grads[name] = kf.Factored(a, g, 1.0)
    rest = found[len(edges) + len(dense) :]
    found = found[len(edges) :]
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for (name, role, p), g in zip(dense, found[: len(dense)], strict=True):
        if g is not None:
            tensors.setdefault(name, {})[role] = g + l2[name] * p.detach() if l2 else g
    for name, given in tensors.items():
        if len(given) == len(layers[name].parameters):
            grads[name] = engine.matrix(layers[name], given)
    return grads, tuple(rest)


def _placed(seen: Capture, observed: Observed | None) -> dict[str, list[tuple[Call, Place]]]:
    """The calls of each layer and where their rows stand; all together where nobody needs to know."""
    found: dict[str, list[tuple[Call, Place]]] = {}
    if observed is None:
        return {name: [(call, Together(call.rows)) for call in calls] for name, calls in seen.calls.items()}
    for (name, call), place in zip(observed.calls, observed.places(False), strict=True):
        found.setdefault(name, []).append((call, place))
    return found


def _factors(kind: Any, calls: list[tuple[Call, Place]]) -> bool:
    """Whether applying inverses to the rows is cheaper than to the gradient: one call with fewer rows than width."""
    if not isinstance(kind, Linear) or len(calls) != 1:
        return False
    call, place = calls[0]
    return place.mask() is None and call.x.numel() // kind.d_in < max(kind.d_in, kind.d_out)
