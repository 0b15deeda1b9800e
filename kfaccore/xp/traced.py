"""The inverse of symmetric matrices in a program that is compiled: one attempt, which a loop repeats, in few kernels.

XLA on a CPU takes some 20 ms of compile time a kernel that it has not seen, whatever the kernel does. A diagonal that
is gathered is three of them; as every (d + 1)th number it is part of the kernel that uses it.
"""

from __future__ import annotations

from typing import Any

from kfaccore.xp.arrays import Array, eps, loop, namespace, select
from kfaccore.xp.codes import Code, choose

Carry = tuple[Array, Array, Array]


def spd_inverse(x: Array, attempts: int, pivot: float) -> tuple[Array, Array]:
    """`kernels.spd_inverse` of JAX's tracers in the widest dtype that there is: as it is, then with jitter.

    attempts   at most so many, the first without jitter
    pivot      a pivot below so many eps of its diagonal entry is rounding noise
    """
    import jax

    xp = namespace(x)
    d = x.shape[-1]
    eye = xp.eye(d, dtype=x.dtype)
    tiny = eps(x.dtype, xp)
    of_x = diagonal(x)
    mean = xp.sum(of_x, axis=-1) / d
    summary = xp.sum(x * 0.0, axis=(-2, -1))
    finite = summary == 0

    def unfinished(carry: Carry) -> Array:
        return xp.any((carry[1] < 0) & finite)

    def again(carry: Carry) -> Carry:
        inverse, code, attempt = carry
        exponent: Any = 2.0 * attempt - 1.0
        jitter = xp.where(attempt < 1, xp.zeros_like(attempt), tiny * 10.0**exponent)
        shift = (jitter * mean)[:, None]
        tried = x + shift[:, :, None] * eye
        lower: Any = jax.lax.linalg.cholesky(tried, symmetrize_input=False)  # NaN where it failed
        half = jax.lax.linalg.triangular_solve(lower, xp.broadcast_to(eye, x.shape), left_side=True, lower=True)
        good = xp.all(diagonal(lower) ** 2 > pivot * tiny * (of_x + shift), axis=-1)
        newly = good & (code < 0) & finite
        how = choose(attempt < 1, Code.OK, Code.JITTERED)
        return select(newly, xp.matmul(half.mT, half), inverse), xp.where(newly, how, code), attempt + 1.0

    start = xp.zeros((), dtype=x.dtype)
    none = xp.full(x.shape[:1], -1, dtype=xp.int32)
    inverse, code, _ = loop(unfinished, again, (xp.zeros_like(x) + eye, none, start), attempts)
    failed = choose(finite, Code.INDEFINITE, Code.NONFINITE)
    return inverse, xp.where(code < 0, failed, code)


def diagonal(x: Array) -> Array:
    """(blocks, d) of matrices (blocks, d, d)."""
    blocks, d, _ = x.shape
    return namespace(x).reshape(x, (blocks, d * d))[:, :: d + 1]
