"""K-FAC: F ~ G (x) A, so x = (G + d_g I)^-1 V (A + d_a I)^-1.

A = mean over rows of a a^T and G = (1/n) sum of g g^T are exponential moving averages that start at zero and are
divided by their weight; `sharing` (expand or reduce) turns shared positions into rows.

Exact when the layer sees one example (any net and loss), and for type-2 or Monte-Carlo draws in deep linear nets with
squared error, with the sharing that fits the setting.
Source: Martens & Grosse 2015 (1503.05671); Eschenhagen et al. 2023 (2311.00636).
Cost: update rows (d_in^2 + d_out^2); refresh d_in^3 + d_out^3; memory 2 (d_in^2 + d_out^2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from kfaccore import factors
from kfaccore.damping import Split, pi
from kfaccore.linalg import kron
from kfaccore.linalg.inverse import Cholesky, Eigh, accepted, cholesky
from kfaccore.method import Additive, Block, Hyper
from kfaccore.record import Factored, Record
from kfaccore.record.sharing import expand
from kfaccore.solution import Solution, finish, gradient
from kfaccore.xp.arrays import Array


@dataclass(frozen=True)
class State:
    """Averages A (blocks, d_in, d_in), or (blocks, d_in) for an embedding, and G, times their `weight` (blocks,);
    what `inverse` made of them at the last refresh; code (blocks,)."""

    A: Array
    G: Array
    weight: Array
    inverse: Any
    code: Array


@dataclass(frozen=True)
class KFAC(Additive):
    """Kronecker-factored curvature; see the module for formula, exactness and cost.

    sharing   expand | reduce | any function from record to record
    inverse   cholesky (separable splits, damping baked at refresh) | eigh (every split, newest damping)
    split     pi | equal | per_factor | exact | Relative(...)
    """

    sharing: Callable[[Record], Record] = expand
    inverse: Cholesky | Eigh = cholesky
    split: Split = pi
    cycles: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.inverse.needs_separable and not self.split.separable:
            raise ValueError(f"split={self.split} does not shift each factor, so Cholesky cannot use it: inverse=eigh")

    def init(self, block: Block, like: Array) -> State:
        fields = factors.init(block, like)
        return State(**fields, inverse=self.inverse.init(fields["A"], fields["G"]))

    def measure(self, state: State, record: Record, hyper: Hyper) -> factors.Stats:
        return factors.measure(record, self.sharing)

    def update(self, state: State, stats: factors.Stats, hyper: Hyper, donate: bool = False) -> State:
        return factors.update(state, stats, hyper, donate)

    def refresh(self, state: State, hyper: Hyper) -> State:
        A, G = (factors.mean(x, state.weight) for x in (state.A, state.G))
        new, code = self.inverse.refresh(A, G, self.split, hyper.damping)
        inverse, code = accepted(new, code, state.inverse, state.code, state.weight)
        return replace(state, inverse=inverse, code=code)

    def solve(self, state: State, grad: Array | Factored, hyper: Hyper, record: Record | None = None) -> Solution:
        grad, squeeze = gradient(grad, (*state.G.shape[:2], state.A.shape[-1]))
        direction, code = self.inverse.solve(state.inverse, grad, self.split, hyper.damping, state.code)
        return finish(direction, code, state, squeeze)

    def inverses(self, state: State, hyper: Hyper) -> tuple[Array, Array] | None:
        """((A + d_a I)^-1, (G + d_g I)^-1) with Cholesky."""
        return (state.inverse.A, state.inverse.G) if isinstance(self.inverse, Cholesky) else None

    def eigensystem(self, state: State, hyper: Hyper) -> tuple[Array, Array, Array] | None:
        """(Qa, Qg, values) of the last refresh with eigh."""
        if not isinstance(self.inverse, Eigh):
            return None
        parts = state.inverse
        return parts.Qa, parts.Qg, self.split.denominators(parts.a, parts.g, hyper.damping)

    def matvec(self, state: State, v: Array, hyper: Hyper) -> Array:
        return kron.apply(factors.mean(state.G, state.weight), v, factors.mean(state.A, state.weight))

    def kronecker_terms(self, state: State, block: Block) -> tuple[tuple[Array, Array], ...]:
        """((A, G),) of F~ = G (x) A."""
        return ((factors.mean(state.A, state.weight), factors.mean(state.G, state.weight)),)
