"""The training loop: one batch, one gradient, one update, with a first-order optimiser or a Preconditioner."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import array_api_compat as aac
import numpy as np

from kfaccore import Preconditioner, draw_noise, monte_carlo
from kfaccore_numpy.baselines import SGD, Adam

if TYPE_CHECKING:
    from kfaccore_numpy.network import Sequential, Tape

Array = Any
Params = dict[str, Any]
Fisher = Callable[..., Params]


@dataclass(frozen=True)
class Batch:
    """A prediction, its target and their loss."""

    f: Array
    target: Array
    loss: Any


@dataclass(frozen=True)
class Progress:
    """After `step` updates: batch loss before the last one, training seconds, parameters, optimiser state, Info."""

    step: int
    loss: float
    seconds: float
    params: dict[str, Array]
    state: Any
    info: Any = None


def sampled(network: Sequential, params: Params, tape: Tape, batch: Batch, g: Params, rng: Any) -> Params:
    """Output gradients of one Monte-Carlo draw of labels from the model: one more backward without weights."""
    noise = aac.array_namespace(batch.f).asarray(draw_noise(batch.loss, tuple(batch.f.shape), 1, rng))
    return network.backward(params, tape, monte_carlo(batch.loss, batch.f, noise, batch.target))


def true_labels(network: Sequential, params: Params, tape: Tape, batch: Batch, g: Params, rng: Any) -> Params:
    """The empirical Fisher: the training loss's own output gradients."""
    return g


def step(
    network: Sequential,
    params: Params,
    data: tuple[Array, Array],
    loss: Any,
    optimiser: SGD | Adam | Preconditioner,
    state: Any,
    index: int,
    rng: np.random.Generator,
    fisher: Fisher = sampled,
) -> tuple[float, Any, Any]:
    """One update of `params` in place on the batch `data`: (mean loss before it, optimiser state, Info or None)."""
    f, tape = network.forward(params, data[0])
    n = float(loss.normaliser(f, data[1]))
    g = network.backward(params, tape, loss.gradient(f, data[1]))
    value = float(loss.value(f, data[1])) / n
    if not isinstance(optimiser, Preconditioner):
        optimiser.step(params, network.gradients(tape, g, n, factored=False), state, index)
        return value, state, None
    records = None
    if optimiser.wants_records(state):
        records = network.records(tape, fisher(network, params, tape, Batch(f, data[1], loss), g, rng), n)
    updates, state, info = optimiser.step(state, records, network.gradients(tape, g, n))
    for name, update in updates.items():
        params[name] -= aac.array_namespace(update).reshape(update, params[name].shape)
    if optimiser.rule.needs_records:
        after = float(loss.value(network.forward(params, data[0])[0], data[1])) / n
        keep, state = optimiser.judge(state, value, after)
        if not keep:
            for name, update in updates.items():
                params[name] += aac.array_namespace(update).reshape(update, params[name].shape)
    return value, state, info


def fit(
    network: Sequential,
    params: Params,
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
    state = initial_state(network, params, optimiser) if state is None else state
    seconds = 0.0
    for index in range(start, steps):
        rng = np.random.default_rng([seed, index])
        rows = aac.array_namespace(x).asarray(rng.integers(0, x.shape[0], batch))
        begun = time.perf_counter()
        pair = x[rows, ...], y[rows, ...]
        value, state, info = step(network, params, pair, loss, optimiser, state, index, rng)
        seconds += time.perf_counter() - begun
        yield Progress(index + 1, value, seconds, params, state, info)


def mean_loss(network: Sequential, params: Params, data: tuple[Array, Array], loss: Any) -> float:
    """Mean loss over all of `data`."""
    f, _ = network.forward(params, data[0])
    return float(loss.value(f, data[1]) / loss.normaliser(f, data[1]))


def initial_state(network: Sequential, params: Params, optimiser: SGD | Adam | Preconditioner) -> Any:
    """What `step` needs of the optimiser before the first update."""
    if isinstance(optimiser, Preconditioner):
        return optimiser.init(network.blocks(), next(iter(params.values())))
    return optimiser.init(params)
