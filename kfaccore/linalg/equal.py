"""Eigenvalues that are equal up to rounding: rounding picks one of the bases of their space, and with it an order."""

from __future__ import annotations

from kfaccore import xp as kernels
from kfaccore.linalg import side
from kfaccore.xp.arrays import Array, device_of, eps, is_numpy, loop, namespace, select

_SINGLE = 2.0**-23  # eps of the narrowest dtype that eigenvectors are sought in
_NULL = 16.0  # times eps of the largest eigenvalue is 0; eigh of a singular gram leaves up to 1.5
_GAP = 0.75  # neighbours nearer than eps^.75 of the largest are equal; rounding put equal ones up to 19 eps apart
_WIDTH = 0.01  # of an eigenvalue, the distance to the furthest that is equal; rounding made 120 eps of 1,000 equal ones
_PRIME = 32749  # the largest whose square, and itself once more, fits 31 bits


def tolerance(x: Array) -> float:
    """Of the largest, how near numbers that come of eigenvectors may be to be equal."""
    return _rounding(x) ** _GAP


def null(x: Array, largest: Array) -> Array:
    """Where an eigenvalue x of a positive matrix is 0, of a spectrum up to `largest`."""
    return x <= _NULL * _rounding(x) * largest


def near(x: Array, y: Array, largest: Array) -> Array:
    """Where an eigenvalue x >= y is equal to y, of a spectrum up to `largest`."""
    distance = x - y
    return (distance == 0) | null(x, largest) | ((distance <= tolerance(x) * largest) & (distance <= _WIDTH * y))


def same(values: Array, Q: Array) -> Array:
    """Which pairs of eigenvectors Q have one eigenvalue, (blocks, d, d); equal ones must be neighbours in `values`.

    Neighbours without a gap do, where no two of them are further apart than rounding puts equal ones: a dense tail of
    a spectrum has no gaps either. An eigenvector on a single coordinate was not picked by rounding and stays.
    """
    xp = namespace(values)
    rounding = _rounding(values)
    largest = xp.max(values, axis=-1, keepdims=True)
    zero = null(values, largest)
    gap = xp.abs(values[:, 1:] - values[:, :-1]) > tolerance(values) * largest
    gap = gap | (zero[:, :-1] & ~zero[:, 1:]) | (~zero[:, :-1] & zero[:, 1:])
    run = xp.cumulative_sum(xp.astype(gap, values.dtype), axis=-1, include_initial=True)
    joined = run[:, :, None] == run[:, None, :]
    distance = xp.abs(values[:, :, None] - values[:, None, :])
    far = xp.any(joined & (distance > _WIDTH * values[:, None, :]), axis=-1)
    wide = xp.any(joined & far[:, None, :], axis=-1)
    single = xp.max(xp.abs(Q), axis=-2) >= 1.0 - _NULL * rounding
    stays = (wide | single) & ~zero
    itself = xp.astype(xp.eye(values.shape[-1], device=device_of(values)), xp.bool)
    return itself | (joined & ~stays[:, :, None] & ~stays[:, None, :])


def settled(values: Array, Q: Array, again: bool = False) -> Array:
    """Q with the basis of each space of one eigenvalue that fixed vectors make: it does not depend on rounding.

    The space's projections of as many fixed vectors, orthonormalised in their order; what is alone stays as it is.
    Q (blocks, d, k) may hold some of the eigenvectors, or the diagonal of a side that has the standard ones. What
    stayed of a settled Q is settled `again` by other vectors: it is orthogonal to those that made what went.
    """
    if side.is_diagonal(Q):
        return Q
    xp = namespace(Q)
    equal = same(values, Q)
    if is_numpy(values) and xp.sum(equal) == values.size:
        return Q
    counts = xp.sum(xp.astype(equal, Q.dtype), axis=-1)
    seen = xp.matmul(Q.mT, _fixed(Q, again)[None, ...])  # of each fixed vector, its part along each eigenvector
    eye = xp.eye(Q.shape[-1], dtype=Q.dtype, device=device_of(Q))
    seen = xp.where(equal, seen, xp.zeros_like(seen))
    turn, _ = kernels.qr(xp.where((counts == 1)[:, :, None], eye, seen))  # zeros between two spaces stay zeros
    return xp.matmul(Q, turn)


