"""The leading singular triples of an operator by Golub-Kahan bidiagonalisation with thick restarts.

Vectors are rows (blocks, D). Every new vector is orthogonalised against all kept ones, twice; the coefficients fill the
projected matrix, which is bidiagonal but for the column that couples the kept triples to the first new vector.
Source: Golub & Kahan 1965; Baglama & Reichel 2005 for the restart.
Cost: 2 `steps` products a cycle; memory (rank + steps) (D_left + D_right).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kfaccore import xp as kernels
from kfaccore.xp.arrays import Array, device_of, eps, is_numpy, loop, namespace

Product = Callable[[Array], Array]
Carry = tuple[Array, Array, Array, Array, Array, Array]  # left, right, values, next right vector, residual, products


@dataclass(frozen=True)
class Triples:
    """left (blocks, rank, D_left), values (blocks, rank) descending, right (blocks, rank, D_right); the largest
    residual |Z^T u - s v| over the largest value, (blocks,); products taken, 0-d int32."""

    left: Array
    values: Array
    right: Array
    residual: Array
    matvecs: Array


def leading(
    times: Product, transposed: Product, start: tuple[Array, Array], rank: int, steps: int, tolerance: float, limit: int
) -> Triples:
    """The `rank` largest singular triples of Z, times(v) = Z v and transposed(u) = Z^T u.

    start   a left vector (its shape counts only) and the right vector to begin with; `steps` new vectors a cycle, at
    most `limit` cycles; stops where every block's residual is at most `tolerance`, never under 100 eps.
    """
    left, right = start
    xp = namespace(right)
    tolerance = max(tolerance, 100.0 * eps(right.dtype, xp))
    kept_left = xp.stack([xp.zeros_like(left)] * rank, axis=1)
    kept_right = xp.stack([xp.zeros_like(right)] * rank, axis=1)
    values = xp.zeros((right.shape[0], rank), dtype=right.dtype, device=device_of(right))
    residual = values[:, 0] + float("inf")
    matvecs = xp.zeros((), dtype=xp.int32, device=device_of(right))

    def unfinished(carry: Carry) -> Array:
        return xp.any(carry[4] > tolerance)

    def again(carry: Carry) -> Carry:
        left, right, values, q, _, matvecs = carry
        return (*_cycle(times, transposed, left, right, values, q, steps), matvecs + 2 * steps)

    first = (kept_left, kept_right, values, _unit(right, _norm(right))[0], residual, matvecs)
    left, right, values, _, residual, matvecs = loop(unfinished, again, first, limit)
    return Triples(left, values, right, residual, matvecs)


def _cycle(
    times: Product, transposed: Product, left: Array, right: Array, values: Array, q: Array, steps: int
) -> tuple[Array, Array, Array, Array, Array]:
    """Kept triples and the next right vector after `steps` more vectors; the residual.

    Bases and projected matrix have their final shapes from the start: rows not reached yet are zero.
    """
    xp = namespace(q)
    rank = values.shape[1]
    size = rank + steps
    eye = xp.eye(size, dtype=q.dtype, device=device_of(q))
    P = _padded(left, size)
    Q = _padded(right, size)
    projected = eye[None, ...] * _padded(values, size)[:, :, None]
    top = xp.max(values, axis=1)
    beta = xp.zeros_like(values[:, 0])
    for at in range(rank, size):
        place = eye[at, :]
        Q = _with_row(Q, at, q)
        w = times(q)
        top = xp.maximum(top, _norm(w))
        w, coefficients = _orthogonalised(w, P, at)
        p, alpha = _unit(w, top)
        projected = projected + (coefficients + alpha[:, None] * place)[:, :, None] * place
        P = _with_row(P, at, p)
        z = transposed(p)
        top = xp.maximum(top, _norm(z))
        q, beta = _unit(_orthogonalised(z, Q, at + 1)[0], top)
    x, values, y = _svd(projected, rank)
    left = xp.matmul(x.mT, P)
    right = xp.matmul(y.mT, Q)
    safe = xp.where(top > 0, top, xp.ones_like(top))
    residual = xp.max(xp.abs(beta[:, None] * x[:, -1, :]), axis=1) / safe
    return left, right, values, q, residual


def _with_row(rows: Array, at: int, row: Array) -> Array:
    """`rows` (blocks, many, D), which nobody else holds, with another one at `at`: arrays may be immutable."""
    if is_numpy(rows):
        rows[:, at, :] = row
        return rows
    return namespace(rows).concat([rows[:, :at, :], row[:, None, :], rows[:, at + 1 :, :]], axis=1)


def _padded(x: Array, size: int) -> Array:
    """x with zeros after its entries on the second axis, up to `size`."""
    xp = namespace(x)
    shape = (x.shape[0], size - x.shape[1], *x.shape[2:])
    return xp.concat([x, xp.zeros(shape, dtype=x.dtype, device=device_of(x))], axis=1)


def _orthogonalised(x: Array, rows: Array, filled: int) -> tuple[Array, Array]:
    """x less its part in the span of the first `filled` rows, orthonormal or zero as all after them are, and the
    coefficients of that part."""
    xp = namespace(x)
    # elsewhere every product has one shape, which is compiled once
    known = rows[:, :filled, :] if is_numpy(rows) else rows
    total = xp.zeros_like(known[:, :, 0])
    for _ in range(2):
        coefficients = xp.matmul(known, x[:, :, None])[:, :, 0]
        x = x - xp.matmul(known.mT, coefficients[:, :, None])[:, :, 0]
        total = total + coefficients
    return x, _padded(total, rows.shape[1])


def _unit(x: Array, scale: Array) -> tuple[Array, Array]:
    """x over its norm, and the norm; zero where it is rounding of `scale`."""
    xp = namespace(x)
    norm = _norm(x)
    real = norm > 1e3 * eps(x.dtype, xp) * scale
    norm = xp.where(real, norm, xp.zeros_like(norm))
    return xp.where(real[:, None], x, xp.zeros_like(x)) / xp.where(real, norm, xp.ones_like(norm))[:, None], norm


def _norm(x: Array) -> Array:
    return namespace(x).linalg.vector_norm(x, axis=-1)


def _svd(x: Array, rank: int) -> tuple[Array, Array, Array]:
    """Leading triples of small square matrices from the eigenpairs of [[0, x], [x^T, 0]]: columns u, values, v."""
    xp = namespace(x)
    size = x.shape[-1]
    zero = xp.zeros_like(x)
    whole = xp.concat([xp.concat([zero, x], axis=2), xp.concat([x.mT, zero], axis=2)], axis=1)
    values, vectors, _ = kernels.eigh(whole)
    values = xp.flip(values[:, -rank:], axis=-1)
    values = xp.where(values > 0, values, xp.zeros_like(values))
    vectors = xp.flip(vectors[:, :, -rank:], axis=-1) * 2.0**0.5
    return vectors[:, :size, :], values, vectors[:, size:, :]
