"""Random signs of draws: what several rows share is then a sum of squares in expectation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kfaccore import monte_carlo, type2


def signed(draws: Any, n: int, rows: bool = False) -> Any:
    """The draws with an independent sign an example and draw (or a row and draw): the squared sum over examples of what
    they share is then the sum of squares in expectation, as it is by itself for labels drawn from the model."""
    count, *_ = jax.tree.leaves(draws)[0].shape
    signs = jax.random.rademacher(jax.random.key(0), (count, n * (_each(draws, n) if rows else 1)), jnp.int8)

    def one(x: Any) -> Any:  # the key is fixed: a step has none
        own = signs[:, : x.shape[1]]
        own = jnp.repeat(own, x.shape[1] // own.shape[1], axis=1)
        return x * own.reshape(*own.shape, *(1,) * (x.ndim - 2)).astype(x.dtype)

    return jax.tree.map(one, draws)


def independent(draws: Any, prediction: Any, n: int, fisher: Callable | None) -> tuple[Any, bool]:
    """The draws, and whether they are independent between rows and of zero mean as labels drawn from the model are.

    Columns of `type2` are one for all examples; that is no matter but where several rows are one example's: of a
    prediction (batch * positions, outputs) they get a sign a row. ValueError for draws of another shape than f's.
    """
    wanted = [tuple(x.shape) for x in jax.tree.leaves(prediction)]
    given = [tuple(x.shape) for x in jax.tree.leaves(draws)]
    if [shape[1:] for shape in given] != wanted:
        raise ValueError(f"draws have shapes {given}; need (draws, *shape) for the shapes of the prediction, {wanted}")
    if _each(draws, n) > 1 and fisher is None:
        warnings.warn(
            f"the prediction of {n} examples has shape {wanted[0]}, and records() was not told of what kind its draws "
            f"are: columns of type2 need a sign a row there, so say fisher=kfaccore.type2, monte_carlo or empirical",
            stacklevel=3,
        )
    if _each(draws, n) > 1 and fisher is type2:
        return signed(draws, n, rows=True), True
    return draws, fisher is monte_carlo


def _each(draws: Any, n: int) -> int:
    """The most rows that an example has on the first axis of a prediction."""
    return max(x.shape[1] // n for x in jax.tree.leaves(draws))
