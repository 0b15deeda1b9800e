"""Taylor coefficients through an MLP, forwards and backwards: a differential operator as weight sharing.

Slots of a network of d inputs: the value z, its first derivatives d_i z, and one collapsed second-order slot
D z = sum_ij c_ij d_ij z with constant c. A dense layer maps every slot by W, the bias enters the value alone; an
activation s maps

    z -> s(z)      d_i z -> s' d_i z      D z -> s' D z + s'' sum_ij c_ij d_i z d_j z

The slots are the `shared` axis of a record. Arrays are (..., slots, batch, d); leading axes stack seeds backwards. The
first layer's derivative slots are the same for every point and are never multiplied out.
Source: Dangel, Mueller & Zeinhofer 2024 (2405.15603), section 3. Cost: d + 2 ordinary passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import array_api_compat as aac
import numpy as np

from kfaccore_numpy.activations import Activation
from kfaccore_numpy.dense import Dense
from kfaccore_numpy.equations.smooth import derivatives, refuse_kinks
from kfaccore_numpy.network import Params, Sequential

Array = Any


@dataclass(frozen=True)
class Slots:
    """Which coefficients are propagated for d inputs: the value, with `first` the gradient, with `second` also D.

    second   the matrix c as a tuple of rows; only its symmetric part counts
    """

    d: int
    first: bool = False
    second: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.second is not None and (np.shape(self.second) != (self.d, self.d) or not self.first):
            shape = np.shape(self.second)
            raise ValueError(f"second has shape {shape}, first is {self.first}; need {(self.d, self.d)} and first=True")

    @classmethod
    def laplacian(cls, d: int, coordinates: tuple[int, ...] | None = None) -> Slots:
        """The sum of d_ii over `coordinates` (default all)."""
        chosen = range(d) if coordinates is None else coordinates
        return cls.operator(np.diag([float(i in chosen) for i in range(d)]))

    @classmethod
    def operator(cls, c: Any) -> Slots:
        """sum_ij c_ij d_ij for a constant matrix c."""
        return cls(len(c), True, tuple(tuple(float(v) for v in row) for row in c))

    @property
    def count(self) -> int:
        """How many coefficients a point has."""
        return 1 + self.first * self.d + (self.second is not None)

    def contract(self, first: Array) -> Array:
        """sum_j c_ij d_j z for every i: (..., d, batch, width)."""
        c = np.asarray(self.second)
        c = (c + c.T) / 2
        if np.array_equal(c, np.eye(self.d)):
            return first
        xp = aac.array_namespace(first)
        if np.array_equal(c, np.diag(np.diag(c))):
            return first * xp.asarray(np.diag(c).copy(), dtype=first.dtype)[:, None, None]
        flat = xp.reshape(first, (*first.shape[:-2], -1))
        return xp.reshape(xp.asarray(c, dtype=first.dtype) @ flat, first.shape)


@dataclass(frozen=True)
class Coefficients:
    """Slots of an output: value (..., batch, d), first (..., d, batch | 1, d), second like value or None for zero."""

    value: Array
    first: Array | None = None
    second: Array | None = None


@dataclass(frozen=True)
class Bend:
    """What the reverse rule of one activation needs."""

    z: Coefficients
    slopes: list[Array]
    contracted: Array | None
    square: Array | None


@dataclass(frozen=True)
class TaylorTape:
    """Inputs of every dense layer (slots, batch, d_in + 1) by name, activations in order."""

    inputs: dict[str, Array]
    bends: list[Bend]


def forward(
    network: Sequential, params: Params, x: Array, slots: Slots, last: tuple[bool, bool, bool] | None = None
) -> Coefficients:
    """Slots of the prediction at x (batch, d).

    last   which of value, first and second of the last layer are wanted (default all): others are not computed
    """
    return _forward(network, params, x, slots, None, last or (True, True, True))


def record_forward(network: Sequential, params: Params, x: Array, slots: Slots) -> tuple[Coefficients, TaylorTape]:
    """As `forward`, with the tape `backward` and records need."""
    tape = TaylorTape({}, [])
    return _forward(network, params, x, slots, tape, (True, True, True)), tape


def backward(network: Sequential, params: Params, tape: TaylorTape, seeds: Array, slots: Slots) -> dict[str, Array]:
    """Gradients (..., slots, batch, d_out) of a scalar an example with respect to every dense layer's output slots.

    seeds   the same of the prediction, (..., slots, batch, outputs): zeros for slots the scalar does not use
    """
    names = list(tape.inputs)
    grads = {names[-1]: seeds}
    g = seeds
    for name, below, bend in zip(names[:0:-1], names[-2::-1], tape.bends[::-1], strict=True):
        g = _bend_back(bend, g @ params[name][:, :-1], slots)
        grads[below] = g
    return {name: grads[name] for name in names}


def _layers(network: Sequential) -> list[tuple[str, Activation | None]]:
    """(dense name, activation before it) of an MLP."""
    names = iter(network.blocks())
    pairs = []
    before = None
    for i, layer in enumerate(network.layers):
        if isinstance(layer, Activation) and i > 0 and before is None:
            before = layer
        elif isinstance(layer, Dense) and (i == 0) == (before is None):
            pairs.append((next(names), before))
            before = None
        else:
            raise TypeError(f"layer {i} is {layer}; Taylor rules need Dense, activation, Dense, ..., ending in Dense")
    if before is not None:
        raise TypeError(f"the network ends in {before}; Taylor rules need a last Dense layer")
    return pairs


def _forward(
    network: Sequential, params: Params, x: Array, slots: Slots, tape: TaylorTape | None, last: tuple[bool, bool, bool]
) -> Coefficients:
    pairs = _layers(network)
    if x.ndim != 2 or x.shape[1] != slots.d or network.inputs != (slots.d,):
        raise ValueError(
            f"x has shape {tuple(x.shape)} and the network takes {network.inputs}; need (batch, {slots.d})"
        )
    name = pairs[0][0]
    z = _first(params[name], x, slots)
    if tape is not None:
        tape.inputs[name] = _first_inputs(x, slots)
    for name, activation in pairs[1:]:
        assert activation is not None
        if slots.second is not None:
            refuse_kinks(activation)
        wanted = last if name == pairs[-1][0] else (True, True, True)
        rows, bend = _bend(activation, z, slots, wanted, tape is not None)
        z = _split(rows @ params[name][..., None, :, :].mT, slots, wanted)
        if tape is not None:
            tape.inputs[name] = rows
            tape.bends.append(bend)
    return z


def _first(W: Array, x: Array, slots: Slots) -> Coefficients:
    """The first dense layer: first derivatives are columns of W, the second-order slot is zero."""
    value = x @ W[..., :-1].mT + W[..., None, :, -1]
    first = W[..., :-1].mT[..., :, None, :] if slots.first else None
    return Coefficients(value, first)


def _first_inputs(x: Array, slots: Slots) -> Array:
    xp = aac.array_namespace(x)
    rows = xp.zeros((slots.count, x.shape[0], slots.d + 1), dtype=x.dtype, device=aac.device(x))
    rows[0, :, :-1] = x
    rows[0, :, -1] = 1.0
    for i in range(slots.d if slots.first else 0):
        rows[1 + i, :, i] = 1.0
    return rows


def _split(z: Array, slots: Slots, wanted: tuple[bool, bool, bool]) -> Coefficients:
    """The slots of (..., slots, batch, d) that were computed."""
    first = slice(int(wanted[0]), int(wanted[0]) + slots.d * (slots.first and wanted[1]))
    value = z[..., 0, :, :] if wanted[0] else None
    derivative = z[..., first, :, :] if slots.first and wanted[1] else None
    return Coefficients(value, derivative, z[..., -1, :, :] if slots.second is not None and wanted[2] else None)


def _bend(
    activation: Activation, z: Coefficients, slots: Slots, wanted: tuple[bool, bool, bool], reverse: bool
) -> tuple[Array, Bend]:
    """Input rows (..., slots, batch, d + 1) of the next dense layer; the ones column is 1 in the value slot only."""
    xp = aac.array_namespace(z.value)
    value, *slopes = derivatives(activation, z.value, slots.first + (slots.second is not None) + reverse)
    counts = (wanted[0], slots.d * (slots.first and wanted[1]), slots.second is not None and wanted[2])
    shape = (*z.value.shape[:-2], sum(map(int, counts)), *z.value.shape[-2:-1], z.value.shape[-1] + 1)
    rows = xp.empty(shape, dtype=z.value.dtype, device=aac.device(z.value))
    rows[..., -1] = 0.0
    if counts[0]:
        rows[..., 0, :, :-1] = value
        rows[..., 0, :, -1] = 1.0
    if counts[1]:
        rows[..., int(counts[0]) : int(counts[0]) + slots.d, :, :-1] = slopes[0][..., None, :, :] * z.first
    contracted = square = None
    if counts[2]:
        contracted = slots.contract(z.first)
        square = xp.sum(contracted * z.first, axis=-3)
        rows[..., -1, :, :-1] = slopes[1] * square
        if z.second is not None:
            rows[..., -1, :, :-1] += slopes[0] * z.second
    return rows, Bend(z, slopes, contracted, square)


def _bend_back(bend: Bend, g: Array, slots: Slots) -> Array:
    """Gradient of the activation's input slots from that of its output slots."""
    xp = aac.array_namespace(g)
    z = bend.z
    slopes = bend.slopes
    out = xp.empty_like(g)
    value = slopes[0] * g[..., 0, :, :]
    if slots.first:
        first = g[..., 1 : 1 + slots.d, :, :]
        value = value + slopes[1] * xp.sum(first * z.first, axis=-3)
        out[..., 1 : 1 + slots.d, :, :] = slopes[0] * first
    if slots.second is not None:
        top = g[..., -1, :, :]
        value = value + top * slopes[2] * bend.square
        if z.second is not None:
            value = value + top * slopes[1] * z.second
        out[..., 1 : 1 + slots.d, :, :] += 2.0 * (slopes[1] * top)[..., None, :, :] * bend.contracted
        out[..., -1, :, :] = slopes[0] * top
    out[..., 0, :, :] = value
    return out
