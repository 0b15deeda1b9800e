"""Sums of J V J^T over per-example gradients J = sum_s y_s x_s^T, from their rows; J itself only where that is cheaper.

With Z the block rearranged so that G (x) A becomes vec(G) vec(A)^T, these are the products Z vec(V) (x = a, y = g) and
Z^T vec(V) (x = g, y = a). Z is never formed.
Source: Van Loan & Pitsianis 1993 for the rearrangement; Koroko et al. 2022 (2201.10285) for products from samples.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import add

from kfaccore import xp as kernels
from kfaccore.xp.arrays import Array, namespace

Product = Callable[..., Array]  # (matrix, positive=False)


def sandwich(x: Array, y: Array, v: Array, positive: bool = False) -> Array:
    """Sum over draws and examples of J V J^T: (blocks, e, e).

    x (draws | 1, blocks, batch, shared, d), y (draws | 1, blocks, batch, shared, e), V symmetric (blocks, d, d);
    `positive` promises a positive semidefinite V, which halves the products at shared 1. Cost an example: the lesser
    of 2 s (d^2 + e^2) + 2 s^2 (d + e) and 2 s d e + 2 d e (d + e), times draws for what carries them.
    """
    draws = max(x.shape[0], y.shape[0])
    blocks, batch, shared, d = x.shape[1:]
    e = y.shape[-1]
    by_rows = shared * (x.shape[0] * d * (d + shared) + y.shape[0] * e * (e + shared))
    formed = draws * d * e * (shared + d + e)
    if shared == 1:
        return _weighted(x[..., 0, :], y[..., 0, :], v, positive)
    one = _by_rows if by_rows <= formed else _formed
    held = shared * (shared + d + e) if by_rows <= formed else 2 * d * e
    spans = kernels.spans(batch, kernels.at_once(blocks * draws * held))
    return _symmetric(reduce(add, (one(x[:, :, span, ...], y[:, :, span, ...], v) for span in spans)))


def products(x: Array, y: Array) -> tuple[Product, Product]:
    """(V -> sum of J V J^T, U -> sum of J^T U J) of `sandwich`, for many V and U: J of every example is made once where
    it and its transpose are no more to hold than the rows, and a product of it costs no more: 2 d e (d + e) times
    draws an example."""
    if not _pays(x, y):
        return (lambda v, positive=False: sandwich(x, y, v, positive)), (
            lambda u, positive=False: sandwich(y, x, u, positive)
        )
    j = namespace(x).matmul(y.mT, x)
    across = _aligned(j)
    along = _aligned(j.mT)
    return (lambda v, positive=False: _symmetric(_through(across, v))), (
        lambda u, positive=False: _symmetric(_through(along, u))
    )


def _pays(x: Array, y: Array) -> bool:
    """Whether `products` makes J."""
    draws = max(x.shape[0], y.shape[0])
    shared, d = x.shape[3:]
    e = y.shape[-1]
    smaller = 2 * draws * d * e <= shared * (x.shape[0] * d + y.shape[0] * e)
    by_rows = shared * (x.shape[0] * d * (d + shared) + y.shape[0] * e * (e + shared))
    return shared > 1 and smaller and draws * d * e * (d + e) <= by_rows


def _symmetric(total: Array) -> Array:
    """Rounding would grow into an antisymmetric part under iteration."""
    return (total + total.mT) / 2


def _weighted(x: Array, y: Array, v: Array, positive: bool) -> Array:
    """One position: each y y^T weighs x^T V x; x (draws, blocks, batch, d)."""
    xp = namespace(x)
    weight = xp.sum(kernels.quadratic(x, v), axis=0)
    if positive:  # a negative weight is rounding
        weight = xp.sqrt(xp.where(weight < 0, xp.zeros_like(weight), weight))
    scaled = weight[..., None] * y
    return kernels.gram(_rows(scaled)) if positive else xp.matmul(_rows(y).mT, _rows(scaled))


def _by_rows(x: Array, y: Array, v: Array) -> Array:
    """Pairs of positions weigh x_s^T V x_t."""
    xp = namespace(x)
    weight = xp.sum(xp.matmul(xp.matmul(x, v[:, None, :, :]), x.mT), axis=0)
    return xp.matmul(_rows(y).mT, _rows(xp.matmul(weight, y)))


def _formed(x: Array, y: Array, v: Array) -> Array:
    """From J of every draw and example."""
    return _through(_aligned(namespace(x).matmul(y.mT, x)), v)


def _aligned(j: Array) -> Array:
    """J (draws, blocks, batch, e, d) as (blocks, e, draws batch, d): rows of J J^T, each in one piece."""
    xp = namespace(j)
    _, blocks, _, e, d = j.shape
    return xp.reshape(xp.permute_dims(j, (1, 3, 0, 2, 4)), (blocks, e, -1, d))


def _through(j: Array, v: Array) -> Array:
    """Sum of J V J^T over what lies between e and d; J as `_aligned` has it."""
    xp = namespace(j)
    rows = (j.shape[0], -1, j.shape[-1])
    left = xp.reshape(xp.matmul(xp.reshape(j, rows), v), (*j.shape[:2], -1))
    return xp.matmul(left, xp.reshape(j, left.shape).mT)


def _rows(x: Array) -> Array:
    """Every axis between blocks (the second) and the last as rows, draws first."""
    xp = namespace(x)
    x = xp.permute_dims(x, (1, 0, *range(2, x.ndim))) if x.shape[0] > 1 else x[0, ...]
    return xp.reshape(x, (x.shape[0], -1, x.shape[-1]))