def weighed(values: Array, Q: Array) -> Array:
    """A matrix (blocks, k, k) whose eigenvectors, in ascending order, turn Q: in each space of one eigenvalue to the
    basis in which fixed weights are diagonal.

    It does not depend on rounding, and what stays of it once some of it went is that of the rest, as often as that
    happens: that of `settled` is orthogonal to the vectors that made what went.
    """
    xp = namespace(values)
    equal = same(values, Q)
    weights = _fixed(Q)[:, :1]  # in (-1/2, 1/2)
    inner = xp.where(equal, xp.matmul(Q.mT, weights * Q), xp.zeros_like(equal, dtype=Q.dtype))
    place = xp.arange(Q.shape[-1], device=device_of(Q))
    before = xp.sum(xp.astype(~equal & (place[None, :] < place[:, None]), Q.dtype), axis=-1)
    eye = xp.eye(Q.shape[-1], dtype=Q.dtype, device=device_of(Q))
    # the spectra of the spaces lie one behind the other, so that each keeps its columns
    return inner + eye * (2 * before)[:, None, :]


def leading(values: Array, Q: Array, k: int) -> tuple[Array, Array]:
    """The last k of ascending eigenvalues (blocks, m) and of their eigenvectors Q (blocks, d, m).

    Where the cut goes through a space of one eigenvalue, its basis is settled first: rounding does not choose who
    stays. Of eigenvalue 0 anybody may.
    """
    cut = values.shape[-1] - k
    if 0 < cut < values.shape[-1]:
        Q = _settled_at(values, Q, values[:, cut], values[:, cut - 1], again=False)
    return values[:, cut:], Q[:, :, cut:]


def counted(values: Array, Q: Array, count: Array) -> Array:
    """What `leading` gave for whoever uses its last `count` (blocks,) alone, integers: settled in the same cases."""
    xp = namespace(values)
    place = xp.arange(values.shape[-1], dtype=count.dtype, device=device_of(count))[None, :]
    cut = values.shape[-1] - count[:, None]

    def at(where: Array) -> Array:
        return xp.sum(xp.where(where, values, xp.zeros_like(values)), axis=-1)

    return _settled_at(values, Q, at(place == cut), at(place == cut - 1), again=True)


def _settled_at(values: Array, Q: Array, first: Array, last: Array, again: bool) -> Array:
    """Q, settled in blocks whose `first` eigenvalue that stays is equal to the `last` that goes, unless both are 0."""
    xp = namespace(values)
    top = values[:, -1]
    tied = near(first, last, top) & ~null(first, top) & (last > 0)
    # a loop of at most one turn: made only where it is needed, also under a trace
    (Q,) = loop(lambda _: xp.any(tied), lambda x: (select(tied, settled(values, x[0], again), x[0]),), (Q,), 1)
    return Q


def _rounding(x: Array) -> float:
    """eps of the dtype in which eigenvectors are sought."""
    return min(eps(x.dtype, namespace(x)), _SINGLE)


def _fixed(Q: Array, others: bool = False) -> Array:
    """Fixed vectors (d, k) in general position, entries uniform in (-1/2, 1/2): integers, so the same everywhere."""
    xp = namespace(Q)
    d, k = Q.shape[-2:]
    start = d + 1 if others else 1
    row = xp.arange(1, d + 1, dtype=xp.int32, device=device_of(Q)) * 12345 % _PRIME
    column = xp.arange(start, start + k, dtype=xp.int32, device=device_of(Q)) * 12345 % _PRIME
    mixed = row[:, None] * row[:, None] + 17 * column[None, :] + 5
    for _ in range(3):
        mixed = mixed % _PRIME
        mixed = mixed * mixed + column[None, :]
    return xp.astype(mixed % _PRIME, Q.dtype) / _PRIME - 0.5
