"""Partial differential equations with known solutions, their samplers, and errors on held-out points.

An equation turns slots into residuals r (..., batch) with per-point data y, and gives seeds: dr/d(slots). Sign of
Poisson: r = Lap u + f for -Lap u = f. Time, where there is one, is input coordinate 0.
Source: Dangel, Mueller & Zeinhofer 2024 (2405.15603), experiments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import array_api_compat as aac
import numpy as np

from kfaccore_numpy.equations.taylor import Coefficients, Slots

Array = Any
Function = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Data:
    """u - y: boundary or initial values."""

    slots: Slots
    name = "boundary"
    wanted = (True, False, False)

    def residual(self, u: Coefficients, x: Array, y: Array) -> Array:
        """u - y."""
        return u.value[..., 0] - y  # type: ignore[index]

    def seeds(self, u: Coefficients, x: Array) -> Array:
        """Derivative of the residual by the coefficients: 1 in the value."""
        return _seeds(self.slots, x, value=1.0)


@dataclass(frozen=True)
class Poisson:
    """D u + y, D u the second-order slot."""

    slots: Slots
    name = "interior"
    wanted = (False, False, True)

    def residual(self, u: Coefficients, x: Array, y: Array) -> Array:
        """Laplacian of u, plus y."""
        return u.second[..., 0] + y  # type: ignore[index]

    def seeds(self, u: Coefficients, x: Array) -> Array:
        """Derivative of the residual by the coefficients: 1 in the Laplacian."""
        return _seeds(self.slots, x, second=1.0)


@dataclass(frozen=True)
class Heat:
    """d_t u - rate D u - y."""

    slots: Slots
    rate: float = 0.25
    name = "interior"
    wanted = (False, True, True)

    def residual(self, u: Coefficients, x: Array, y: Array) -> Array:
        """u_t - rate times the Laplacian of u, less y."""
        return u.first[..., 0, :, 0] - self.rate * u.second[..., 0] - y  # type: ignore[index]

    def seeds(self, u: Coefficients, x: Array) -> Array:
        """Derivative of the residual by the coefficients: 1 in u_t, -rate in the Laplacian."""
        g = _seeds(self.slots, x, second=-self.rate)
        g[1, ...] = 1.0
        return g


@dataclass(frozen=True)
class LogFokkerPlanck:
    """q_t - d/2 - grad q . x / 2 - |grad q|^2 - Lap q - y for the log-density q of dX = -X/2 dt + sqrt(2) dW.

    Non-linear: its seeds depend on the gradient of q.
    """

    slots: Slots
    name = "interior"
    wanted = (False, True, True)

    def residual(self, u: Coefficients, x: Array, y: Array) -> Array:
        """The equation of the logarithm of the density, less y."""
        slope = u.first[..., 0]  # type: ignore[index]
        space = slope[..., 1:, :]
        where = x[:, 1:].T
        xp = aac.array_namespace(slope)
        drift = xp.sum(space * (0.5 * where + space), axis=-2)
        return slope[..., 0, :] - 0.5 * (self.slots.d - 1) - drift - u.second[..., 0] - y  # type: ignore[index]

    def seeds(self, u: Coefficients, x: Array) -> Array:
        """Derivative of the residual by the coefficients, at these coefficients."""
        g = _seeds(self.slots, x, second=-1.0)
        g[1, ...] = 1.0
        g[2 : self.slots.d + 1, :, 0] = -0.5 * x[:, 1:].T - 2.0 * u.first[1:, :, 0]  # type: ignore[index]
        return g


def _seeds(slots: Slots, x: Array, value: float = 0.0, second: float = 0.0) -> Array:
    """(slots, batch, 1) with these constants in the value and the second-order slot."""
    xp = aac.array_namespace(x)
    g = xp.zeros((slots.count, x.shape[0], 1), dtype=x.dtype, device=aac.device(x))
    if slots.second is not None:
        g[-1, ...] = second
    g[0, ...] = value
    return g


@dataclass(frozen=True)
class Problem:
    """A box [low, high] of d inputs, the equation inside with data `source`, and the solution that fixes the boundary.

    boundary   from a generator and a number of points to points where the solution is given
    """

    name: str
    box: tuple[tuple[float, float], ...]
    equation: Any
    source: Function
    solution: Function
    boundary: Callable[[np.random.Generator, int, np.ndarray], np.ndarray]

    @property
    def d(self) -> int:
        """How many coordinates there are."""
        return len(self.box)

    @property
    def terms(self) -> tuple[Any, Any]:
        """The equation inside and the data outside."""
        return self.equation, Data(Slots(self.d))

    def inside(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Uniform points of the box, (count, d)."""
        low, high = np.asarray(self.box).T
        return rng.uniform(low, high, (count, self.d))

    def outside(self, x: Array) -> int:
        """How many points are not in the closed box; rounding is forgiven, NaN is not."""
        low, high = (aac.array_namespace(x).asarray(v, dtype=x.dtype) for v in zip(*self.box, strict=True))
        slack = 1e-6 * (high - low)
        inside = (x >= low - slack) & (x <= high + slack)
        return x.shape[0] - int(inside.all(-1).sum())

    def sample(self, rng: np.random.Generator, interior: int, boundary: int) -> tuple[tuple[Array, Array], ...]:
        """(points, data) of each term."""
        x = self.inside(rng, interior)
        b = self.boundary(rng, boundary, self.inside(rng, boundary))
        return (x, self.source(x)), (b, self.solution(b))


