"""KFAC-CORRECTED: F ~ G (x) A + C (x) D, K-FAC and the Kronecker product nearest to its residual; solved by whitening.

A, G are K-FAC's averages; C, D come from power iteration on the rearranged residual Z - vec(G) vec(A)^T, one
simultaneous sweep an update, warm: P = sum J V J^T / n - <A, V> G and Q = sum J^T U J / n - <G, U> A; then C (x) D is
P (x) V. Signs of U, V follow the last ones, or averages over updates would cancel. The damping is split over the first
pair.

Exact wherever K-FAC is; at convergence its squared Frobenius error is K-FAC's less the largest squared singular value
of the residual's symmetric pairs. The second pair is indefinite, and so may the sum be: `indefinite` says what then,
code INDEFINITE.
Source: Koroko et al. 2022 (2201.10285).
Cost: K-FAC's update and 2 rows (d_in^2 + d_out^2) at shared 1; refresh four eigendecompositions; four products a solve.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from kfaccore import factors
from kfaccore.damping import Split, pi
from kfaccore.method import Additive, Block, Hyper
from kfaccore.methods.terms import rearranged, two_terms
from kfaccore.methods.terms.two_terms import Term, TwoTerms
from kfaccore.options import function
from kfaccore.record import Record
from kfaccore.record.sharing import expand
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
        """How many records were not finite, (blocks,)."""
        return self.factors.bad


@dataclass(frozen=True)
class KFACCorrected(TwoTerms[State], Additive):
    """x solves (G (x) A + C (x) D) vec(x) = vec(V): K-FAC's product and the one nearest to what it leaves of F.

    V and x (blocks, d_out, d_in). Exact wherever K-FAC is. Code INDEFINITE where the sum is not positive definite.
    Koroko et al. 2022, arxiv.org/abs/2201.10285.

    sharing      shapes K-FAC's factors only, never the residual
    split        pi | equal | per_factor | Relative(...): damping of the first term
    indefinite   absolute | first_term: what stands for the denominators of a sum that is not positive definite
    """

    sharing: Callable[[Record], Record] = expand
    split: Split = pi
    indefinite: two_terms.Denominators = two_terms.absolute
    cycles: ClassVar[int] = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        function(self, "sharing", factors.SHARINGS)

    def init(self, block: Block, like: Array) -> State:
        rearranged.refuse("KFACCorrected", block)
        fields = factors.init(block, like)
        pair = rearranged.start(fields["A"], fields["G"])
        return State(**fields, pair=pair, whitened=two_terms.init(fields["A"], fields["G"]))

    def measure(self, state: State, record: Record, hyper: Hyper) -> Stats:
        U, V = rearranged.ahead(state.pair)
        sums = rearranged.sweep(record, U, V)
        plain = factors.measure(record, self.sharing)
        return Stats(replace(plain, bad=plain.bad + rearranged.bad(sums, plain.n)), sums)

    def update(self, state: State, stats: Stats, hyper: Hyper, donate: bool = False) -> State:
        ok = factors.usable(stats.factors)
        state = factors.update(state, stats.factors, hyper, donate)
        first = factors.means(state)  # the second pair fits what the first leaves now
        return replace(state, pair=rearranged.moved(state.pair, stats.sweep, stats.factors.n, first, ok, hyper))

    def pairs(self, state: State) -> tuple[Term, Term]:
        return factors.means(state), rearranged.second(state.pair, state.weight)
