"""A solve by an explicit inverse whose residual is corrected: of systems near singular it has large entries."""

from __future__ import annotations

from kfaccore import xp as kernels
from kfaccore.xp.arrays import Array, eps, loop, namespace, select

_SINGULAR = 1e9  # trace over shift from which an inverse has no digits in the null space of a gram


def on_span(inverse: Array, gram: Array, shift: Array) -> Array:
    """(gram + shift I)^-1 (blocks, m, m), given as `inverse`, for what has nothing in the null space of `gram`.

    Where shift (blocks,) is next to nothing it is made from the eigenvectors whose values are not 0 to rounding.
    """
    xp = namespace(gram)
    near = xp.linalg.trace(gram) > _SINGULAR * shift

    def spanned(carry: tuple[Array]) -> tuple[Array]:
        values, Q, _ = kernels.eigh(gram)
        inside = values > 16 * eps(values.dtype, xp) * values[:, -1:]
        below = xp.where(inside, values + shift[:, None], xp.ones_like(values))
        weights = xp.where(inside, 1 / below, xp.zeros_like(values))
        return (select(near, xp.matmul(Q * weights[:, None, :], Q.mT), carry[0]),)

    # a loop of at most one turn: made only where it is needed, also under a trace
    (inverse,) = loop(lambda _: xp.any(near), spanned, (inverse,), 1)
    return inverse


def solved(system: Array, inverse: Array, b: Array, turns: int = 2) -> Array:
    """system^-1 b for b (..., m, k), refined `turns` times: the inverse loses digits, its residual does not.

    Source: iterative refinement, Wilkinson 1963.
    """
    x = inverse @ b
    for _ in range(turns):
        x = x + inverse @ (b - system @ x)
    return x
