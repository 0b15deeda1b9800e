"""Two forms over records, neither of which holds the Jacobian of a batch: J W J^T of each example, and <U, J> between
examples.

W (blocks, d_out, d_in) are weights in a `Basis`, J[v, b] = sum_s g[v, b, s] a[b, s]^T; a~ = a Qa and g~ = g Qg are rows
in the basis. One position needs no J at all: out[b, c, d] = sum_o g~[c, b, o] M[b, o] g~[d, b, o] with
M = (a~ * a~) W^T. Ids gather columns and are never one-hot; patches are unfolded in chunks.
Cost (x 2), beside one chunk of memory: `quadratic` of one position B (C d_out^2 + d_in^2 + d_in d_out + C^2 d_out), of
S positions B C (S + C) d_in d_out; `cross` of one position Q T d_in d_out, of S positions (Q + S) T d_in d_out.
"""

from __future__ import annotations

from dataclasses import replace

from kfaccore import xp as kernels
from kfaccore.linalg import side
from kfaccore.linalg.basis import Basis
from kfaccore.record import Ids, Record
from kfaccore.record.chunks import parts
from kfaccore.xp.arrays import Array, namespace


def quadratic(record: Record, basis: Basis, W: Array, diagonal: bool = False) -> Array:
    """J W J^T of each example, (batch, draws, draws), or its diagonal (batch, draws). ValueError for zero draws."""
    check_draws(record)
    xp = namespace(record.g)
    if isinstance(record.a, Ids) and not isinstance(basis.Qa, tuple) and side.is_diagonal(basis.Qa):
        form = _quadratic_of_ids
        each = record.shared * (record.draws * record.d_out + record.shared)
    elif record.shared == 1 and not isinstance(basis.Qa, tuple):
        form = _quadratic_of_rows
        each = record.blocks * (record.draws * record.d_out + record.d_in)
    else:
        form = _quadratic_of_jacobians
        each = record.blocks * record.draws * record.d_out * record.d_in
    many = kernels.read_again(each, W)
    return xp.concat([form(part, basis, W, diagonal) for part in parts(record, many)], axis=0)


def queries(record: Record, basis: Basis, W: Array) -> Array:
    """U (draws * batch, blocks, d_out, d_in): each gradient times W in the basis, and back out of it."""
    return basis.back(weighted(record, basis, W))


def weighted(record: Record, basis: Basis, W: Array) -> Array:
    """W * J~, `queries` before they leave the basis."""
    return W * namespace(record.g).reshape(jacobians(record, basis), (-1, *basis.shape))


def rotated(record: Record, basis: Basis) -> Record:
    """The record with its rows, patches unfolded, in the basis of two sides."""
    assert not isinstance(basis.Qa, tuple)
    a, g = _rotated(record, basis.Qg, basis.Qa)
    return replace(record, a=a, g=g)


def cross(U: Array, record: Record, positions: bool = False) -> Array:
    """<U_q, J_t>: (queries, draws * batch), draws outermost; with `positions` (queries, draws * batch, shared), what
    each position adds. U (queries, blocks, d_out, d_in). ValueError for zero draws."""
    check_draws(record)
    xp = namespace(U)
    count = U.shape[0]
    gathered = isinstance(record.a, Ids)
    rows = gathered or positions or (record.shared == 1 and count <= record.d_in)
    each = count * record.shared if rows else record.d_in
    # laid out once, blocks first: of one block it is a view
    B = xp.reshape(xp.permute_dims(U, (1, 0, 2, 3)), (record.blocks, -1, record.d_in)) if rows and not gathered else U
    found = []
    for part in parts(record, kernels.at_once(each * record.blocks * record.d_out)):
        if rows:
            z = _of_ids(U, part) if gathered else _of_rows(B, part)
            found.append(z if positions else xp.sum(z, axis=-1))
        else:
            found.append(_of_jacobians(U, part))
    whole = xp.concat(found, axis=2)
    return xp.reshape(whole, (count, -1, *whole.shape[3:]))


def check_draws(record: Record) -> None:
    """ValueError for a record without gradients."""
    if record.draws == 0:
        raise ValueError(
            "the record has zero draws (forward only), so no gradients: take records of type2, monte_carlo, empirical, "
            "or of an adapter's `outputs`"
        )


def jacobians(record: Record, basis: Basis | None = None) -> Array:
    """J in the basis, (draws, batch, blocks, d_out, d_in).

    Through the rows where that is cheaper, S (d_in^2 + C d_out^2) against C d_in d_out (d_in + d_out).
    """
    check_draws(record)
    xp = namespace(record.g)
    if basis is None or isinstance(basis.Qa, tuple):
        found = xp.permute_dims(_summed(record), (0, 2, 1, 3, 4))
        return found if basis is None else basis.into(found)
    by_rows = record.shared * (record.d_in**2 + record.draws * record.d_out**2)
    by_matrix = record.draws * record.d_in * record.d_out * (record.d_in + record.d_out)
    if isinstance(record.a, Ids) or by_rows > by_matrix:
        return basis.into(xp.permute_dims(_summed(record), (0, 2, 1, 3, 4)))
    a, g = _rotated(record, basis.Qg, basis.Qa)
    return xp.permute_dims(xp.matmul(g.mT, a[None, ...]), (0, 2, 1, 3, 4))


