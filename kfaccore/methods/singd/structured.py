"""Matrices K in a set closed under +, scalars and products that holds I.

A structure is a frozen object; its matrices are dicts of arrays ("parts"), one tree a factor. Symmetric matrices enter
through Pi, which keeps what the structure keeps of M and doubles an entry whose transposed partner it does not hold, so
that <Pi(M), X> = <M, X> up to the structure's own averaging for every X inside. No method here forms (d, d) unless
the structure is dense; `dense`, `project` and `take` are for tests and analysis.
Source: Lin et al. 2024 (2312.05705), the structures and their projection.
"""

from __future__ import annotations

from typing import Protocol

from kfaccore import tree
from kfaccore.xp.arrays import Array, namespace, place

Parts = dict[str, Array]


class Structure(Protocol):
    """What each structure offers; x and s are rows (blocks, rows, d)."""

    def eye(self, blocks: int, d: int, like: Array) -> Parts:
        """The identity, in the namespace, dtype and device of `like`."""
        ...

    def times(self, x: Array, K: Parts) -> Array:
        """x K."""
        ...

    def times_transposed(self, x: Array, K: Parts) -> Array:
        """x K^T."""
        ...

    def product(self, K: Parts, M: Parts) -> Parts:
        """K M."""
        ...

    def gram(self, s: Array) -> Parts:
        """Pi(s^T s)."""
        ...

    def inner(self, K: Parts) -> Parts:
        """Pi(K^T K)."""
        ...

    def size(self, K: Parts) -> int:
        """d."""
        ...

    def trace(self, K: Parts) -> Array:
        """tr K, (blocks,)."""
        ...

    def square(self, K: Parts) -> Array:
        """|K|_F^2 = tr(K^T K), (blocks,)."""
        ...

    def dense(self, K: Parts) -> Array:
        """K itself (blocks, d, d)."""
        ...

    def project(self, M: Array) -> Parts:
        """Pi(M) of a symmetric M (blocks, d, d)."""
        ...

    def take(self, M: Array) -> Parts:
        """The parts of an M that is inside."""
        ...


def largest(K: Parts) -> Array:
    """Largest absolute entry, (blocks,)."""
    found = [namespace(x).max(namespace(x).abs(_flat(x)), axis=-1) for x in K.values() if 0 not in x.shape]
    top = found[0]
    for other in found[1:]:
        top = namespace(top).maximum(top, other)
    return top


def combine(a: Array | float, K: Parts, b: Array | float, M: Parts) -> Parts:
    """a K + b M for numbers or (blocks,) arrays a, b."""
    return tree.map(lambda x, y: per_block(a, x) * x + per_block(b, y) * y, K, M)


def scaled(a: Array | float, K: Parts) -> Parts:
    """a K."""
    return tree.map(lambda x: per_block(a, x) * x, K)


def per_block(value: Array | float, like: Array) -> Array | float:
    """A number, or (blocks,) shaped to multiply `like` (blocks, ...)."""
    if isinstance(value, int | float):
        return value
    return namespace(value).reshape(value, (-1, *(1,) * (like.ndim - 1)))


def eye(blocks: int, d: int, like: Array) -> Array:
    """Identities (blocks, d, d) of their own memory."""
    xp = namespace(like)
    zeros = xp.zeros((blocks, d, d), **place(like))
    return zeros + xp.eye(d, **place(like))


def filled(value: float, shape: tuple[int, ...], like: Array) -> Array:
    """An array of one number."""
    return namespace(like).full(shape, value, **place(like))


def diagonal(M: Array) -> Array:
    """Diagonal over the last two axes, as its own array."""
    return namespace(M).linalg.diagonal(M) + 0


def diagonal_matrix(x: Array) -> Array:
    """(blocks, d) as diagonal matrices."""
    return x[:, :, None] * eye(1, x.shape[1], x)


def _flat(x: Array) -> Array:
    return namespace(x).reshape(x, (x.shape[0], -1))


def total(x: Array) -> Array:
    """Sum over all but the blocks, (blocks,)."""
    return namespace(x).sum(_flat(x), axis=-1)
