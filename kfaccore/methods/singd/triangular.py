"""Triangular and hierarchical matrices: a dense corner or two, a diagonal, and the strips that join them.

    T = [[A, B1, B2],        A (k1, k1) and E (k2, k2) dense, C a diagonal of d - k1 - k2,
         [0,  C,  0],        B1 (k1, d - k1 - k2), B2 (k1, k2), D (k2, d - k1 - k2)
         [0,  D,  E]]

k2 = 0 is upper triangular with its dense corner first, k1 = 0 lower triangular with it last; `Transposed` gives their
mirrors. Pi doubles the strips B1, B2 and D: their transposed partners are outside. A dimension below k1 + k2 fills A,
then E.
Source: Lin et al. 2024 (2312.05705): hierarchical, rank-1 and rank-k triangular.
Cost: rows (k1 + k2) d a product; memory (k1 + k2) d.
"""

from __future__ import annotations

from dataclasses import dataclass

from kfaccore.methods.singd.blocks import Dense, Diagonal
from kfaccore.methods.singd.structured import Parts, Structure, diagonal, eye, filled
from kfaccore.xp.arrays import Array, namespace
from kfaccore.xp.ranges import SOME, ranged

_dense = Dense()
_diagonal = Diagonal()


@dataclass(frozen=True)
class Hierarchical:
    """k1 leading and k2 trailing dense dimensions."""

    k1: int = 15
    k2: int = 15

    def __post_init__(self) -> None:
        ranged(self, k1=SOME, k2=SOME)

    def eye(self, blocks: int, d: int, like: Array) -> Parts:
        n1, n2 = self._sizes(d)
        middle = d - n1 - n2
        return {
            "A": eye(blocks, n1, like),
            "B1": filled(0.0, (blocks, n1, middle), like),
            "B2": filled(0.0, (blocks, n1, n2), like),
            "C": filled(1.0, (blocks, middle), like),
            "D": filled(0.0, (blocks, n2, middle), like),
            "E": eye(blocks, n2, like),
        }

    def times(self, x: Array, K: Parts) -> Array:
        xp = namespace(x)
        x1, x2, x3 = self._rows(x)
        middle = xp.matmul(x1, K["B1"]) + x2 * K["C"][:, None, :] + xp.matmul(x3, K["D"])
        return xp.concat([xp.matmul(x1, K["A"]), middle, xp.matmul(x1, K["B2"]) + xp.matmul(x3, K["E"])], axis=-1)

    def times_transposed(self, x: Array, K: Parts) -> Array:
        xp = namespace(x)
        x1, x2, x3 = self._rows(x)
        first = xp.matmul(x1, K["A"].mT) + xp.matmul(x2, K["B1"].mT) + xp.matmul(x3, K["B2"].mT)
        last = xp.matmul(x2, K["D"].mT) + xp.matmul(x3, K["E"].mT)
        return xp.concat([first, x2 * K["C"][:, None, :], last], axis=-1)

    def product(self, K: Parts, M: Parts) -> Parts:
        xp = namespace(K["A"])
        c = M["C"][:, None, :]
        return {
            "A": xp.matmul(K["A"], M["A"]),
            "B1": xp.matmul(K["A"], M["B1"]) + K["B1"] * c + xp.matmul(K["B2"], M["D"]),
            "B2": xp.matmul(K["A"], M["B2"]) + xp.matmul(K["B2"], M["E"]),
            "C": K["C"] * M["C"],
            "D": K["D"] * c + xp.matmul(K["E"], M["D"]),
            "E": xp.matmul(K["E"], M["E"]),
        }

    def gram(self, s: Array) -> Parts:
        xp = namespace(s)
        s1, s2, s3 = self._rows(s)
        return {
            "A": xp.matmul(s1.mT, s1),
            "B1": 2 * xp.matmul(s1.mT, s2),
            "B2": 2 * xp.matmul(s1.mT, s3),
            "C": xp.sum(s2 * s2, axis=1),
            "D": 2 * xp.matmul(s3.mT, s2),
            "E": xp.matmul(s3.mT, s3),
        }

    def inner(self, K: Parts) -> Parts:
        xp = namespace(K["A"])
        A, B1, B2, C, D, E = _entries(K)
        return {
            "A": xp.matmul(A.mT, A),
            "B1": 2 * xp.matmul(A.mT, B1),
            "B2": 2 * xp.matmul(A.mT, B2),
            "C": xp.sum(B1 * B1, axis=1) + C * C + xp.sum(D * D, axis=1),
            "D": 2 * (xp.matmul(B2.mT, B1) + xp.matmul(E.mT, D)),
            "E": xp.matmul(B2.mT, B2) + xp.matmul(E.mT, E),
        }

    def outer(self, K: Parts) -> Parts:
        """Pi(T T^T): what `inner` is to the transposed structure."""
        xp = namespace(K["A"])
        A, B1, B2, C, D, E = _entries(K)
        c = C[:, None, :]
        return {
            "A": xp.matmul(A, A.mT) + xp.matmul(B1, B1.mT) + xp.matmul(B2, B2.mT),
            "B1": 2 * B1 * c,
            "B2": 2 * (xp.matmul(B1, D.mT) + xp.matmul(B2, E.mT)),
            "C": C * C,
            "D": 2 * D * c,
            "E": xp.matmul(D, D.mT) + xp.matmul(E, E.mT),
        }

    def size(self, K: Parts) -> int:
        return K["A"].shape[-1] + K["C"].shape[-1] + K["E"].shape[-1]

    def trace(self, K: Parts) -> Array:
        return _dense.trace({"M": K["A"]}) + _diagonal.trace(K) + _dense.trace({"M": K["E"]})

    def square(self, K: Parts) -> Array:
        corners = sum(_dense.square({"M": K[name]}) for name in ("A", "B1", "B2", "D", "E"))
        return corners + _diagonal.square(K)

    def dense(self, K: Parts) -> Array:
        return self.times(eye(K["A"].shape[0], self.size(K), K["A"]), K)

    def project(self, M: Array) -> Parts:
        kept = self.take(M)
        return {name: 2 * x if name in ("B1", "B2", "D") else x for name, x in kept.items()}

    def take(self, M: Array) -> Parts:
        n1, n2 = self._sizes(M.shape[-1])
        d = M.shape[-1]
        one = slice(0, n1)
        two = slice(n1, d - n2)
        three = slice(d - n2, d)
        return {
            "A": M[:, one, one],
            "B1": M[:, one, two],
            "B2": M[:, one, three],
            "C": diagonal(M[:, two, two]),
            "D": M[:, three, two],
            "E": M[:, three, three],
        }

    def _sizes(self, d: int) -> tuple[int, int]:
        n1 = min(self.k1, d)
        return n1, min(self.k2, d - n1)

    def _rows(self, x: Array) -> tuple[Array, Array, Array]:
        d = x.shape[-1]
        n1, n2 = self._sizes(d)
        return x[..., :n1], x[..., n1 : d - n2], x[..., d - n2 :]


