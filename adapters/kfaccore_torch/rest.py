"""Parameters without a Kronecker record as rows that all examples share, with a diagonal curvature of their own.

The row of a draw is its gradient with respect to the parameter, the sum over examples: for draws that are independent
of zero mean an example, Monte-Carlo ones or such with a random sign each, its square is the diagonal in the mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

import kfaccore as kf
from kfaccore_torch.calls import Call
from kfaccore_torch.kinds import Rest
from kfaccore_torch.plan import Plan
from kfaccore_torch.settle import Layer
from kfaccore_torch.unusual import unusual

WORDS = "diagonal, no products with other layers"


def filled(plan: Plan) -> Plan:
    """The plan with a layer for every parameter of real numbers that has none; `uncovered` still says why."""
    layers = {name: Layer(name, Rest(p.numel()), {"parameter": p}, {"parameter": name}, {}) for name, p in rest(plan)}
    others = {name: p for name, p in plan.rest.items() if name not in layers}
    return replace(plan, layers={**plan.layers, **layers}, rest=others)


def rest(plan: Plan) -> list[tuple[str, nn.Parameter]]:
    """Parameters that no layer of a plan has."""
    return [(name, p) for name, p in plan.rest.items() if not unusual(p)]


def with_method(core: kf.Preconditioner, layers: Mapping[str, Layer], method: kf.Diagonal | None) -> kf.Preconditioner:
    """The core with `method` for the layers that are rows all examples share."""
    names = [name for name, layer in layers.items() if isinstance(layer.kind, Rest)]
    if method is None or not names:
        return core
    if core.network is not None:
        raise ValueError(
            f"{core.network} takes all layers of the network, and {names} have no Kronecker record: pass "
            f"rest=torch.optim.Adam for them, or skip= patterns that leave them out of a Preconditioner"
        )
    given = core.methods
    known = given if isinstance(given, Mapping) else dict.fromkeys(layers, given)
    methods = {**known, **dict.fromkeys(names, method)}
    return replace(core, methods=methods)


def called(plan: Plan) -> list[tuple[str, Call]]:
    """What stands for the calls of such layers: the gradient of the parameter itself."""
    found = []
    for name, layer in plan.layers.items():
        if isinstance(layer.kind, Rest):
            found.append((name, _call(layer.parameters["parameter"])))
    return found


def _call(p: nn.Parameter) -> Call:
    shape = tuple(p.shape)

    def arrange(g: torch.Tensor) -> torch.Tensor:
        return g.reshape(*g.shape[: g.ndim - len(shape)], 1, -1)

    return Call(p.detach()[:0] if shape else p.detach()[None][:0], get_gradient_edge(p), shape, (1,), arrange=arrange)
