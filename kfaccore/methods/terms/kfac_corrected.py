"""KFAC-CORRECTED: F ~ G (x) A + C (x) D, K-FAC and the Kronecker product nearest to its residual; solved by whitening.

A, G are K-FAC's averages; C, D come from power iteration on the rearranged residual Z - vec(G) vec(A)^T, one
simultaneous sweep an update, warm: P = sum J V J^T / n - <A, V> G and Q = sum J^T U J / n - <G, U> A; then C (x) D is
P (x) V. Signs of U, V follow the last ones, or averages over updates would cancel. The damping is split over the first
pair.

Exact wherever K-FAC is; at convergence its squared Frobenius error is K-FAC's less the largest squared singular value
of the residual. The second pair is indefinite, and so may the sum be: `indefinite` says what then, code INDEFINITE.
Source: Koroko et al. 2022 (2201.10285).
Cost: K-FAC's update and 2 rows (d_in^2 + d_out^2) at shared 1; refresh four eigendecompositions; four products a solve.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from kfaccore import factors
from kfaccore.damping import Split, pi
from kfaccore.linalg.inverse import accepted
from kfaccore.method import Additive, Block, Hyper
from kfaccore.methods.terms import rearranged, two_terms
from kfaccore.record import Factored, Record
from kfaccore.record.sharing import expand
from kfaccore.solution import Solution, finish, gradient
from kfaccore.xp.arrays import Array


@dataclass(frozen=True)
class State:
    """K-FAC's averages A, G times `weight` (blocks,), the second pair, the whitened sum of the last refresh, code."""

    A: Array
    G: Array
    weight: Array
    pair: rearranged.Pair
    whitened: two_terms.Whitened
    code: Array


@dataclass(frozen=True)
class Stats:
    """K-FAC's sums, and those of one sweep; they share n and `bad`."""

    factors: factors.Stats
    sweep: rearranged.Sweep

    @property
    def bad(self) -> Array:
        return self.factors.bad


@dataclass(frozen=True)
class KFACCorrected(Additive):
    """K-FAC and one Kronecker correction; see the module.

    sharing      shapes K-FAC's factors only, never the residual
    split        pi | equal | per_factor | Relative(...): damping of the first term
    indefinite   absolute | first_term: what stands for the denominators of a sum that is not positive definite
    """

    sharing: Callable[[Record], Record] = expand
    split: Split = pi
    indefinite: two_terms.Handler = two_terms.absolute
    cycles: ClassVar[int] = 30

    def __post_init__(self) -> None:
        two_terms.separable(self.split)

    def init(self, block: Block, like: Array) -> State:
        rearranged.refuse("KFACCorrected", block)
        fields = factors.init(block, like)
        A, G = fields["A"], fields["G"]
        return State(**fields, pair=rearranged.start(A, G), whitened=two_terms.init(A, G))

    def measure(self, state: State, record: Record, hyper: Hyper) -> Stats:
        sums = rearranged.sweep(record, *rearranged.ahead(state.pair))
        plain = factors.measure(record, self.sharing)
        return Stats(replace(plain, bad=plain.bad + rearranged.bad(sums)), sums)

    def update(self, state: State, stats: Stats, hyper: Hyper, donate: bool = False) -> State:
        ok = (stats.bad == 0) & (stats.factors.rows > 0)
        state = factors.update(state, stats.factors, hyper, donate)
        pair = rearranged.moved(state.pair, stats.sweep, stats.factors.n, self._terms(state)[0], ok, hyper)
        return replace(state, pair=pair)

    def refresh(self, state: State, hyper: Hyper) -> State:
        new, code = two_terms.refresh(*self._terms(state), self.split, hyper.damping)
        whitened, code = accepted(new, code, state.whitened, state.code, state.weight)
        return replace(state, whitened=whitened, code=code)

    def solve(self, state: State, grad: Array | Factored, hyper: Hyper, record: Record | None = None) -> Solution:
        grad, squeeze = gradient(grad, (*state.G.shape[:2], state.A.shape[-1]))
        direction, code, smallest = two_terms.solve(state.whitened, grad, self.indefinite, state.code)
        return finish(direction, code, state, squeeze, smallest=smallest)

    def matvec(self, state: State, v: Array, hyper: Hyper) -> Array:
        return two_terms.matvec(*self._terms(state), v)

    def kronecker_terms(self, state: State, block: Block) -> tuple[tuple[Array, Array], ...]:
        """Pairs (A, G) whose Kronecker products add up to F~."""
        return self._terms(state)

    @staticmethod
    def _terms(state: State) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        A, G = (factors.mean(x, state.weight) for x in (state.A, state.G))
        return (A, G), rearranged.second(state.pair, state.weight)
