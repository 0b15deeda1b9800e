"""F of a layer through rows of examples: F v = sum_e share_e <J_e, v> J_e with J_e the sum of g_r a_r^T over its rows.

Source: Amari 1998 for F; rows instead of J are what makes a product cheap.
Cost: a product 2 rows d_in d_out; a solve rows^2 (d_in + d_out) + rows^3.
"""

from __future__ import annotations

from kfaccore import xp as kernels
from kfaccore.methods.rows.examples import Examples
from kfaccore.methods.rows.stack import debiased
from kfaccore.xp.arrays import Array, device_of, namespace


def product(state: Examples, v: Array) -> Array:
    """F v."""
    xp = namespace(v)
    inner = per_example(state, _inner(state, v))
    return xp.matmul((state.g * (inner * shares(state))[:, :, None]).mT, state.a)


def per_example(state: Examples, values: Array) -> Array:
    """Each row's value (blocks, capacity) replaced by the sum over its example's rows."""
    xp = namespace(values)
    blocks, capacity = values.shape
    # an example's number is below the capacity, so number + block * capacity tells apart the examples of all blocks
    start = xp.arange(blocks, dtype=state.number.dtype, device=device_of(values))[:, None] * capacity
    slot = xp.reshape(state.number + start, (-1,))
    given = xp.where(state.share > 0, values, xp.zeros_like(values))  # empty rows have number 0 as the newest example
    total = kernels.segment_sum(xp.reshape(given, (-1, 1)), slot, blocks * capacity)
    return xp.reshape(xp.take(total[:, 0], slot), values.shape)


def shares(state: Examples) -> Array:
    """Each row's weight in F, debiased."""
    return debiased(state.share, state.mass)


def diagonal(state: Examples) -> Array:
    """diag(F) as (blocks, d_out, d_in) if every row were an example of its own."""
    xp = namespace(state.a)
    return xp.matmul((state.g**2 * shares(state)[:, :, None]).mT, state.a**2)


def mean_eigenvalue(state: Examples) -> Array:
    """tr(F) / (d_in d_out) if every row were an example of its own, (blocks,)."""
    xp = namespace(state.a)
    squares = xp.sum(state.a**2, axis=-1) * xp.sum(state.g**2, axis=-1) * shares(state)
    return xp.sum(squares, axis=-1) / (state.a.shape[-1] * state.g.shape[-1])


def solve(state: Examples, v: Array, shift: Array) -> tuple[Array, Array]:
    """(F + shift I)^-1 v for any v and shift (blocks,), by a system of the size of the rows; and a code.

    (v - sum_e y_e J_e) / shift with (K + shift / share) y = <J, v>, K the inner products of the J. No iteration. With
    no more parameters than rows, where that difference would leave nothing but rounding, F itself is inverted.
    """
    xp = namespace(v)
    device = device_of(v)
    index = xp.arange(state.number.shape[1], dtype=state.number.dtype, device=device)
    member = xp.astype(state.number[:, None, :] == index[:, None], v.dtype)  # [e, r]: row r is of example e
    root = member * xp.sqrt(shares(state))[:, None, :]
    if v.shape[1] * v.shape[2] <= root.shape[1]:
        rows = state.g[:, :, :, None] * state.a[:, :, None, :]
        J = xp.matmul(root, xp.reshape(rows, (*rows.shape[:2], -1)))
        return inverted(kernels.gram(J), v, shift)
    K = xp.matmul(state.a, state.a.mT) * xp.matmul(state.g, state.g.mT)  # <g_r a_r^T, g_s a_s^T> of pairs of rows
    eye = xp.eye(K.shape[-1], dtype=v.dtype, device=device)
    system = xp.matmul(xp.matmul(root, K), root.mT) + shift[:, None, None] * eye
    inverse, code = kernels.spd_inverse(system)
    y = xp.matmul(root.mT, xp.matmul(inverse, xp.matmul(root, _inner(state, v)[:, :, None])))
    return (v - xp.matmul((state.g * y).mT, state.a)) / shift[:, None, None], code


def inverted(F: Array, v: Array, shift: Array) -> tuple[Array, Array]:
    """(F + shift I)^-1 v for a dense block F (blocks, D, D), and a code."""
    xp = namespace(v)
    eye = xp.eye(F.shape[-1], dtype=F.dtype, device=device_of(F))
    inverse, code = kernels.spd_inverse(F + shift[:, None, None] * eye)
    return xp.reshape(xp.matmul(inverse, xp.reshape(v, (v.shape[0], -1, 1))), v.shape), code


def _inner(state: Examples, v: Array) -> Array:
    """<g_r a_r^T, v> of each row, (blocks, capacity)."""
    xp = namespace(v)
    return xp.sum(xp.matmul(state.g, v) * state.a, axis=-1)
