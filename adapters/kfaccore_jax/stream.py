"""Records of a trained function over a dataset, for `kfaccore.fit` and what is made of it: compiled once a batch size.

The parameters as matrices, the `mean` of a `kfaccore.Posterior`, are `plan.matrices(params)`; `plan.tree` is the way
back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kfaccore import Record, draw_noise, empirical, forward_only, monte_carlo, type2
from kfaccore_jax.capture import capture
from kfaccore_jax.plan import Plan

Draw = Callable[[Any, Any, Any], Any]


@dataclass(frozen=True, eq=False)
class Stream:
    """{layer: Record} of each batch, as often as it is asked for, the same draws every time.

    batches   anything that can be iterated again and gives (inputs, target); inputs are an array, or a tuple of the
              plan's arguments
    draw      (prediction, target, noise) -> draws (draws, *prediction.shape)
    share     (prediction, target) -> n, a batch's share of the mean loss
    noise     (shape of the prediction, number of the batch) -> an array, or None
    fisher    kfaccore's function that the draws are of, None for others
    """

    plan: Plan
    params: Any
    batches: Iterable[Any]
    draw: Draw
    share: Callable[[Any, Any], Any]
    noise: Callable[[tuple[int, ...], int], Any]
    fisher: Callable | None = None

    def __iter__(self) -> Iterator[dict[str, Record]]:
        for number, batch in enumerate(self.batches):
            inputs, target = batch if isinstance(batch, tuple | list) and len(batch) == 2 else (batch, None)
            args = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
            shape = jax.eval_shape(lambda p, a: capture(self.plan, p, *a).prediction, self.params, args).shape
            yield dict(self._compiled(self.params, args, target, self.noise(shape, number)))

    @cached_property
    def _compiled(self) -> Callable:
        def records(params: Any, args: tuple, target: Any, noise: Any) -> dict[str, Record]:
            captured = capture(self.plan, params, *args)
            f = captured.prediction
            return dict(captured.records(self.draw(f, target, noise), self.share(f, target), fisher=self.fisher))

        return jax.jit(records)


def stream(
    plan: Plan,
    params: Any,
    loss: Any,
    batches: Iterable[Any],
    fisher: Callable = monte_carlo,
    draws: int = 1,
    seed: int = 0,
) -> Stream:
    """A stream of the loss, one of kfaccore's; fisher is its monte_carlo, type2, empirical or forward_only, and draws
    of monte_carlo a function of (seed, batch). n is a batch's share of the mean loss."""
    known: dict[Callable, Draw] = {
        monte_carlo: lambda f, target, noise: monte_carlo(loss, f, noise, target),
        type2: lambda f, target, noise: type2(loss, f, target),
        empirical: lambda f, target, noise: empirical(loss, f, target),
        forward_only: lambda f, target, noise: jnp.zeros((0, *f.shape), f.dtype),
    }
    if fisher not in known:
        raise ValueError(f"fisher is {fisher!r}; need one of kfaccore's {[f.__name__ for f in known]}")

    def noise(shape: tuple[int, ...], number: int) -> Any:
        if fisher is not monte_carlo:
            return None
        return jnp.asarray(draw_noise(loss, shape, draws, np.random.default_rng([seed, number])))

    return Stream(plan, params, batches, known[fisher], loss.normaliser, noise, fisher)


def outputs(plan: Plan, params: Any, batches: Iterable[Any], select: Callable[[Any], Any] | None = None) -> Stream:
    """A stream whose draws are the units of the prediction (batch, units), for `P.covariance`; `select` picks them,
    such as `lambda f: f[:, -1]` of a language model. n = batch."""

    def draw(f: Any, target: Any, noise: Any) -> Any:
        chosen, pull = jax.vjp(select or (lambda x: x), f)
        if chosen.ndim < 2:
            raise ValueError(f"outputs got a prediction of shape {chosen.shape}; need (batch, units): give `select`")
        units = chosen[0].size
        eye = jnp.eye(units, dtype=chosen.dtype).reshape(units, 1, *chosen.shape[1:])
        return jax.vmap(lambda v: pull(jnp.broadcast_to(v, chosen.shape))[0])(eye)

    return Stream(plan, params, batches, draw, _examples, _silent)


def measured(plan: Plan, params: Any, measure: Callable[[Any, Any], Any], batches: Iterable[Any]) -> Stream:
    """A stream of one draw, the gradient of measure(prediction, target) -> (batch,), such as a margin; n = batch."""

    def draw(f: Any, target: Any, noise: Any) -> Any:
        values, pull = jax.vjp(lambda x: measure(x, target), f)
        if values.shape != f.shape[:1]:
            raise ValueError(f"measure gave shape {values.shape}; need (batch,) = {f.shape[:1]}, one number an example")
        return pull(jnp.ones_like(values))[0][None]

    return Stream(plan, params, batches, draw, _examples, _silent)


def _examples(f: Any, target: Any) -> float:
    return float(f.shape[0])


def _silent(shape: tuple[int, ...], number: int) -> None:
    return None
