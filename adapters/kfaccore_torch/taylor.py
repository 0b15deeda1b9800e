"""Taylor coefficients through an MLP in PyTorch: a differential operator as weight sharing, one pullback on the slots.

Slots of a network of d inputs: value, d first derivatives, one second-order slot sum_ij c_ij d_ij z. Linear layers map
every slot by W, the bias enters the value alone; an activation s maps

    z -> s(z)      d_i z -> s' d_i z      D z -> s' D z + s'' sum_ij c_ij d_i z d_j z

Source: Dangel, Mueller & Zeinhofer 2024 (2405.15603), section 3. Cost: d + 2 ordinary passes and one backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kfaccore import Record

Derivatives = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
_SMOOTH: dict[type[nn.Module], Derivatives] = {}


def smooth(module: type[nn.Module]) -> Callable[[Derivatives], Derivatives]:
    """Registers value, first and second derivative of an activation module."""

    def register(derivatives: Derivatives) -> Derivatives:
        _SMOOTH[module] = derivatives
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


@smooth(nn.Softplus)
def _softplus(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    t = torch.sigmoid(z)
    return nn.functional.softplus(z), t, t * (1 - t)


@dataclass(frozen=True)
class Coefficients:
    """Slots of the prediction: value (batch, outputs), first (batch, d, outputs), second (batch, outputs) or None."""

    value: Tensor
    first: Tensor | None
    second: Tensor | None


def forward(model: nn.Sequential, x: Tensor, operator: Tensor | None) -> tuple[Coefficients, dict]:
    """Slots of the prediction at x (batch, d), and (rows, outputs) of every linear layer by name.

    operator   c (d, d); None propagates the value alone
    """
    batch, d = x.shape
    z, layers = x[:, None, :], {}
    if operator is not None:
        eye = torch.eye(d, dtype=x.dtype, device=x.device).expand(batch, d, d)
        z = torch.cat([z, eye, torch.zeros_like(z)], dim=1)
    bias = torch.zeros(z.shape[1], 1, dtype=x.dtype, device=x.device)
    bias[0] = 1
    for name, module in model.named_children():
        if isinstance(module, nn.Linear):
            rows = z if module.bias is None else torch.cat([z, bias.expand(batch, -1, 1)], dim=2)
            z = z @ module.weight.T if module.bias is None else z @ module.weight.T + bias * module.bias
            layers[name] = rows, z
        else:
            z = _bend(module, z, operator)
    if operator is None:
        return Coefficients(z[:, 0], None, None), layers
    return Coefficients(z[:, 0], z[:, 1:-1], z[:, -1]), layers


def capture(
    model: nn.Sequential,
    x: Tensor,
    residual: Callable[[Coefficients], Tensor],
    operator: Tensor | None = None,
) -> tuple[Tensor, dict[str, Record]]:
    """(r (batch,), {name: Record}) of one loss term; a record's g holds dr/d(slots), zeros where r ignores a slot.

    Raises ValueError or TypeError for shapes, dtypes and layers that do not fit, before anything is computed.
    """
    check(model, x, operator)
    u, layers = forward(model, x, operator)
    r = residual(u)
    if tuple(r.shape) != (x.shape[0],):
        raise ValueError(f"residual gave shape {tuple(r.shape)}; need one number a point, ({x.shape[0]},)")
    outputs = [z for _, z in layers.values()]
    grads = torch.autograd.grad(r.sum(), outputs, materialize_grads=True)
    pairs = zip(layers.items(), grads, strict=True)
    return r.detach(), {name: Record(rows.detach(), g, float(x.shape[0])) for (name, (rows, _)), g in pairs}


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


def _bend(module: nn.Module, z: Tensor, operator: Tensor | None) -> Tensor:
    if operator is not None and isinstance(module, nn.ReLU | nn.LeakyReLU | nn.Hardtanh):
        raise ValueError(
            f"{type(module).__name__} under a second-order operator: its second derivative is zero almost everywhere, "
            f"so the residual would not see the curvature of the network; use Tanh, SiLU or another smooth activation"
        )
    if type(module) not in _SMOOTH:
        raise TypeError(f"{type(module).__name__} has no derivatives here: register them with @smooth")
    value, s1, s2 = _SMOOTH[type(module)](z[:, 0])
    if operator is None:
        return value[:, None]
    first = z[:, 1:-1]
    square = torch.einsum("ij,biw,bjw->bw", operator, first, first)
    second = s1 * z[:, -1] + s2 * square
    return torch.cat([value[:, None], s1[:, None] * first, second[:, None]], dim=1)
