"""Sums of outer products, their moving average, and quadratic forms."""

from __future__ import annotations

from typing import Any

import array_api_compat as aac
import numpy as np
from scipy.linalg import blas

from kfaccore.xp import gpu
from kfaccore.xp.arrays import Array, is_numpy, namespace, on_gpu, scalar
from kfaccore.xp.half import to_bfloat16
from kfaccore.xp.precision import BFLOAT16, statistics

_STACK_BELOW = 64  # below this size one batched product beats a loop of rank-k updates
_SMALL = 1 << 14  # numbers of a block up to which all blocks at once beat a loop over them
_ALIASED = 512  # rows of a multiple of these many numbers fall on the same cache lines, from twice this size on


def gram(x: Array) -> Array:
    """Sum over rows of x x^T: (blocks, rows, d) -> (blocks, d, d), exactly symmetric on NumPy.

    On NumPy `x.T @ x` of one shared buffer reaches the symmetric rank-k update, 1.4-1.8 times a plain product.
    """
    if on_gpu(x):
        return gpu.gram(x)
    xp = namespace(x)
    blocks, _, d = x.shape
    if statistics() == BFLOAT16 and x.dtype == xp.float32:
        x = xp.astype(to_bfloat16(x), xp.float32)
    if is_numpy(x):
        if blocks == 1:
            return _rank_k(x[0])[None]
        if d >= _STACK_BELOW:
            return np.stack([_rank_k(b) for b in x])
    if blocks == 1:  # a plain 2-D product keeps CuPy off its batched path, which copies transposed operands
        return (x[0, ...].T @ x[0, ...])[None, ...]
    return xp.matmul(x.mT, x)


def product(x: Array, y: Array) -> Array:
    """x y of stacks of matrices, as each namespace makes it fastest."""
    if gpu.wants_zeros(x):
        return gpu.product(x, y)
    return namespace(x, y).matmul(x, y)


def turned(x: Array, Q: Array) -> Array:
    """x Q for x (..., blocks, examples, positions, d) and Q (blocks, d, e): the rows of a block as one product."""
    xp = namespace(x)
    rows = xp.reshape(x, (*x.shape[:-3], -1, x.shape[-1]))
    return xp.reshape(xp.matmul(rows, Q), (*x.shape[:-1], Q.shape[-1]))


def gram_diagonal(x: Array) -> Array:
    """Sum over rows of x * x, the diagonal of `gram` by itself: (blocks, rows, d) -> (blocks, d)."""
    if is_numpy(x):
        return np.einsum("brd,brd->bd", x, x)  # without an array of squares
    return namespace(x).sum(x * x, axis=1)


def _rank_k(x: np.ndarray) -> np.ndarray:
    """x^T x. NumPy copies the second triangle entry by entry: half of all time at 2048 columns and 512 rows."""
    d = x.shape[-1]
    if d % _ALIASED or d < 2 * _ALIASED:
        return x.T @ x
    syrk: Any = blas.get_blas_funcs("syrk", (x,))
    found = syrk(1.0, x.T).T
    mirror(found)
    return found


def mirror(x: np.ndarray, tile: int = 64) -> None:
    """Copy the lower triangle of the C-ordered `x` onto the upper one, tile by tile so that both stay in cache."""
    d = len(x)
    above = np.arange(tile)[:, None] < np.arange(tile)
    for i in range(0, d, tile):
        for j in range(0, i, tile):
            x[j : j + tile, i : i + tile] = x[i : i + tile, j : j + tile].T
        corner = x[i : i + tile, i : i + tile]
        np.copyto(corner, corner.T.copy(), where=above[: len(corner), : len(corner)])


def squares(x: Array) -> Array:
    """The squared norm of each block, (blocks, ...) -> (blocks,)."""
    xp = namespace(x)
    flat = xp.reshape(x, (x.shape[0], -1))
    if is_numpy(x):
        with np.errstate(over="ignore"):  # infinite is an answer
            return np.vecdot(flat, flat)
    foreign: Any = flat
    if on_gpu(x):  # a product with one column is slow there
        if aac.is_torch_array(foreign):
            return xp.linalg.vector_norm(foreign, axis=-1) ** 2
        return xp.sum(foreign * foreign, axis=-1)
    return xp.matmul(flat[:, None, :], flat[:, :, None])[:, 0, 0]  # one product, where `vecdot` may be two operations


