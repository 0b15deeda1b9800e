"""Largest eigenpairs of symmetric positive semi-definite matrices from products with a thin random matrix.

Y = M Omega, then (passes - 1) times Y = M qr(Y), so span(Q) of Q = qr(Y) is that of M^passes Omega; every product is
orthonormalised before the next. The two variants differ in what they make of Q. A matrix that the sketch would fill
(rank + oversample >= d) is decomposed itself.
Source: Halko et al. 2011 (0909.4061); Puiu 2022 (2206.15397): RS-KFAC (Singular) and SRE-KFAC (Symmetric).
Cost: 2 (passes + 1) l d^2 with l = rank + oversample, plus l^2 d; memory l d.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kfaccore import xp as kernels
from kfaccore.linalg import equal
from kfaccore.xp.arrays import Array, all_finite, namespace, place, select
from kfaccore.xp.codes import Code, choose
from kfaccore.xp.ranges import COUNT, SOME, ranged

SKETCHES = "kf.Symmetric(passes, oversample, seed) or kf.Singular(...)"


class Sketch(Protocol):
    """A choice of `sketch`."""

    def draw(self, blocks: int, d: int, k: int, side: int, like: Array) -> Array:
        """The random matrix (blocks, d, l) of side number `side`, for k modes; d or l may be 0."""
        ...

    def modes(self, M: Array, omega: Array, k: int) -> tuple[Array, Array, Array]:
        """(U (blocks, d, k), ascending D (blocks, k), code) of M (blocks, d, d); INDEFINITE where M is not finite."""
        ...


@dataclass(frozen=True)
class Leading:
    """`sketch.modes` of k modes, as what may be asked for of many layers at once."""

    sketch: Sketch
    k: int

    def __call__(self, M: Array, omega: Array) -> tuple[Array, Array, Array]:
        return self.sketch.modes(M, omega, self.k)


@dataclass(frozen=True)
class Symmetric:
    """Rayleigh-Ritz in span(Q): eigenpairs of Q^T M Q. passes products with M, and one for the small matrix."""

    passes: int = 4
    oversample: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        ranged(self, passes=COUNT, oversample=SOME)

    def draw(self, blocks: int, d: int, k: int, side: int, like: Array) -> Array:
        """Omega (blocks, d, l), standard normal, from the seed and the number of the side; l = 0 where it would fill
        the matrix."""
        wide = min(k, d) + self.oversample
        rng = np.random.default_rng((self.seed, side))
        omega = rng.standard_normal((blocks, d, wide if wide < d else 0))
        return namespace(like).astype(kernels.from_host(omega.astype(np.float32), like), place(like)["dtype"])

    def modes(self, M: Array, omega: Array, k: int) -> tuple[Array, Array, Array]:
        """(U (blocks, d, k), ascending D (blocks, k), code) of M (blocks, d, d); INDEFINITE where M is not finite."""
        xp = namespace(M)
        code = choose(all_finite(M), Code.OK, Code.INDEFINITE)
        if omega.shape[-1] == 0:
            values, vectors, _ = kernels.eigh(M)
        else:
            M = select(code == int(Code.OK), M, xp.zeros_like(M))
            Y = xp.matmul(M, omega)
            for _ in range(self.passes - 1):
                Y = xp.matmul(M, kernels.qr(Y)[0])
            values, vectors = self._found(kernels.qr(Y)[0], M)
        values, vectors = equal.leading(values, vectors, k)
        return vectors, values, code

    def _found(self, Q: Array, M: Array) -> tuple[Array, Array]:
        xp = namespace(M)
        values, vectors, _ = kernels.eigh(xp.matmul(Q.mT, xp.matmul(M, Q)))
        return values, xp.matmul(Q, vectors)


@dataclass(frozen=True)
class Singular(Symmetric):
    """The singular value decomposition of Q^T M = W diag(D) V^T, of which V is kept: half a pass better than W."""

    def _found(self, Q: Array, M: Array) -> tuple[Array, Array]:
        xp = namespace(M)
        V, R = kernels.qr(xp.matmul(M, Q))
        left, values, _ = xp.linalg.svd(R, full_matrices=False)
        return xp.flip(values, axis=-1), xp.matmul(V, xp.flip(left, axis=-1))


def residual(M: Array, U: Array, D: Array) -> Array:
    """|M U - U diag(D)|_F / |U diag(D)|_F, (blocks,): how far the pairs are from eigenpairs."""
    xp = namespace(M)
    kept = U * D[:, None, :]
    miss = xp.matmul(M, U) - kept
    return xp.sqrt(xp.sum(miss * miss, axis=(-2, -1)) / xp.sum(kept * kept, axis=(-2, -1)))


symmetric = Symmetric()
singular = Singular()
