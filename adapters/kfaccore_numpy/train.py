"""The training loop: one batch, one gradient, one update, with a first-order optimiser or a Preconditioner."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import array_api_compat as aac
import numpy as np

from kfaccore import IterateAverage, Preconditioner, draw_noise, empirical, monte_carlo, own_gradients, weighted
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
    """After `step` updates: batch loss before the last one, training seconds, parameters, optimiser state, Info, and
    the mean of the iterates, when one was asked for."""

    step: int
    loss: float
    seconds: float
    params: dict[str, Array]
    state: Any
    info: Any = None
    mean: dict[str, Array] | None = None


def sampled(network: Sequential, params: Params, tape: Tape, batch: Batch, g: Params, rng: Any) -> Params:
    """Output gradients of one Monte-Carlo draw of labels from the model: one more backward without weights."""
    noise = aac.array_namespace(batch.f).asarray(draw_noise(batch.loss, tuple(batch.f.shape), 1, rng))
    return network.backward(params, tape, monte_carlo(batch.loss, batch.f, noise, batch.target))


def true_labels(network: Sequential, params: Params, tape: Tape, batch: Batch, g: Params, rng: Any) -> Params:
    """The empirical Fisher: the training loss's own output gradients."""
    return g


DRAWN = {sampled: monte_carlo, true_labels: empirical}  # what the core calls them; it is told of no other


def step(
    network: Sequential,
    params: Params,
    data: tuple[Array, Array],
    loss: Any,
    optimiser: SGD | Adam | Preconditioner,
    state: Any,
    index: int,
    rng: np.random.Generator,
    fisher: Fisher | None = None,
    ids: Array | None = None,
) -> tuple[float, Any, Any]:
    """One update of `params` on the batch `data`: (mean loss before it, optimiser state, Info or None).

    The loss includes l2/2 |theta|^2, biases too, where the optimiser's settings ask for it. A Preconditioner's step
    puts new arrays into the dict `params`, so one that was taken back leaves exactly the old ones. Without `fisher`,
    records are `sampled`, or hold the `true_labels` where a method wants the gradient's own. ids (batch,) are dataset
    positions, for methods that go by them.
    """
    preconditioned = isinstance(optimiser, Preconditioner)
    l2 = _penalties(optimiser, state, params)
    f, tape = network.forward(params, data[0])
    n = float(loss.normaliser(f, data[1])) or _nothing(f)
    g = network.backward(params, tape, loss.gradient(f, data[1]))
    value = float(loss.value(f, data[1])) / float(n) + _penalty(params, l2)
    on_weights = weighted(optimiser, state, g, ids) if preconditioned else g
    rests = on_weights is not g  # the weight gradients are then the directions
    n = n if preconditioned or n > 0 else 1.0
    grads = network.gradients(tape, on_weights, n, factored=preconditioned and not (l2 or rests))
    if l2:
        grads = {name: grad + l2[name] * params[name] for name, grad in grads.items()}
    if not preconditioned:
        optimiser.step(params, grads, state, index)
        return value, state, None
    records = own = None
    fisher = fisher or (true_labels if own_gradients(optimiser) else sampled)
    if optimiser.wants_records(state):
        records = network.records(tape, fisher(network, params, tape, Batch(f, data[1], loss), g, rng), n, ids)
    if optimiser.rule.wants_own:
        own = network.records(tape, g, n, ids)
    told = {"loss": value, "nonnegative": getattr(loss, "nonnegative", False)}
    updates, state, info = optimiser.step(state, records, grads, DRAWN.get(fisher), own=own, **told)
    place = _placing(params, updates, float(info.step["alpha"]) * optimiser.schedules.weight_decay)

    def batch_loss() -> float:
        return float(loss.value(network.forward(params, data[0])[0], data[1])) / n + _penalty(params, l2)

    place(1.0)
    with np.errstate(all="ignore"):  # a loss that is not finite is an answer here
        _, state = optimiser.judge(state, value, place, batch_loss)
    return value, state, info


def _nothing(f: Array) -> Array:
    """n of a batch in which nothing counts, whose mean is refused as what is not finite: a 0-d NaN."""
    xp = aac.array_namespace(f)
    return xp.full((), float("nan"), dtype=f.dtype, device=aac.device(f))


def _placing(params: Params, updates: Params, shrink: float) -> Callable[[float], None]:
    """place(share): puts old - share (update + shrink old) into `params`."""
    old = {name: params[name] for name in updates}
    moves = {name: aac.array_namespace(u).reshape(u, old[name].shape) for name, u in updates.items()}
    if shrink:
        moves = {name: move + shrink * old[name] for name, move in moves.items()}

    def place(share: float) -> None:
        for name, move in moves.items():
            params[name] = old[name] - (move if share == 1 else share * move) if share else old[name]

    return place


def _penalties(optimiser: SGD | Adam | Preconditioner, state: Any, params: Params) -> dict[str, float]:
    """{layer: l2}; empty where there is none."""
    if isinstance(optimiser, Preconditioner):
        return optimiser.schedules.penalties(params, state.step)
    return dict.fromkeys(params, optimiser.l2) if optimiser.l2 else {}


def _penalty(params: Params, l2: dict[str, float]) -> float:
    return 0.5 * sum(weight * float((params[name] * params[name]).sum()) for name, weight in l2.items())


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
    average: IterateAverage | None = None,
) -> Iterator[Progress]:
    """Train in place on batches drawn with replacement; yields after every step, timing only the step itself.

    Batches and label draws are functions of (seed, step), so a run resumed at `start` with its state continues
    bit for bit. Evaluate between steps as long as you like: the clock is stopped.
    """
    x, y = data
    state = initial_state(network, params, optimiser, x.shape[0]) if state is None else state
    seconds = 0.0
    mean = params
    for index in range(start, steps):
        rng = np.random.default_rng([seed, index])
        rows = aac.array_namespace(x).asarray(rng.integers(0, x.shape[0], batch))
        begun = time.perf_counter()
        pair = x[rows, ...], y[rows, ...]
        value, state, info = step(network, params, pair, loss, optimiser, state, index, rng, ids=rows)
        if average is not None:
            mean = average(mean, params, index + 1 - start)
        seconds += time.perf_counter() - begun
        yield Progress(index + 1, value, seconds, params, state, info, None if average is None else mean)


def mean_loss(network: Sequential, params: Params, data: tuple[Array, Array], loss: Any) -> float:
    """Mean loss over all of `data`."""
    f, _ = network.forward(params, data[0])
    return float(loss.value(f, data[1]) / loss.normaliser(f, data[1]))


def initial_state(network: Sequential, params: Params, optimiser: SGD | Adam | Preconditioner, samples: int = 0) -> Any:
    """What `step` needs of the optimiser before the first update; `samples` is the size of the dataset."""
    if isinstance(optimiser, Preconditioner):
        blocks = {name: replace(block, samples=samples) for name, block in network.blocks().items()}
        return optimiser.init(blocks, next(iter(params.values())))
    return optimiser.init(params)