def quadratic(x: Array, v: Array) -> Array:
    """x^T V x of every row for symmetric V: (draws, blocks, rows, d), (blocks, d, d) -> (draws, blocks, rows).

    On NumPy from one triangle, 1.7-1.9 times a full product.
    """
    xp = namespace(x)
    if not (is_numpy(x) and is_numpy(v)) or x.shape[-1] < _STACK_BELOW:
        return xp.vecdot(xp.matmul(x, v), x)
    trmm: Any = blas.get_blas_funcs("trmm", (x, v))
    found = np.empty(x.shape[:-1], x.dtype)
    for draw in range(x.shape[0]):
        for block in range(x.shape[1]):
            rows = x[draw, block]
            twice = trmm(2.0, v[block].T, rows.T).T
            found[draw, block] = np.vecdot(twice, rows) - (rows * rows) @ np.diagonal(v[block])
    return found


def average(
    old: Array, total: Array, keep: float | Array, add: float | Array, ok: Array, donate: bool = False
) -> Array:
    """keep * old + add * total where `ok`, `old` elsewhere: the moving average of factors.

    old, total (blocks, ...); keep, add numbers or (blocks,) arrays; ok (blocks,) bool. `donate=True` lets NumPy and
    torch overwrite `old`.
    """
    keep = _per_block(keep, old)
    add = _per_block(add, old)
    if donate and aac.is_torch_array(old):
        return _written(old, _moved(old, keep, add, total), _per_block(ok, old))
    if not (is_numpy(old) and is_numpy(total)):
        return namespace(old).where(_per_block(ok, old), _moved(old, keep, add, total), old)
    out = old if donate and old.flags.writeable else np.empty(old.shape, old.dtype)
    if old[0].size <= _SMALL and all(ok[block] for block in range(len(old))):
        np.multiply(old, np.asarray(keep, old.dtype), out=out)
        out += total * np.asarray(add, old.dtype)
        return out
    for block in range(old.shape[0]):
        if ok[block]:
            _axpby(old[block], total[block], _pick(keep, block), _pick(add, block), out[block])
        elif out is not old:
            out[block] = old[block]
    return out


def _moved(x: Array, keep: float | Array, add: float | Array, y: Array) -> Array:
    """keep x + add y, two operations where a namespace has the second as one."""
    foreign: Any = x
    if aac.is_torch_array(foreign):
        moved = foreign * keep  # which nobody else has
        return moved.add_(y, alpha=add) if isinstance(add, int | float) else moved.addcmul_(y, add)
    return keep * x + add * y


def _written(old: Array, new: Array, ok: Array | float) -> Array:
    """`new` where `ok` into the memory of a torch `old`: what an update holds beside a state is one factor's."""
    import torch

    out: Any = old
    known: Any = ok
    return torch.where(known, new, out, out=out)  # pyright: ignore[reportCallIssue, reportArgumentType]


def _axpby(x: np.ndarray, y: np.ndarray, a: float, b: float, out: np.ndarray) -> None:
    """out = a x + b y in chunks that stay in cache; `out` may be `x`."""
    x = np.atleast_1d(x)
    y = np.atleast_1d(y)
    out = np.atleast_1d(out)  # a view, so that the caller's array is written to
    step = max(1, 32768 * len(x) // max(x.size, 1))
    scratch = np.empty((min(step, len(x)), *x.shape[1:]), x.dtype)
    for lo in range(0, len(x), step):
        part = slice(lo, lo + step)
        np.multiply(x[part], a, out=out[part])
        tail = scratch[: len(out[part])]
        np.multiply(y[part], b, out=tail)
        out[part] += tail


def _per_block(value: float | Array, like: Array) -> Array | float:
    if isinstance(value, int | float) or value.ndim == 0:
        return scalar(value, like)
    return namespace(like).reshape(value, (-1, *(1,) * (like.ndim - 1)))


def _pick(value: float | Array, block: int) -> Any:
    """The number of one block, as a Python number where each has its own: float32 would widen otherwise."""
    return value if isinstance(value, int | float) or value.ndim == 0 else np.asarray(value)[block].item()
