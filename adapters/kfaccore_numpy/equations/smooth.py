"""Value and first three derivatives of activations, for networks under a differential operator.

`@smooth(MyActivation)` registers a generator function of z that yields the value, then the first, second and third
derivative; later ones are only computed when a rule asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from math import pi, sqrt
from typing import Any

import array_api_compat as aac

from kfaccore_numpy.activations import GELU, Activation, ReLU, Sigmoid, Tanh

Array = Any
Derivatives = Callable[[Array], Iterator[Array]]

_REGISTERED: dict[type[Activation], Derivatives] = {}


def smooth(activation: type[Activation]) -> Callable[[Derivatives], Derivatives]:
    """Registers a generator of (value, first, second, third derivative) for an activation."""

    def register(derivatives: Derivatives) -> Derivatives:
        _REGISTERED[activation] = derivatives
        return derivatives

    return register


def derivatives(activation: Activation, z: Array, order: int) -> list[Array]:
    """Value and the first `order` derivatives at z; TypeError for an activation nobody registered."""
    kind = type(activation)
    if kind not in _REGISTERED:
        raise TypeError(f"{kind.__name__} has no derivatives here: register value and three derivatives with @smooth")
    return list(islice(_REGISTERED[kind](z), order + 1))


def refuse_kinks(activation: Activation) -> None:
    """ValueError for an activation without a second derivative."""
    if isinstance(activation, ReLU):
        raise ValueError(
            "ReLU under a second-order operator: its second derivative is zero almost everywhere, so the residual "
            "would not see the curvature of the network at all; use Tanh, Sigmoid, GELU or another smooth activation"
        )


@smooth(Tanh)
def _tanh(z: Array) -> Iterator[Array]:
    t = aac.array_namespace(z).tanh(z)
    yield t
    slope = 1.0 - t * t
    yield slope
    yield -2.0 * t * slope
    yield slope * (4.0 - 6.0 * slope)


@smooth(Sigmoid)
def _sigmoid(z: Array) -> Iterator[Array]:
    t = 0.5 * (1.0 + aac.array_namespace(z).tanh(0.5 * z))
    yield t
    slope = t * (1.0 - t)
    yield slope
    yield slope * (1.0 - 2.0 * t)
    yield slope * (1.0 - 6.0 * slope)


@smooth(GELU)
def _gelu(z: Array) -> Iterator[Array]:
    """z/2 (1 + t) with t = tanh(w), w = k (z + c z^3).

    w1, w2, w3 and t1, t2, t3 are derivatives in z; s1 and s2 are those of tanh at w.
    """
    k = sqrt(2 / pi)
    c = 0.044715
    t = aac.array_namespace(z).tanh(k * (z + c * z**3))
    yield 0.5 * z * (1.0 + t)
    w1 = k * (1.0 + 3.0 * c * z * z)
    w2 = 6.0 * k * c * z
    w3 = 6.0 * k * c
    s1 = 1.0 - t * t
    t1 = s1 * w1
    yield 0.5 * (1.0 + t) + 0.5 * z * t1
    s2 = -2.0 * t * s1
    t2 = s2 * w1 * w1 + s1 * w2
    yield t1 + 0.5 * z * t2
    t3 = s1 * (4.0 - 6.0 * s1) * w1**3 + 3.0 * s2 * w1 * w2 + s1 * w3
    yield 1.5 * t2 + 0.5 * z * t3


@smooth(ReLU)
def _relu(z: Array) -> Iterator[Array]:
    xp = aac.array_namespace(z)
    zero = xp.zeros_like(z)
    yield xp.maximum(z, zero)  # which keeps NaN
    yield xp.astype(z > 0, z.dtype)
    yield zero
    yield zero
