"""The inverse of symmetric matrices in a program that is compiled: one attempt, which a loop repeats, in few kernels.

XLA on a CPU takes some 20 ms of compile time a kernel that it has not seen, whatever the kernel does, and none for a
product, which it calls. So sums are products with ones, a diagonal is every (d + 1)th number, and what is
made inside the loop depends on its count, as what does not is moved out of it array by array.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kfaccore.xp.arrays import Array, loop, namespace
from kfaccore.xp.codes import Code, choose

Carry = tuple[Array, Array, Array]


def spd_inverse(x: Array, attempts: int, pivot: float) -> tuple[Array, Array]:
    """`kernels.spd_inverse` of JAX's tracers in the widest dtype that there is: as it is, then with jitter.

    attempts   at most so many, the first without jitter
    pivot      a pivot below so many eps of its diagonal entry is rounding noise
    """
    import jax

    xp = namespace(x)
    blocks, d, _ = x.shape
    tiny = float(xp.finfo(x.dtype).eps)
    of_x = diagonal(x)
    mean = total(of_x) / d
    everything = total(xp.reshape(total(xp.reshape(x, (blocks * d, d))), (blocks, d)))
    finite = everything - everything == 0

    def unfinished(carry: Carry) -> Array:
        return (carry[2] < 1) | xp.any((carry[1] < 0) & finite)

    def again(carry: Carry) -> Carry:
        inverse, code, attempt = carry
        exponent: Any = 2.0 * attempt - 1.0
        jitter = xp.where(attempt < 1, xp.zeros_like(attempt), tiny * 10.0**exponent)
        shift = (jitter * mean)[:, None]
        unit = xp.astype(_places(d, attempt), x.dtype)
        tried = x + shift[:, :, None] * unit
        # LAPACK's order is the transposed one, which a symmetric matrix is in already; NaN where it failed
        lower: Any = jax.lax.linalg.cholesky(tried.mT, symmetrize_input=False)
        half = jax.lax.linalg.triangular_solve(lower, xp.broadcast_to(unit, x.shape), left_side=True, lower=True)
        low = ~(diagonal(lower) ** 2 > pivot * tiny * (of_x + shift))
        newly = (total(xp.astype(low, x.dtype)) == 0) & (code < 0) & finite
        how = choose(attempt < 1, Code.OK, Code.JITTERED)
        kept = xp.where((code < 0)[:, None, None], unit, inverse)  # the identity where nothing was found yet
        found = xp.where(newly[:, None, None], xp.matmul(half.mT, half), kept)
        return found, xp.where(newly, how, code), attempt + 1.0

    start = xp.zeros((), dtype=x.dtype)
    none = xp.full(x.shape[:1], -1, dtype=xp.int32)
    inverse, code, _ = loop(unfinished, again, (x, none, start), attempts)
    failed = choose(finite, Code.INDEFINITE, Code.NONFINITE)
    return inverse, xp.where(code < 0, failed, code)


def diagonal(x: Array) -> Array:
    """(blocks, d) of matrices (blocks, d, d)."""
    blocks, d, _ = x.shape
    return namespace(x).reshape(x, (blocks, d * d))[:, :: d + 1]


def widened(x: Array, width: int, fill: Array) -> Array:
    """x (blocks, d, d) in the corner of matrices of a wider size, which are diagonal beside it: `fill` (blocks,)."""
    import jax

    foreign: Any = x
    more = width - x.shape[-1]
    rows = jax.lax.iota("int32", width)
    beside = (rows[:, None] == rows[None, :]) & (rows[:, None] >= x.shape[-1])
    return jax.numpy.where(beside, fill[:, None, None], jax.numpy.pad(foreign, ((0, 0), (0, more), (0, more))))


def in_turns(arrays: tuple[Array, ...], step: int, times: int, of: Callable[..., Array]) -> Array:
    """The sum of `of` over so many pieces of arrays, `step` long on the second axis: one body, which a loop repeats."""
    import jax

    piece = _piece(arrays, step, of)
    first: Any = piece(0)
    return jax.lax.fori_loop(1, times, lambda turn, held: held + piece(turn), first)


def joined_turns(arrays: tuple[Array, ...], step: int, times: int, of: Callable[..., Array]) -> Array:
    """As `in_turns`, what `of` gives joined on the second axis."""
    import jax

    found = jax.lax.map(_piece(arrays, step, of), jax.numpy.arange(times))
    found = jax.numpy.moveaxis(found, 0, 1)
    return found.reshape(found.shape[0], times * step, *found.shape[3:])


def _piece(arrays: tuple[Array, ...], step: int, of: Callable[..., Array]) -> Callable[[Any], Array]:
    """`of` the pieces of a turn."""
    import jax

    return lambda turn: of(*(jax.lax.dynamic_slice_in_dim(x, turn * step, step, axis=1) for x in arrays))


def total(x: Array) -> Array:
    """The sum of each row of x (rows, d), (rows,): a product with ones, which XLA makes no kernel for where it cannot
    see that they are ones alone."""
    import jax

    d = x.shape[-1]
    if d == 1:
        return x[:, 0]
    table = np.stack([np.ones(d), np.arange(d)], axis=1).astype(x.dtype)
    foreign: Any = x
    return jax.numpy.matmul(foreign, table, precision="highest")[:, 0]


def _places(d: int, attempt: Array) -> Array:
    """Where the diagonal of a (d, d) matrix is; in terms of `attempt` >= 0, so that it stays inside its loop."""
    import jax

    rows = jax.lax.iota("int32", d)
    foreign: Any = attempt
    return rows[:, None] == rows[None, :] + jax.numpy.minimum(foreign, 0).astype("int32")