def _summed(record: Record) -> Array:
    """J (draws, blocks, batch, d_out, d_in); an embedding's rows are added into their columns."""
    if not isinstance(record.a, Ids):
        return record.examples()
    xp = namespace(record.g)
    index = record.a.index
    first = xp.arange(record.batch, dtype=index.dtype, device=kernels.device_of(index))[:, None] * record.a.size
    place = xp.reshape(index + first, (-1,))
    rows = [xp.reshape(record.g[v, 0, ...], (-1, record.d_out)) for v in range(record.draws)]
    sums = [kernels.segment_sum(r, place, record.batch * record.a.size) for r in rows]
    return xp.stack([xp.reshape(s, (1, record.batch, record.a.size, record.d_out)).mT for s in sums])


def _rotated(record: Record, Qg: Array, Qa: Array) -> tuple[Array, Array]:
    """a~ (blocks, batch, shared, d_in) and g~ (draws, blocks, batch, shared, d_out)."""
    if isinstance(record.a, Ids):  # a one-hot row times Qa is a row of Qa
        xp = namespace(Qa)
        a = xp.take(Qa[0, ...], xp.reshape(record.a.index, (-1,)), axis=0)
        a = xp.reshape(a, (1, record.batch, record.shared, -1))
    else:
        a = _turned(record.rows(), Qa)
    return a, _turned(record.g, Qg)


def _turned(x: Array, Q: Array) -> Array:
    """x Q for x (..., blocks, batch, shared, d), where Q may be diagonal."""
    return x * Q[:, None, None, :] if side.is_diagonal(Q) else kernels.turned(x, Q)


def _quadratic_of_rows(record: Record, basis: Basis, W: Array, diagonal: bool) -> Array:
    """One position; sums over blocks."""
    xp = namespace(W)
    assert not isinstance(basis.Qa, tuple)
    a, g = _rotated(record, basis.Qg, basis.Qa)
    a = a[:, :, 0, :]
    g = g[:, :, :, 0, :]
    M = xp.matmul(a * a, W.mT)
    if diagonal:
        return xp.sum(g * g * M[None, ...], axis=(1, 3)).mT
    h = xp.permute_dims(g, (1, 2, 0, 3))
    return xp.sum(xp.matmul(h * M[:, :, None, :], h.mT), axis=0)


def _quadratic_of_jacobians(record: Record, basis: Basis, W: Array, diagonal: bool) -> Array:
    """J~ (W J~)^T with J~ of this chunk."""
    xp = namespace(W)
    J = xp.permute_dims(jacobians(record, basis), (1, 0, 2, 3, 4))
    J = xp.reshape(J, (record.batch, record.draws, -1))
    weights = xp.reshape(W, (-1,))
    return xp.matmul(J * J, weights) if diagonal else xp.matmul(J, (J * weights).mT)


def _quadratic_of_ids(record: Record, basis: Basis, W: Array, diagonal: bool) -> Array:
    """Columns of J of other ids are zero: positions s, t meet where their ids are equal, in that column of W."""
    xp = namespace(W)
    index = record.a.index
    assert not isinstance(basis.Qa, tuple)
    own = basis.Qa[0, ...]
    columns = xp.take(W[0, ...] * (own * own), xp.reshape(index, (-1,)), axis=1)  # (d_out, batch * shared)
    columns = xp.reshape(columns.mT, (record.batch, record.shared, record.d_out))
    g = xp.permute_dims(_turned(record.g, basis.Qg)[:, 0, ...], (1, 0, 2, 3))  # (batch, draws, shared, d_out)
    same = xp.astype(index[:, :, None] == index[:, None, :], g.dtype)
    met = xp.matmul(same[:, None, :, :], g) * columns[:, None, :, :]
    if diagonal:
        return xp.sum(g * met, axis=(2, 3))
    flat = (record.batch, record.draws, -1)
    return xp.matmul(xp.reshape(g, flat), xp.reshape(met, flat).mT)


def _of_rows(B: Array, record: Record) -> Array:
    """g . (U a) of each position, (queries, draws, batch, shared), from U as B (blocks, queries * d_out, d_in)."""
    xp = namespace(B)
    count = B.shape[1] // record.d_out
    a = xp.reshape(record.rows(), (record.blocks, -1, record.d_in))
    z = xp.reshape(xp.matmul(a, B.mT), (record.blocks, -1, count, record.d_out))
    g = xp.reshape(record.g, (record.draws, record.blocks, -1, record.d_out, 1))
    dots = xp.sum(xp.matmul(z[None, ...], g)[..., 0], axis=1)  # (draws, batch * shared, queries)
    return xp.reshape(xp.permute_dims(dots, (2, 0, 1)), (count, record.draws, record.batch, record.shared))


def _of_ids(U: Array, record: Record) -> Array:
    """As `_of_rows`: U a is a column of U."""
    xp = namespace(U)
    count = U.shape[0]
    z = xp.take(U[:, 0, ...], xp.reshape(record.a.index, (-1,)), axis=2).mT[:, None, ...]
    g = xp.reshape(record.g, (1, record.draws, -1, record.d_out))
    return xp.reshape(xp.vecdot(z, g), (count, record.draws, record.batch, record.shared))


def _of_jacobians(U: Array, record: Record) -> Array:
    """(queries, draws, batch) by J of this chunk and one product."""
    xp = namespace(U)
    J = xp.reshape(jacobians(record), (record.draws * record.batch, -1))
    found = xp.matmul(xp.reshape(U, (U.shape[0], -1)), J.mT)
    return xp.reshape(found, (U.shape[0], record.draws, record.batch))
