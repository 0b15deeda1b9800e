"""The global batch of several ranks: its loss, and its gradients from each rank's own."""

from __future__ import annotations

from typing import Any

import torch

from kfaccore_torch.step import Engine


def met(engine: Engine, value: float, grads: dict[str, Any], n: float) -> tuple[float, float, dict[str, Any]]:
    """Loss of the global batch, this rank's share of it, and its gradients, with zeros for layers that only others'
    examples reached, such as experts without tokens here."""
    comm = engine.core.comm
    if comm.world == 1:
        return value, 1.0, grads
    layers = engine.plan.layers
    own, value = _weighed(engine, n, value)
    told = [own, value, n, *(float(name in grads) for name in layers)]
    n, value, counts, *present = comm.all_reduce([torch.tensor(told, dtype=torch.float64)])[0].tolist()
    if counts <= 0:
        raise ValueError("no step was taken: no label of the batch counts on any rank; skip such a batch")
    whole = 1.0 if engine.objective.total else n
    met = {name: grads.get(name) for name, count in zip(layers, present, strict=True) if count}
    with engine.working():
        for name in (name for name, g in met.items() if g is None):
            zeros = {role: torch.zeros_like(p) for role, p in layers[name].parameters.items()}
            met[name] = engine.matrix(layers[name], zeros)
    return value / whole, own / whole, met


def summed(engine: Engine, grads: dict, rest: tuple, share: float) -> tuple[dict, tuple]:
    """Gradients of the global batch from ranks' means, of which this one has a `share`."""
    comm = engine.core.comm
    if comm.world == 1:
        return grads, rest
    pairs = zip(engine.plan.rest.values(), rest, strict=True)
    others = [torch.zeros_like(p) if g is None else g * share for p, g in pairs]
    with engine.working():
        summed, others = comm.all_reduce(({name: g * share for name, g in grads.items()}, others))
    return summed, tuple(others)


def mean(engine: Engine, value: float, n: float) -> float:
    """A loss of the global batch, from this rank's and its share n."""
    if engine.core.comm.world == 1:
        return value
    found = engine.core.comm.all_reduce([torch.tensor(_weighed(engine, n, value), dtype=torch.float64)])
    n, total = found[0].tolist()
    return total if engine.objective.total else total / n


def _weighed(engine: Engine, n: float, value: float) -> tuple[float, float]:
    """What a rank's loss weighs in that of all, and the loss times it; sums are added as they are."""
    if engine.objective.total:
        return 1.0, value
    return n, n * value if n else 0.0
