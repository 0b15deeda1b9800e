"""A network that solves a differential equation: residuals, loss, gradients, records, errors.

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
from kfaccore_numpy.activations import Tanh
from kfaccore_numpy.dense import Dense
from kfaccore_numpy.equations import taylor
from kfaccore_numpy.equations.problems import Problem
from kfaccore_numpy.equations.taylor import Coefficients, Slots, TaylorTape
from kfaccore_numpy.network import Params, Sequential

Array = Any
Batch = Sequence[tuple[Array, Array]]  # (points, data) a term
_CHUNK = 1 << 18  # elements of all slots of the widest layer held at once without a tape


@dataclass(frozen=True)
class Captured:
    """Loss before the step, residuals a term, gradients and records (a tuple: one a term) of every layer."""

    loss: float
    residuals: tuple[Array, ...]
    grads: dict[str, Array]
    records: dict[str, tuple[Record, ...]]


@dataclass(frozen=True)
class Passed:
    """A forward of every term, as far as the backward needs it; `sizes` are the points of the whole batch."""

    loss: float
    residuals: tuple[Array, ...]
    outputs: tuple[Coefficients, ...]
    tapes: tuple[TaylorTape, ...]
    sizes: tuple[int, ...]


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
        """r (points,) of each term, in chunks of points that keep memory bounded."""
        widest = max(block.d_out for block in self.network.blocks().values())
        found = []
        for term, (x, y) in zip(self.problem.terms, batch, strict=True):
            parts = []
            size = max(1, _CHUNK // (widest * term.slots.count))
            for i in range(0, x.shape[0], size):
                z = taylor.forward(self.network, params, x[i : i + size], term.slots, term.wanted)
                parts.append(term.residual(z, x[i : i + size], y[i : i + size]))
            found.append(aac.array_namespace(x).concat(parts))
        return tuple(found)

    def loss(self, params: Params, batch: Batch) -> float:
        """The loss, without a gradient."""
        return sum(0.5 * float((r * r).mean()) for r in self.residuals(params, batch))

    def forward(self, params: Params, batch: Batch, sizes: tuple[int, ...] = ()) -> Passed:
        """The half of `capture` that gives the loss."""
        check(self.problem, params, batch)
        loss = 0.0
        residuals = []
        outputs = []
        tapes = []
        sizes = sizes or tuple(x.shape[0] for x, _ in batch)
        for term, (x, y), n in zip(self.problem.terms, batch, sizes, strict=True):
            z, tape = taylor.record_forward(self.network, params, x, term.slots)
            r = term.residual(z, x, y)
            loss += 0.5 * float((r * r).sum()) / n
            residuals.append(r)
            outputs.append(z)
            tapes.append(tape)
        return Passed(loss, tuple(residuals), tuple(outputs), tuple(tapes), sizes)

    def backward(self, params: Params, batch: Batch, passed: Passed) -> Captured:
        """The other half of `capture`, from a `forward` of the same parameters and batch."""
        grads = {}
        records = {}
        terms = zip(
            self.problem.terms, batch, passed.residuals, passed.outputs, passed.tapes, passed.sizes, strict=True
        )
        for term, (x, _), r, z, tape, n in terms:
            seeds = term.seeds(z, x)
            shape = (term.slots.count, x.shape[0], z.value.shape[-1])
            if seeds.shape != shape:
                raise ValueError(
                    f"seeds of the {term.name} term have shape {seeds.shape}; need (slots, points, outputs of the "
                    f"network) {shape}: a system of several outputs takes terms of its own, see problems.Term"
                )
            g = taylor.backward(self.network, params, tape, seeds, term.slots)
            for name, a in tape.inputs.items():
                records[name] = (*records.get(name, ()), term_record(a, g[name], x.shape[0]))
                grad = taylor_gradient(a, g[name], r / n)
                grads[name] = grads[name] + grad if name in grads else grad
        return Captured(passed.loss, passed.residuals, grads, records)

    def capture(self, params: Params, batch: Batch, sizes: tuple[int, ...] = ()) -> Captured:
        """One forward and one backward a term; `sizes` are those of the whole batch when this is a part of it."""
        return self.backward(params, batch, self.forward(params, batch, sizes))

    def parts(self, params: Params, batch: Batch, rows: int) -> Iterator[Captured]:
        """`capture` in parts of at most about `rows` points times slots, whose losses and gradients add up."""
        sizes = tuple(x.shape[0] for x, _ in batch)
        counts = [size * term.slots.count for size, term in zip(sizes, self.problem.terms, strict=True)]
        k = min(*sizes, -(-sum(counts) // rows))
        for i in range(k):
            cuts = [(i * size // k, (i + 1) * size // k) for size in sizes]
            part = [(x[lo:hi], y[lo:hi]) for (x, y), (lo, hi) in zip(batch, cuts, strict=True)]
            yield self.capture(params, part, sizes)

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

    def batches(self, interior: int, boundary: int, every: int, seed: int, start: int = 0) -> Iterator[Batch]:
        """The batch of each step from `start` on: drawn anew every `every` steps, once if that is 0."""
        step = start
        batch = None
        while True:
            if batch is None or (every and step % every == 0):
                drawn = step - step % every if every else 0
                batch = self.problem.sample(np.random.default_rng([seed, drawn]), interior, boundary)
            yield batch
            step += 1


def check(problem: Problem, params: Params, batch: Batch) -> None:
    """ValueError or TypeError when the batch does not belong to the problem and the parameters."""
    names = [term.name for term in problem.terms]
    if len(batch) != len(names):
        raise ValueError(
            f"the batch of {problem.name} has {len(batch)} sets of points; need {len(names)}: {', '.join(names)}. "
            f"Without boundary values the solution is not determined"
        )
    dtype = next(iter(params.values())).dtype
    for name, (x, y) in zip(names, batch, strict=True):
        if x.ndim != 2 or x.shape[0] == 0 or x.shape[1] != problem.d or tuple(y.shape) != (x.shape[0],):
            raise ValueError(
                f"the {name} points of {problem.name} have shape {tuple(x.shape)} and their data {tuple(y.shape)}; "
                f"need (points, {problem.d}) and (points,), at least one point"
            )
        if not x.dtype == y.dtype == dtype:
            raise TypeError(f"parameters are {dtype}, {name} points {x.dtype} and data {y.dtype}; need one dtype")
        outside = problem.outside(x)
        if outside:
            raise ValueError(f"{outside} of {x.shape[0]} {name} points are outside the domain {problem.box}")


def term_record(a: Array, g: Array, n: float) -> Record:
    """Record of slots-first arrays: a (slots, batch, d_in), g (slots, batch, d_out)."""
    xp = aac.array_namespace(a, g)
    return Record(xp.permute_dims(a, (1, 0, 2)), xp.permute_dims(g, (1, 0, 2)), float(n))


def taylor_gradient(a: Array, g: Array, weights: Array) -> Array:
    """sum over points and slots of weight g a^T: (d_out, d_in)."""
    xp = aac.array_namespace(a)
    weighted = xp.reshape(g * weights[None, :, None], (-1, g.shape[-1]))
    return weighted.T @ xp.reshape(a, (-1, a.shape[-1]))
