"""A network that solves a differential equation: residuals, losses of many steps at once, gradients, records.

loss = sum over terms of 1/(2 n) sum r^2. A record of a term holds the seeds' gradients g = dr/d(slots) of each dense
layer (one draw, type-2), so grad = sum over terms of (1/n) sum_b r_b g_b^T a_b and J v needs no framework.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import array_api_compat as aac
import numpy as np

from kfaccore import Record
from kfaccore_numpy import taylor
from kfaccore_numpy.activations import Tanh
from kfaccore_numpy.dense import Dense
from kfaccore_numpy.network import Params, Sequential
from kfaccore_numpy.pinn_problems import Problem
from kfaccore_numpy.taylor import Slots

Array = Any
Batch = Sequence[tuple[Array, Array]]  # (points, data) a term
_CHUNK = 1 << 16  # elements of one slot of the widest layer held at once without a tape


@dataclass(frozen=True)
class Captured:
    """Loss before the step, residuals a term, gradients and records (a tuple: one a term) of every layer."""

    loss: float
    residuals: tuple[Array, ...]
    grads: dict[str, Array]
    records: dict[str, tuple[Record, ...]]


@dataclass(frozen=True)
class PINN:
    """A problem and a network for it; batches are what `problem.sample` gives."""

    problem: Problem
    network: Sequential

    @classmethod
    def of(cls, problem: Problem, *widths: int) -> PINN:
        """Tanh layers of these widths and a linear output."""
        hidden = [layer for width in widths for layer in (Dense(width), Tanh())]
        return cls(problem, Sequential((problem.d,), (*hidden, Dense(1))))

    def init(self, seed: int = 0) -> Params:
        """Float64 parameters."""
        return self.network.init(np.random.default_rng(seed), np.float64)

    def residuals(self, params: Params, batch: Batch) -> tuple[Array, ...]:
        """r (..., points) of each term; leading axes of `params` are tried side by side, in chunks."""
        first = next(iter(params.values()))
        stack = int(np.prod(first.shape[:-2]))
        widest = max(block.d_out for block in self.network.blocks().values())
        size = max(1, _CHUNK // (stack * widest))
        found = []
        for term, (x, y) in zip(self.problem.terms, batch, strict=True):
            parts = []
            for i in range(0, x.shape[0], size):
                z = taylor.forward(self.network, params, x[i : i + size], term.slots, term.wanted)
                parts.append(term.residual(z, x[i : i + size], y[i : i + size]))
            found.append(aac.array_namespace(x).concat(parts, axis=-1))
        return tuple(found)

    def losses(self, params: Params, batch: Batch) -> Array:
        """Loss of each set of parameters along the leading axes of `params`; 0-d without."""
        total = 0.0
        for r in self.residuals(params, batch):
            total = total + 0.5 * aac.array_namespace(r).mean(r * r, axis=-1)
        return total

    def along(self, params: Params, updates: Params, steps: Array) -> Params:
        """params - step * updates for each of `steps` (k,), stacked."""
        return {name: W - steps[:, None, None] * updates[name] for name, W in params.items()}

    def capture(self, params: Params, batch: Batch) -> Captured:
        """One forward and one backward a term."""
        loss, residuals, grads, records = 0.0, [], {}, {}
        for term, (x, y) in zip(self.problem.terms, batch, strict=True):
            z, tape = taylor.record_forward(self.network, params, x, term.slots)
            r, n = term.residual(z, x, y), x.shape[0]
            g = taylor.backward(self.network, params, tape, term.seeds(z, x), term.slots)
            loss += 0.5 * float((r * r).sum()) / n
            residuals.append(r)
            for name, a in tape.inputs.items():
                records[name] = (*records.get(name, ()), term_record(a, g[name], n))
                grad = taylor_gradient(a, g[name], r / n)
                grads[name] = grads[name] + grad if name in grads else grad
        return Captured(loss, tuple(residuals), grads, records)

    def gradient(self, params: Params, batch: Batch) -> tuple[float, dict[str, Array]]:
        """Loss and gradients, for first-order optimisers."""
        found = self.capture(params, batch)
        return found.loss, found.grads

    def predict(self, params: Params, x: Array) -> Array:
        """u at x, (points,)."""
        return taylor.forward(self.network, params, x, Slots(self.problem.d)).value[..., 0]  # type: ignore[index]

    def errors(self, params: Params, x: Array) -> tuple[float, float]:
        """(relative, absolute) L2 error at the points x; the absolute one is the root mean square."""
        true = self.problem.solution(x)
        absolute = float(((self.predict(params, x) - true) ** 2).mean() ** 0.5)
        return absolute / float((true**2).mean() ** 0.5), absolute

    def batches(self, interior: int, boundary: int, every: int, seed: int) -> Iterator[Batch]:
        """The batch of each step: drawn anew every `every` steps, once if that is 0."""
        step, batch = 0, None
        while True:
            if batch is None or (every and step % every == 0):
                rng = np.random.default_rng([seed, step])
                batch = self.problem.sample(rng, interior, boundary)
            yield batch
            step += 1


def term_record(a: Array, g: Array, n: float) -> Record:
    """Record of slots-first arrays: a (slots, batch, d_in), g (slots, batch, d_out)."""
    xp = aac.array_namespace(a, g)
    return Record(xp.permute_dims(a, (1, 0, 2)), xp.permute_dims(g, (1, 0, 2)), float(n))


def taylor_gradient(a: Array, g: Array, weights: Array) -> Array:
    """sum over points and slots of weight g a^T: (d_out, d_in)."""
    xp = aac.array_namespace(a)
    weighted = xp.reshape(g * weights[None, :, None], (-1, g.shape[-1]))
    return weighted.T @ xp.reshape(a, (-1, a.shape[-1]))
