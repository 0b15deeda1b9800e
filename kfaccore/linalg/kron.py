"""Products with a Kronecker block, of gradients formed or not."""

from __future__ import annotations

from collections.abc import Callable

from kfaccore import xp as kernels
from kfaccore.linalg import side
from kfaccore.record import Factored
from kfaccore.xp.arrays import Array, namespace, scalar

Rows = Callable[[Array], Array]


def apply(left: Array, grad: Array | Factored, right: Array) -> Array:
    """left V right for V (blocks, d_out, d_in) or V = g^T a / n not multiplied out.

    left (blocks, d_out, d_out), right (blocks, d_in, d_in) or diagonal (blocks, d_in). Each side of a `Factored` goes
    into its rows where `into_rows` says so. Extra flops over the gradient: 2 d_out^2 min(rows, d_in) +
    2 d_in^2 min(rows, d_out).
    """
    if not isinstance(grad, Factored):
        return side.times(_from_left(left, grad), right)
    a, g = folded(grad)
    into_g, into_a = into_rows(a, g)
    scale = 1.0 / scalar(grad.n, a)
    if into_g:
        g = side.times(g, side.transposed(left)) * scale
    if into_a:
        a = side.times(a, right)
    v = namespace(a).matmul(g.mT, a)
    if not into_g:
        v = _from_left(left, v * scale)
    return v if into_a else side.times(v, right)


def sandwich(left: Rows, grad: Array | Factored, right: Rows) -> Array:
    """L V R for symmetric L, R known by what they do to rows: left(x) = x L, right(x) = x R; else as `apply`."""
    if not isinstance(grad, Factored):
        return right(left(grad.mT).mT)
    a, g = folded(grad)
    into_g, into_a = into_rows(a, g)
    g = (left(g) if into_g else g) * (1.0 / scalar(grad.n, a))
    v = namespace(a).matmul(g.mT, right(a) if into_a else a)
    v = v if into_g else left(v.mT).mT
    return v if into_a else right(v)


def folded(grad: Factored) -> tuple[Array, Array]:
    """Rows a (blocks, rows, d_in) and g (blocks, rows, d_out) of a gradient that is not multiplied out."""
    xp = namespace(grad.a)
    a = xp.reshape(grad.a, (grad.a.shape[0], -1, grad.a.shape[-1]))
    g = xp.reshape(grad.g, (grad.g.shape[0], -1, grad.g.shape[-1]))
    return a, g


def into_rows(a: Array, g: Array) -> tuple[bool, bool]:
    """Whether the left side goes into g (rows < d_in) and the right one into a (rows < d_out): both are static."""
    rows = a.shape[1]
    return rows < a.shape[-1], rows < g.shape[-1]


def solve(vectors_g: Array, grad: Array | Factored, vectors_a: Array, denominators: Array) -> Array:
    """Q_g ((Q_g^T V Q_a) / denominators) Q_a^T: solving in an eigenbasis. denominators (blocks, d_out, d_in)."""
    rotated = apply(side.transposed(vectors_g), grad, vectors_a) / denominators
    return apply(vectors_g, rotated, side.transposed(vectors_a))


def _from_left(x: Array, v: Array) -> Array:
    return x[:, :, None] * v if side.is_diagonal(x) else kernels.product(x, v)
