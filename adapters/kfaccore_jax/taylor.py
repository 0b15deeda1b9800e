"""Taylor coefficients through an MLP in JAX: a differential operator as weight sharing, one pullback on zero taps.

Slots of a network of d inputs: value, d first derivatives, one second-order slot sum_ij c_ij d_ij z. A dense layer maps
every slot by W, the bias (last column) enters the value alone; an activation s maps

    z -> s(z)      d_i z -> s' d_i z      D z -> s' D z + s'' sum_ij c_ij d_i z d_j z

Source: Dangel, Mueller & Zeinhofer 2024 (2405.15603), section 3. Cost: d + 2 ordinary passes and one backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
from jax import numpy as jnp

from kfaccore import Record
from kfaccore_jax.chain import chained, elementwise, own_points

Array = Any
_KINKED = (jax.nn.relu, jax.nn.relu6, jax.nn.leaky_relu, jax.nn.hard_tanh, jax.nn.hard_sigmoid, jnp.abs)


@dataclass(frozen=True)
class Coefficients:
    """Slots of the prediction: value (batch, outputs), first (batch, d, outputs), second (batch, outputs) or None."""

    value: Array
    first: Array | None
    second: Array | None


def derivatives(activation: Callable[[Array], Array], z: Array) -> tuple[Array, Array, Array]:
    """Value, first and second derivative of any elementwise function, by forward mode."""
    one = jnp.ones_like(z)

    def slope(y: Array) -> Array:
        return jax.jvp(activation, (y,), (one,))[1]

    s1, s2 = jax.jvp(slope, (z,), (one,))
    return activation(z), s1, s2


def forward(
    params: dict[str, Array],
    x: Array,
    operator: Array | None,
    activation: Callable[[Array], Array] = jnp.tanh,
    taps: dict[str, Array] | None = None,
    order: Sequence[str] | None = None,
) -> tuple[Coefficients, dict[str, Array]]:
    """Slots of the prediction at x (batch, d), and the input rows (batch, slots, d_in + 1) of every layer.

    params     {name: (d_out, d_in + 1)}, the bias as last column
    operator   c (d, d); None propagates the value alone
    taps       arrays added to the layers' outputs
    order      names of the layers, first to last. JAX sorts the names of a dict wherever it goes through jit, grad or
               an optimizer: without `order` that of a dict is taken where its names are not sorted, else that of names
               that count (dense_1, dense_2, ...), else the one that the widths leave; ValueError where they leave
               several
    """
    params = chained(params, x, order)
    batch, d = x.shape
    z = x[:, None, :]
    if operator is not None:
        eye = jnp.broadcast_to(jnp.eye(d, dtype=x.dtype), (batch, d, d))
        z = jnp.concatenate([z, eye, jnp.zeros_like(z)], axis=1)
    ones = jnp.zeros((batch, z.shape[1], 1), x.dtype).at[:, 0].set(1)
    rows: dict[str, Array] = {}
    for name, W in params.items():
        z = _bend(activation, z, operator) if rows else z
        rows[name] = jnp.concatenate([z, ones], axis=2)
        z = rows[name] @ W.T
        z = z if taps is None else z + taps[name]
    return _slots(z, operator), rows


def capture(
    params: dict[str, Array],
    x: Array,
    residual: Callable[[Coefficients], Array],
    operator: Array | None = None,
    activation: Callable[[Array], Array] = jnp.tanh,
    order: Sequence[str] | None = None,
) -> tuple[Array, dict[str, Record]]:
    """(r (batch,), {name: Record}) of one loss term; a record's g holds dr/d(slots), zeros where r ignores a slot.

    order   as in `forward`

    Raises ValueError or TypeError for shapes, dtypes and activations that do not fit, while tracing too. An activation
    that is not elementwise, and a residual of a point that sees other points, show in values: a ValueError, and where
    what they hold is traced, records of NaN, which methods answer with the code NONFINITE.
    """
    params = chained(params, x, order)
    check(params, x, operator)
    if operator is not None and activation in _KINKED:
        raise ValueError(
            "a piecewise linear activation under a second-order operator: its second derivative is zero almost "
            "everywhere, so the residual would not see the curvature of the network; use jnp.tanh or another smooth one"
        )
    count = 1 if operator is None else x.shape[1] + 2
    taps = {name: jnp.zeros((x.shape[0], count, W.shape[0]), x.dtype) for name, W in params.items()}

    def run(taps: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        u, rows = forward(params, x, operator, activation, taps, tuple(params))
        return _joined(u), rows

    z, pull, rows = jax.vjp(run, taps, has_aux=True)
    r, back = jax.vjp(lambda z: residual(_slots(z, operator)), z)
    if r.shape != x.shape[:1]:
        raise ValueError(f"residual gave shape {r.shape}; need one number a point, ({x.shape[0]},)")
    slots = own_points(back, r)
    for width in {W.shape[1] - 1 for W in list(params.values())[1:]}:
        slots = elementwise(activation, (x.shape[0], width), slots)
    g = pull(slots)[0]
    return r, {name: Record(rows[name], g[name], float(x.shape[0])) for name in params}


def check(params: dict[str, Array], x: Array, operator: Array | None) -> None:
    """ValueError or TypeError when points, operator and parameters do not belong together."""
    first = next(iter(params.values()))
    d = first.shape[1] - 1
    for (one, W), (two, V) in pairwise(params.items()):
        if V.shape[1] - 1 != W.shape[0]:
            raise ValueError(f"layer {two!r} takes {V.shape[1] - 1} numbers and {one!r} before it gives {W.shape[0]}")
    if x.ndim != 2 or x.shape[0] == 0 or x.shape[1] != d:
        raise ValueError(f"points have shape {x.shape}; need (points, {d}), at least one point")
    if operator is not None and operator.shape != (d, d):
        raise ValueError(f"operator has shape {operator.shape}; need {(d, d)}, or None for the value alone")
    dtypes = {"parameters": first.dtype, "points": x.dtype}
    dtypes |= {} if operator is None else {"operator": operator.dtype}
    if len(set(dtypes.values())) > 1:
        raise TypeError(f"dtypes differ: {', '.join(f'{name} {t}' for name, t in dtypes.items())}; need one dtype")


def _slots(z: Array, operator: Array | None) -> Coefficients:
    if operator is None:
        return Coefficients(z[:, 0], None, None)
    return Coefficients(z[:, 0], z[:, 1:-1], z[:, -1])


def _joined(u: Coefficients) -> Array:
    """The inverse of `_slots`."""
    if u.first is None or u.second is None:
        return u.value[:, None]
    return jnp.concatenate([u.value[:, None], u.first, u.second[:, None]], axis=1)


def _bend(activation: Callable[[Array], Array], z: Array, operator: Array | None) -> Array:
    value, s1, s2 = derivatives(activation, z[:, 0])
    if operator is None:
        return value[:, None]
    first = z[:, 1:-1]
    second = s1 * z[:, -1] + s2 * jnp.einsum("ij,biw,bjw->bw", operator, first, first)
    return jnp.concatenate([value[:, None], s1[:, None] * first, second[:, None]], axis=1)