def faces(axes: tuple[int, ...], box: tuple, rng: np.random.Generator, count: int, x: np.ndarray) -> np.ndarray:
    """Points with one coordinate, drawn among `axes`, moved to an end of the box."""
    axis = rng.choice(axes, count)
    end = rng.integers(0, 2, count)
    x = x.copy()
    x[np.arange(count), axis] = np.asarray(box)[axis, end]
    return x


def start(rng: np.random.Generator, count: int, x: np.ndarray) -> np.ndarray:
    """Points at time 0."""
    x = x.copy()
    x[:, 0] = 0.0
    return x


def start_and_faces(axes: tuple[int, ...], box: tuple, rng: Any, count: int, x: np.ndarray) -> np.ndarray:
    """Half the points at time 0, half on faces in space."""
    half = count // 2
    return np.concatenate([start(rng, half, x[:half]), faces(axes, box, rng, count - half, x[half:])])


def _zero(x: np.ndarray) -> np.ndarray:
    return np.zeros(len(x))


def poisson(name: str, d: int, solution: Function, source: Function) -> Problem:
    """-Lap u = source on the unit cube with the values of `solution` on its faces."""
    box = ((0.0, 1.0),) * d
    return Problem(name, box, Poisson(Slots.laplacian(d)), source, solution, partial(faces, tuple(range(d)), box))


def heat(name: str, d: int, solution: Function) -> Problem:
    """u_t = Lap u / 4 on the unit cube of d space coordinates, times in [0, 1]."""
    box = ((0.0, 1.0),) * (d + 1)
    space = tuple(range(1, d + 1))
    sides = partial(start_and_faces, space, box)
    return Problem(name, box, Heat(Slots.laplacian(d + 1, space)), _zero, solution, sides)


def fokker_planck(name: str, d: int) -> Problem:
    """Log-density of an Ornstein-Uhlenbeck process from a standard normal: data at time 0 only."""

    def solution(x: np.ndarray) -> np.ndarray:
        variance = np.exp(-x[:, 0]) + 2.0 * (1.0 - np.exp(-x[:, 0]))
        return -0.5 * (x[:, 1:] ** 2).sum(1) / variance - 0.5 * d * np.log(2.0 * np.pi * variance)

    box = ((0.0, 1.0), *((-5.0, 5.0),) * d)
    equation = LogFokkerPlanck(Slots.laplacian(d + 1, tuple(range(1, d + 1))))
    return Problem(name, box, equation, _zero, solution, start)


def _waves(x: np.ndarray) -> np.ndarray:
    return np.sin(np.pi * x[:, 0]) * np.sin(np.pi * x[:, 1])


def _cosines(x: np.ndarray) -> np.ndarray:
    return np.cos(np.pi * x).sum(1)


_SADDLE = 1.34  # the root mean squares of these solutions, to which they are scaled
_BOWL = 33.47

PROBLEMS = {
    p.name: p
    for p in (
        poisson("poisson-2d", 2, _waves, lambda x: 2 * np.pi**2 * _waves(x)),
        poisson("poisson-5d", 5, _cosines, lambda x: np.pi**2 * _cosines(x)),
        poisson("poisson-10d", 10, lambda x: (x[:, ::2] * x[:, 1::2]).sum(1) / _SADDLE, _zero),
        poisson("poisson-100d", 100, lambda x: (x**2).sum(1) / _BOWL, lambda x: np.full(len(x), -200.0 / _BOWL)),
        heat("heat-1d", 1, lambda x: np.exp(-(np.pi**2) * x[:, 0] / 4) * np.sin(np.pi * x[:, 1])),
        heat("heat-4d", 4, lambda x: np.exp(-x[:, 0]) * np.sin(2 * x[:, 1:]).sum(1)),
        fokker_planck("fokker-planck-9d", 9),
    )
}
