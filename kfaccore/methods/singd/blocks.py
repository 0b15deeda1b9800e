"""The structures whose Pi keeps entries as they are: dense, diagonal, block-diagonal.

Source: Lin et al. 2024 (2312.05705).
Cost: rows d^2, rows d, rows k d a product; memory d^2, d, k d.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kfaccore import tree
from kfaccore import xp as kernels
from kfaccore.methods.singd.structured import Parts, diagonal, diagonal_matrix, eye, filled, total
from kfaccore.xp.arrays import Array, namespace
from kfaccore.xp.ranges import COUNT, ranged


@dataclass(frozen=True)
class Dense:
    """All matrices; Pi is the identity. Memory d^2."""

    def eye(self, blocks: int, d: int, like: Array) -> Parts:
        return {"M": eye(blocks, d, like)}

    def times(self, x: Array, K: Parts) -> Array:
        return namespace(x).matmul(x, K["M"])

    def times_transposed(self, x: Array, K: Parts) -> Array:
        return namespace(x).matmul(x, K["M"].mT)

    def product(self, K: Parts, M: Parts) -> Parts:
        return {"M": namespace(K["M"]).matmul(K["M"], M["M"])}

    def gram(self, s: Array) -> Parts:
        return {"M": kernels.gram(s)}

    def inner(self, K: Parts) -> Parts:
        return {"M": kernels.gram(K["M"])}

    def size(self, K: Parts) -> int:
        return K["M"].shape[-1]

    def trace(self, K: Parts) -> Array:
        return total(diagonal(K["M"]))

    def square(self, K: Parts) -> Array:
        return total(K["M"] * K["M"])

    def dense(self, K: Parts) -> Array:
        return K["M"]

    def project(self, M: Array) -> Parts:
        return {"M": M}

    take = project


@dataclass(frozen=True)
class Diagonal:
    """Diagonal matrices. Memory d; an embedding's K is one, its inputs being unit rows."""

    def eye(self, blocks: int, d: int, like: Array) -> Parts:
        return {"C": filled(1.0, (blocks, d), like)}

    def times(self, x: Array, K: Parts) -> Array:
        return x * K["C"][:, None, :]

    times_transposed = times

    def product(self, K: Parts, M: Parts) -> Parts:
        return {"C": K["C"] * M["C"]}

    def gram(self, s: Array) -> Parts:
        return {"C": namespace(s).sum(s * s, axis=1)}

    def inner(self, K: Parts) -> Parts:
        return {"C": K["C"] * K["C"]}

    def size(self, K: Parts) -> int:
        return K["C"].shape[-1]

    def trace(self, K: Parts) -> Array:
        return total(K["C"])

    def square(self, K: Parts) -> Array:
        return total(K["C"] * K["C"])

    def dense(self, K: Parts) -> Array:
        return diagonal_matrix(K["C"])

    def project(self, M: Array) -> Parts:
        return {"C": diagonal(M)}

    take = project


@dataclass(frozen=True)
class BlockDiagonal:
    """k x k blocks on the diagonal, the last d mod k wide; Pi keeps the blocks. Memory k d."""

    k: int = 30

    def __post_init__(self) -> None:
        ranged(self, k=COUNT)

    def eye(self, blocks: int, d: int, like: Array) -> Parts:
        full, rest = divmod(d, self.k)
        one = eye(1, self.k, like)[0, ...]
        B = filled(0.0, (blocks, full, self.k, self.k), like) + one
        return {"B": B, "last": eye(blocks, rest, like)}

    def times(self, x: Array, K: Parts) -> Array:
        return self._each(x, K, lambda part, M: namespace(part).matmul(part, M))

    def times_transposed(self, x: Array, K: Parts) -> Array:
        return self._each(x, K, lambda part, M: namespace(part).matmul(part, M.mT))

    def product(self, K: Parts, M: Parts) -> Parts:
        return tree.map(lambda a, b: namespace(a).matmul(a, b), K, M)

    def gram(self, s: Array) -> Parts:
        xp = namespace(s)
        body, last = self._split(s)
        return {"B": xp.matmul(body.mT, body), "last": xp.matmul(last.mT, last)}

    def inner(self, K: Parts) -> Parts:
        return tree.map(lambda x: namespace(x).matmul(x.mT, x), K)

    def size(self, K: Parts) -> int:
        return K["B"].shape[1] * self.k + K["last"].shape[-1]

    def trace(self, K: Parts) -> Array:
        return total(diagonal(K["B"])) + total(diagonal(K["last"]))

    def square(self, K: Parts) -> Array:
        return total(K["B"] * K["B"]) + total(K["last"] * K["last"])

    def dense(self, K: Parts) -> Array:
        return self.times(eye(K["B"].shape[0], self.size(K), K["B"]), K)

    def project(self, M: Array) -> Parts:
        xp = namespace(M)
        full = M.shape[-1] // self.k
        spans = [slice(i * self.k, (i + 1) * self.k) for i in range(full)]
        B = [M[:, s, s] for s in spans]
        last = slice(full * self.k, M.shape[-1])
        none = filled(0.0, (M.shape[0], 0, self.k, self.k), M)  # of a d below k
        return {"B": xp.stack(B, axis=1) if B else none, "last": M[:, last, last]}

    take = project

    def _split(self, x: Array) -> tuple[Array, Array]:
        """Rows as (blocks, d // k, rows, k) and (blocks, rows, d mod k)."""
        xp = namespace(x)
        blocks, rows, d = x.shape
        full = d // self.k
        body = xp.reshape(x[:, :, : full * self.k], (blocks, rows, full, self.k))
        return xp.permute_dims(body, (0, 2, 1, 3)), x[:, :, full * self.k :]

    def _each(self, x: Array, K: Parts, function: Callable[[Array, Array], Array]) -> Array:
        xp = namespace(x)
        body, last = self._split(x)
        body = xp.permute_dims(function(body, K["B"]), (0, 2, 1, 3))
        body = xp.reshape(body, (*x.shape[:2], body.shape[2] * self.k))
        return xp.concat([body, function(last, K["last"])], axis=-1)
