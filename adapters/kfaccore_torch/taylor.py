"""Taylor coefficients through an MLP in PyTorch: a differential operator as weight sharing, one pullback on the slots.

Slots of a network of d inputs: value, d first derivatives, one second-order slot sum_ij c_ij d_ij z. Linear layers map
every slot by W, the bias enters the value alone; an activation s maps

    z -> s(z)      d_i z -> s' d_i z      D z -> s' D z + s'' sum_ij c_ij d_i z d_j z

Source: Dangel, Mueller & Zeinhofer 2024 (2405.15603), section 3. Cost: d + 2 ordinary passes and one backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kfaccore import Record
from kfaccore_torch.children import Passed, compare, uses

Derivatives = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
_SMOOTH: dict[type[nn.Module], Callable[[Any, Tensor], tuple[Tensor, Tensor, Tensor]]] = {}


def smooth(module: type[nn.Module]) -> Callable[[Derivatives], Derivatives]:
    """Registers value, first and second derivative of an activation module."""

    def register(derivatives: Derivatives) -> Derivatives:
        _SMOOTH[module] = lambda _, z: derivatives(z)
        return derivatives

    return register


@smooth(nn.Tanh)
def _tanh(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    t = torch.tanh(z)
    slope = 1 - t * t
    return t, slope, -2 * t * slope


@smooth(nn.Sigmoid)
def _sigmoid(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    t = torch.sigmoid(z)
    slope = t * (1 - t)
    return t, slope, slope * (1 - 2 * t)


@smooth(nn.SiLU)
def _silu(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    t = torch.sigmoid(z)
    s1 = t * (1 - t)
    s2 = s1 * (1 - 2 * t)
    return z * t, t + z * s1, 2 * s1 + z * s2


def _softplus(module: nn.Softplus, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    t = torch.sigmoid(module.beta * z)
    return module(z), t, module.beta * t * (1 - t)


_SMOOTH[nn.Softplus] = _softplus


@dataclass(frozen=True)
class Coefficients:
    """Slots of the prediction: value (batch, outputs), first (batch, d, outputs), second (batch, outputs) or None."""

    value: Tensor
    first: Tensor | None
    second: Tensor | None


def forward(model: nn.Sequential, x: Tensor, operator: Tensor | None) -> tuple[Coefficients, list[Passed]]:
    """Slots of the prediction at x (batch, d), and what passed each child, in order; one used again is there again.

    operator   c (d, d); None propagates the value alone
    """
    batch, d = x.shape
    z = x[:, None, :]
    if operator is not None:
        eye = torch.eye(d, dtype=x.dtype, device=x.device).expand(batch, d, d)
        z = torch.cat([z, eye, torch.zeros_like(z)], dim=1)
    bias = torch.zeros(z.shape[1], 1, dtype=x.dtype, device=x.device)
    bias[0] = 1
    passed = []
    for name, module in model._modules.items():  # named_children leaves out one that is there again
        if isinstance(module, nn.Linear):
            rows = z if module.bias is None else torch.cat([z, bias.expand(batch, -1, 1)], dim=2)
            z = z @ module.weight.T if module.bias is None else z @ module.weight.T + bias * module.bias
        else:
            rows = z
            z = _bend(module, z, operator)
        z = z if z.requires_grad else z.requires_grad_()  # of frozen layers: a record is of outputs, not of parameters
        passed.append(Passed(name, module, rows, z))
    return _slots(z, operator), passed


def capture(
    model: nn.Sequential,
    x: Tensor,
    residual: Callable[[Coefficients], Tensor],
    operator: Tensor | None = None,
) -> tuple[Tensor, dict[str, Record]]:
    """(r (batch,), {name: Record}) of one loss term; a record's g holds dr/d(slots), zeros where r ignores a slot.

    A layer used again has one record, of the name of its first use: its uses are further shared positions. Once for
    each model and residual, and again when the model's children or hooks change, what the rules say is compared with
    model(x), and r is asked whether it sees other points.

    Raises ValueError or TypeError for shapes, dtypes and layers that do not fit, before anything is computed, for a
    model that computes something else than its children one after the other, and for a residual of several points.
    """
    check(model, x, operator)
    with torch.enable_grad():
        _, passed = forward(model, x, operator)
        z = passed[-1].z
        leaf = z.detach().requires_grad_()
        r = residual(_slots(leaf, operator))
        if tuple(r.shape) != (x.shape[0],):
            raise ValueError(f"residual gave shape {tuple(r.shape)}; need one number a point, ({x.shape[0]},)")
        compare(model, x, passed, lambda module, z: _SMOOTH[type(module)](module, z), residual, leaf, r)
        slots = torch.autograd.grad(r.sum(), leaf, materialize_grads=True)
        layers = uses(passed)
        every = [use for found in layers.values() for use in found]
        outputs = [use.z for use in every]
        g = dict(zip(map(id, outputs), torch.autograd.grad(z, outputs, slots, materialize_grads=True), strict=True))
    records = {}
    for name, found in layers.items():
        rows = torch.cat([use.rows.detach() for use in found], dim=1)
        records[name] = Record(rows, torch.cat([g[id(use.z)] for use in found], dim=1), float(x.shape[0]))
    return r.detach(), records


def check(model: nn.Sequential, x: Tensor, operator: Tensor | None) -> None:
    """ValueError or TypeError when points, operator and parameters do not belong together."""
    layers = [m for m in model.children() if isinstance(m, nn.Linear)] if isinstance(model, nn.Sequential) else []
    if not layers:
        raise TypeError(f"the model is {type(model).__name__}; Taylor rules need nn.Sequential(nn.Linear, ...)")
    d = layers[0].in_features
    if x.ndim != 2 or x.shape[0] == 0 or x.shape[1] != d:
        raise ValueError(f"points have shape {tuple(x.shape)}; need (points, {d}), at least one point")
    if operator is not None and tuple(operator.shape) != (d, d):
        raise ValueError(f"operator has shape {tuple(operator.shape)}; need {(d, d)}, or None for the value alone")
    dtypes = {"parameters": layers[0].weight.dtype, "points": x.dtype}
    dtypes |= {} if operator is None else {"operator": operator.dtype}
    if len(set(dtypes.values())) > 1:
        raise TypeError(f"dtypes differ: {', '.join(f'{name} {t}' for name, t in dtypes.items())}; need one dtype")


def _slots(z: Tensor, operator: Tensor | None) -> Coefficients:
    if operator is None:
        return Coefficients(z[:, 0], None, None)
    return Coefficients(z[:, 0], z[:, 1:-1], z[:, -1])


def _bend(module: nn.Module, z: Tensor, operator: Tensor | None) -> Tensor:
    if operator is not None and isinstance(module, nn.ReLU | nn.LeakyReLU | nn.Hardtanh):
        raise ValueError(
            f"{type(module).__name__} under a second-order operator: its second derivative is zero almost everywhere, "
            f"so the residual would not see the curvature of the network; use Tanh, SiLU or another smooth activation"
        )
    if type(module) not in _SMOOTH:
        raise TypeError(f"{type(module).__name__} has no derivatives here: register them with @smooth")
    value, s1, s2 = _SMOOTH[type(module)](module, z[:, 0])
    if operator is None:
        return value[:, None]
    first = z[:, 1:-1]
    square = torch.einsum("ij,biw,bjw->bw", operator, first, first)
    second = s1 * z[:, -1] + s2 * square
    return torch.cat([value[:, None], s1[:, None] * first, second[:, None]], dim=1)