@dataclass(frozen=True)
class Transposed:
    """K = T^T for T of `of`; the parts are T's."""

    of: Hierarchical = Hierarchical()

    def eye(self, blocks: int, d: int, like: Array) -> Parts:
        return self.of.eye(blocks, d, like)

    def times(self, x: Array, K: Parts) -> Array:
        return self.of.times_transposed(x, K)

    def times_transposed(self, x: Array, K: Parts) -> Array:
        return self.of.times(x, K)

    def product(self, K: Parts, M: Parts) -> Parts:
        return self.of.product(M, K)

    def gram(self, s: Array) -> Parts:
        return self.of.gram(s)

    def inner(self, K: Parts) -> Parts:
        return self.of.outer(K)

    def size(self, K: Parts) -> int:
        return self.of.size(K)

    def trace(self, K: Parts) -> Array:
        return self.of.trace(K)

    def square(self, K: Parts) -> Array:
        return self.of.square(K)

    def dense(self, K: Parts) -> Array:
        return self.of.dense(K).mT

    def project(self, M: Array) -> Parts:
        return self.of.project(M)

    def take(self, M: Array) -> Parts:
        return self.of.take(M.mT)


def _entries(K: Parts) -> tuple[Array, Array, Array, Array, Array, Array]:
    """A, B1, B2, C, D and E of the module's picture."""
    return K["A"], K["B1"], K["B2"], K["C"], K["D"], K["E"]


def upper(k: int = 1) -> Structure:
    """Upper triangular of rank k: [[A, B], [0, diagonal]]."""
    return Hierarchical(k, 0)


def lower(k: int = 1) -> Structure:
    """Lower triangular of rank k: [[A, 0], [B, diagonal]]."""
    return Transposed(Hierarchical(k, 0))


def upper_last(k: int = 1) -> Structure:
    """Upper triangular with its dense corner last: [[diagonal, B], [0, A]]."""
    return Transposed(Hierarchical(0, k))


def lower_last(k: int = 1) -> Structure:
    """Lower triangular with its dense corner last: [[diagonal, 0], [B, A]]."""
    return Hierarchical(0, k)
