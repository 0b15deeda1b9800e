"""Products with a Kronecker block, of gradients formed or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kfaccore import xp as kernels
from kfaccore.linalg import side
from kfaccore.xp.arrays import Array, namespace


def apply(left: Array, grad: Any, right: Array) -> Array:
    """left V right for V (blocks, d_out, d_in) or V = g^T a / n not multiplied out (a `Factored`).

    left (blocks, d_out, d_out), right (blocks, d_in, d_in) or diagonal (blocks, d_in). Each side alone: left goes
    into g iff rows < d_in, right into a iff rows < d_out; both choices are static. Extra flops over the gradient:
    2 d_out^2 min(rows, d_in) + 2 d_in^2 min(rows, d_out).
    """
    if not hasattr(grad, "g"):
        return side.times(_from_left(left, grad), right)
    xp = namespace(grad.a)
    a, g = (xp.reshape(x, (x.shape[0], -1, x.shape[-1])) for x in (grad.a, grad.g))
    (_, rows, d_in), d_out = a.shape, g.shape[-1]
    into_g, into_a = rows < d_in, rows < d_out
    scale = 1.0 / kernels.scalar(grad.n, a)
    if into_g:
        g = side.times(g, side.transposed(left)) * scale
    if into_a:
        a = side.times(a, right)
    v = xp.matmul(g.mT, a)
    if not into_g:
        v = _from_left(left, v * scale)
    return v if into_a else side.times(v, right)


def sandwich(left: Callable[[Array], Array], grad: Any, right: Callable[[Array], Array]) -> Array:
    """L V R for symmetric L, R known by what they do to rows: left(x) = x L, right(x) = x R.

    V (blocks, d_out, d_in) or V = g^T a / n not multiplied out; each side goes into its rows by the rule of `apply`.
    """
    if not hasattr(grad, "g"):
        return right(left(grad.mT).mT)
    xp = namespace(grad.a)
    a, g = (xp.reshape(x, (x.shape[0], -1, x.shape[-1])) for x in (grad.a, grad.g))
    (_, rows, d_in), d_out = a.shape, g.shape[-1]
    into_g, into_a = rows < d_in, rows < d_out
    g = (left(g) if into_g else g) * (1.0 / kernels.scalar(grad.n, a))
    v = xp.matmul(g.mT, right(a) if into_a else a)
    v = v if into_g else left(v.mT).mT
    return v if into_a else right(v)


def solve(vectors_g: Array, grad: Any, vectors_a: Array, denominators: Array) -> Array:
    """Q_g ((Q_g^T V Q_a) / denominators) Q_a^T: solving in an eigenbasis. denominators (blocks, d_out, d_in)."""
    rotated = apply(side.transposed(vectors_g), grad, vectors_a) / denominators
    return apply(vectors_g, rotated, side.transposed(vectors_a))


def _from_left(x: Array, v: Array) -> Array:
    return x[:, :, None] * v if side.is_diagonal(x) else namespace(v).matmul(x, v)
