"""The training loop: one batch, one gradient, one update, with a first-order optimiser or a Preconditioner."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import array_api_compat as aac
import numpy as np

from kfaccore import Preconditioner, draw_noise, monte_carlo
from kfaccore_numpy.baselines import SGD, Adam

if TYPE_CHECKING:
    from kfaccore_numpy.network import Sequential

Array = Any


@dataclass(frozen=True)
class Progress:
    """After `step` updates: batch loss before the last one, training seconds, parameters, optimiser state, Info."""

    step: int
    loss: float
    seconds: float
    params: dict[str, Array]
    state: Any
    info: Any = None


def fit(
    network: Sequential,
    params: dict[str, Array],
    data: tuple[Array, Array],
    loss: Any,
    optimiser: SGD | Adam | Preconditioner,
    *,
    batch: int,
    steps: int,
    seed: int = 0,
    state: Any = None,
    start: int = 0,
) -> Iterator[Progress]:
    """Train in place on batches drawn with replacement; yields after every step, timing only the step itself.

    Batches and label draws are functions of (seed, step), so a run resumed at `start` with its state continues
    bit for bit. Evaluate between steps as long as you like: the clock is stopped.
    """
    x, y = data
    state = _initial(network, params, optimiser) if state is None else state
    seconds = 0.0
    for step in range(start, steps):
        rng = np.random.default_rng([seed, step])
        rows = aac.array_namespace(x).asarray(rng.integers(0, x.shape[0], batch))
        begun = time.perf_counter()
        f, tape = network.forward(params, x[rows, ...])
        target = y[rows, ...]
        n = loss.normaliser(f, target)
        g = network.backward(params, tape, loss.gradient(f, target))
        value = float(loss.value(f, target) / n)
        info = None
        if isinstance(optimiser, Preconditioner):
            state, info = _precondition(network, params, optimiser, state, (f, tape, g, float(n), loss, target), rng)
        else:
            optimiser.step(params, network.gradients(tape, g, float(n), factored=False), state, step)
        seconds += time.perf_counter() - begun
        yield Progress(step + 1, value, seconds, params, state, info)


def mean_loss(network: Sequential, params: dict[str, Array], data: tuple[Array, Array], loss: Any) -> float:
    """Mean loss over all of `data`."""
    f, _ = network.forward(params, data[0])
    return float(loss.value(f, data[1]) / loss.normaliser(f, data[1]))


def _initial(network: Sequential, params: dict[str, Array], optimiser: Any) -> Any:
    if isinstance(optimiser, Preconditioner):
        return optimiser.init(network.blocks(), next(iter(params.values())))
    return optimiser.init(params)


def _precondition(
    network: Sequential, params: dict[str, Array], pre: Preconditioner, state: Any, batch: tuple, rng: Any
) -> tuple[Any, Any]:
    """One preconditioned update in place; label draws come from the same generator as the batch."""
    f, tape, g, n, loss, target = batch
    records = None
    if pre.wants_records(state):
        noise = aac.array_namespace(f).asarray(draw_noise(loss, tuple(f.shape), 1, rng), dtype=f.dtype)
        draws = monte_carlo(loss, f, noise, target)
        records = network.records(tape, network.backward(params, tape, draws), n)
    updates, state, info = pre.step(state, records, network.gradients(tape, g, n))
    for name, update in updates.items():
        params[name] -= aac.array_namespace(update).reshape(update, params[name].shape)
    return state, info
