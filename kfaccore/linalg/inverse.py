"""What a pair of factors becomes at a refresh: damped inverses by Cholesky, or the factors' eigenvectors.

`cholesky` and `eigh` are frozen objects without fields; what they make is an array tree in the method's state, which
knows how to solve.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeVar

from kfaccore import tree
from kfaccore.linalg import kron, side
from kfaccore.record import Factored
from kfaccore.xp.arrays import Array, eps, is_numpy, namespace, select
from kfaccore.xp.asking import Asks
from kfaccore.xp.codes import Code, choose
from kfaccore.xp.gpu import laid_out

if TYPE_CHECKING:
    from kfaccore.damping import Split

INVERSES = "kf.cholesky or kf.eigh"
T = TypeVar("T")


@dataclass(frozen=True)
class Inverses:
    """(A + d_a I)^-1 and (G + d_g I)^-1, shaped like the factors."""

    SYMMETRIC: ClassVar = ("A", "G")
    A: Array
    G: Array

    def solve(self, grad: Array | Factored, split: Split, damping: float | Array, code: Array) -> tuple[Array, Array]:
        """(direction, code) at the damping of the refresh."""
        return kron.apply(self.G, grad, self.A), code


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues a (blocks, d_in), g (blocks, d_out) and eigenvectors Qa, Qg, shaped like the factors."""

    a: Array
    g: Array
    Qa: Array
    Qg: Array

    def solve(self, grad: Array | Factored, split: Split, damping: float | Array, code: Array) -> tuple[Array, Array]:
        """(direction, code) at the damping given here."""
        below, code = floored(split.denominators(self.a, self.g, damping), code)
        return kron.solve(self.Qg, grad, self.Qa, below), code

    def products(self) -> Array:
        """The eigenvalues g a^T of G (x) A, (blocks, d_out, d_in)."""
        return self.g[:, :, None] * self.a[:, None, :]


Parts = Inverses | Eigenpairs


class Inverse(Protocol):
    """A choice of `inverse`."""

    needs_separable: ClassVar[bool]  # only splits that shift each factor will do

    def init(self, A: Array, G: Array) -> Parts:
        """Before the first refresh: a solve leaves the gradient alone."""
        ...

    def refreshing(self, A: Array, G: Array, split: Split, damping: float | Array) -> Asks[tuple[Parts, Array]]:
        """Parts of these factors, and a code (blocks,), in steps."""
        ...


@dataclass(frozen=True)
class Cholesky:
    """Damping is baked at refresh. Cost: d_in^3 + d_out^3 a refresh, two products a solve. Separable splits only."""

    needs_separable: ClassVar[bool] = True

    def init(self, A: Array, G: Array) -> Inverses:
        return Inverses(side.identity(A), side.identity(G))

    def refreshing(self, A: Array, G: Array, split: Split, damping: float | Array) -> Asks[tuple[Inverses, Array]]:
        d_a, d_g = split.shifts(side.Scale.of_factor(A), side.Scale.of_factor(G), damping)
        (A, code_a), (G, code_g) = yield from side.inverses(A, d_a, G, d_g)
        return Inverses(A, G), namespace(code_a).maximum(code_a, code_g)


@dataclass(frozen=True)
class Eigh:
    """Every split, at the newest damping. Cost: about 5 times Cholesky a refresh, four products a solve."""

    needs_separable: ClassVar[bool] = False

    def init(self, A: Array, G: Array) -> Eigenpairs:
        xp = namespace(A)
        a = xp.ones_like(side.diagonal(A))
        g = xp.ones_like(side.diagonal(G))
        return Eigenpairs(a, g, side.identity(A), side.identity(G))

    def refreshing(
        self, A: Array, G: Array, split: Split | None = None, damping: float | Array = 0.0
    ) -> Asks[tuple[Eigenpairs, Array]]:
        (a, Qa, code_a), (g, Qg, code_g) = yield from side.decompositions(A, G)
        return Eigenpairs(_clipped(a), _clipped(g), Qa, Qg), namespace(code_a).maximum(code_a, code_g)


def floored(below: Array, code: Array) -> tuple[Array, Array]:
    """Denominators (blocks, d_out, d_in) that can be divided by, and the code: 1 before the first refresh
    (IDENTITY), never under eps times the largest (JITTERED where that floor was needed)."""
    xp = namespace(below)
    top = xp.max(below, axis=(-2, -1))
    floor = (eps(below.dtype, xp) * xp.where(top > 0, top, xp.ones_like(top)))[:, None, None]
    low = below < floor
    first = code == int(Code.IDENTITY)
    lifted = xp.any(low, axis=(-2, -1))
    if is_numpy(below) and not xp.any(lifted | first):  # nothing to change: no copy
        return below, code
    fill = xp.where(first[:, None, None], xp.ones_like(floor), floor)
    below = xp.where(low | first[:, None, None], fill, below)
    return below, choose(lifted & (code == int(Code.OK)), Code.JITTERED, code)


def accepted(new: T, code: Array, old: T, old_code: Array, weight: Array) -> tuple[T, Array]:
    """The refreshed arrays where they can be used, the old ones (PREVIOUS, or IDENTITY before the first) elsewhere.

    new, old trees of (blocks, ...) leaves; a block without any update yet (weight 0) counts as failed.
    """
    xp = namespace(code)
    failed = (code >= int(Code.INDEFINITE)) | (weight == 0)
    first = old_code == int(Code.IDENTITY)
    kept = choose(first, Code.IDENTITY, Code.PREVIOUS)
    return tree.map(lambda n, o: laid_out(select(failed, o, n)), new, old), xp.where(failed, kept, code)


def _clipped(values: Array) -> Array:
    xp = namespace(values)
    return xp.where(values > 0, values, xp.zeros_like(values))


cholesky = Cholesky()
eigh = Eigh()
