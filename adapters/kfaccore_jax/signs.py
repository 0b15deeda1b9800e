"""Random signs of draws: what several rows share is then a sum of squares in expectation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kfaccore import monte_carlo, type2
from kfaccore_jax.mesh import automatic
from kfaccore_jax.records import widened


def signed(draws: Any, prediction: Any, args: Sequence[Any], n: int, rows: bool = False) -> Any:
    """The draws with an independent sign an example and draw (or a row and draw): the squared sum over examples of what
    they share is then the sum of squares in expectation, as it is by itself for labels drawn from the model.

    args   what holds the n examples, and with the prediction says which signs: they are others in every batch and step,
           or an average over steps would keep the error of the first; the same batch has the same, in any order
    """
    count, *_ = jax.tree.leaves(draws)[0].shape
    seed, places = automatic(partial(_seeded, n=n), PartitionSpec(), prediction, args)
    signs = jax.random.rademacher(jax.random.key(seed), (count, n, _each(draws, n) if rows else 1), jnp.int8)
    signs = signs[:, places]

    def one(x: Any) -> Any:
        own = signs[:, :, : x.shape[1] // n]
        own = jnp.broadcast_to(own, (count, n, x.shape[1] // n))
        return x * own.reshape(*x.shape[:2], *(1,) * (x.ndim - 2)).astype(x.dtype)

    return jax.tree.map(one, draws)


def _seeded(prediction: Any, args: Sequence[Any], n: int) -> tuple[Any, Any]:
    """A number that every batch and every step has another of, and places of the examples that go with what they hold;
    alike ones have places of their own."""
    own = reduce(jnp.add, [_hashed(x, n) for x in jax.tree.leaves(args)])
    size = reduce(jnp.add, [jnp.sum(jnp.abs(widened(f))) for f in jax.tree.leaves(prediction)])
    # half of its digits: the others are of another order of sums, on other devices and outside jit
    size = jax.lax.reduce_precision(size, 8, jnp.finfo(size.dtype).nmant // 2).astype(jnp.float32)
    seed = jnp.sum(own, dtype=jnp.uint32) + jax.lax.bitcast_convert_type(size, jnp.uint32)
    return seed, jnp.argsort(jnp.argsort(own))


def _hashed(x: Any, n: int) -> Any:
    """A number an example from the bits of its part of an array."""
    x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else jnp.asarray(x)
    x = x.real + x.imag if jnp.iscomplexobj(x) else x
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    x = x.astype(jnp.uint32).reshape(n, -1)
    odd = jnp.arange(x.shape[1], dtype=jnp.uint32) * jnp.uint32(0x9E3779B2) + 1  # its place counts too
    return jnp.sum((x ^ (x >> 16)) * odd[None, :], 1, dtype=jnp.uint32)  # round floats have bits at the top alone


def independent(draws: Any, prediction: Any, args: Sequence[Any], n: int, fisher: Callable | None) -> tuple[Any, bool]:
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
        return signed(draws, prediction, args, n, rows=True), True
    return draws, fisher is monte_carlo


def _each(draws: Any, n: int) -> int:
    """The most rows that an example has on the first axis of a prediction."""
    return max(x.shape[1] // n for x in jax.tree.leaves(draws))
