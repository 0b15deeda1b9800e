"""One product of two averaged factors, and solving with what `inverse` made of them: what KFAC and TKFAC share.

x = (G + d_g I)^-1 V (A + d_a I)^-1 for the (A, G) of `product`, the shifts those of `split`; or, with an `inverse` that
knows both spectra, any other damping of the eigenvalues.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from kfaccore import factors, method
from kfaccore.damping import Split, check
from kfaccore.linalg import kron
from kfaccore.linalg.inverse import INVERSES, Eigenpairs, Inverse, Inverses, Parts
from kfaccore.method import Additive, Block, Hyper
from kfaccore.options import function, instance
from kfaccore.record import Factored, Record
from kfaccore.refreshing import InSteps
from kfaccore.solution import Solution, finish_later, gradient
from kfaccore.xp.arrays import Array


class State(factors.Averages, method.State, Protocol):
    """Averages A, G times `weight`, and what `inverse` made of them at the last refresh."""

    @property
    def inverse(self) -> Parts: ...


S = TypeVar("S", bound=State)


class Product(InSteps[S], Additive):
    """Base of methods with F~ = G (x) A; they add `init`, `measure`, `refresh` and say their `product`."""

    sharing: Callable[[Record], Record]
    inverse: Inverse
    split: Split

    def __post_init__(self) -> None:
        function(self, "sharing", factors.SHARINGS)
        instance(self, "inverse", Inverse, INVERSES)
        check(self, self.split, self.inverse.needs_separable, "Cholesky cannot use it, but inverse=eigh can")

    def product(self, state: S) -> tuple[Array, Array]:
        """(A, G) of F~ = G (x) A."""
        return factors.means(state)

    def update(self, state: S, stats: factors.Counted | factors.Sums, hyper: Hyper, donate: bool = False) -> S:
        return factors.update(state, stats, hyper, donate)

    def solve(self, state: S, grad: Array | Factored, hyper: Hyper, record: Record | None = None) -> Solution:
        grad, squeeze = gradient(grad, (*state.G.shape[:2], state.A.shape[-1]))
        direction, code = state.inverse.solve(grad, self.split, hyper.damping, state.code)
        return finish_later(direction, code, state, squeeze)

    def matvec(self, state: S, v: Array, hyper: Hyper) -> Array:
        A, G = self.product(state)
        return kron.apply(G, v, A)

    def kronecker_terms(self, state: S, block: Block) -> tuple[tuple[Array, Array], ...]:
        """((A, G),) of F~ = G (x) A."""
        return (self.product(state),)

    def inverses(self, state: S, hyper: Hyper) -> tuple[Array, Array] | None:
        """((A + d_a I)^-1, (G + d_g I)^-1) with Cholesky."""
        parts = state.inverse
        return (parts.A, parts.G) if isinstance(parts, Inverses) else None

    def eigensystem(self, state: S, hyper: Hyper) -> tuple[Array, Array, Array] | None:
        """(Qa, Qg, values) of the last refresh with eigh."""
        parts = state.inverse
        if not isinstance(parts, Eigenpairs):
            return None
        return parts.Qa, parts.Qg, self.split.denominators(parts.a, parts.g, hyper.damping)
