"""Deflation: F ~ G1 (x) A1 + G2 (x) A2, the two nearest Kronecker products; solved by whitening.

Block power iteration on two pairs, one simultaneous sweep an update, warm. The first pair is KPSVD's: P (x) Q / s from
P = Z vec(V), Q = Z^T vec(U), s = <U, P>, with Z the rearranged block. The second is the same iteration on the residual
Z - vec(P) vec(Q)^T / s, whose rank is one less; its term is P2 (x) V2, the best for its V2. Signs of U2, V2 follow the
last ones, or averages over updates would cancel. The damping is split over the first pair (a third term otherwise).

Exact when F is a sum of two Kronecker products, to the convergence of the iteration; at convergence nothing of two
terms is nearer. The second pair is indefinite, and so may the sum be: `indefinite` says what then, code INDEFINITE.
Source: Koroko et al. 2022 (2201.10285).
Cost: update 4 rows (d_in^2 + d_out^2) at shared 1, about 5 times K-FAC's; refresh four eigendecompositions; four
products a solve.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from kfaccore import factors
from kfaccore.damping import Split, pi
from kfaccore.linalg.inverse import accepted
from kfaccore.method import Additive, Block, Hyper
from kfaccore.methods.terms import rearranged, two_terms
from kfaccore.record import Factored, Record
from kfaccore.solution import Solution, finish, gradient
from kfaccore.xp.arrays import Array, namespace


@dataclass(frozen=True)
class State:
    """Averages of Q in A (blocks, d_in, d_in), of P in G and of s in `core` (blocks,), times `weight` (blocks,); the
    second pair; the whitened sum of the last refresh; code (blocks,)."""

    A: Array
    G: Array
    core: Array
    weight: Array
    pair: rearranged.Pair
    whitened: two_terms.Whitened
    code: Array


@dataclass(frozen=True)
class Stats:
    """Sums of one sweep of each pair, their normaliser and how many records were not finite."""

    first: rearranged.Sweep
    second: rearranged.Sweep
    n: Array
    bad: Array


@dataclass(frozen=True)
class Deflation(Additive):
    """Two Kronecker terms by power iteration; see the module.

    split        pi | equal | per_factor | Relative(...): damping of the first term
    indefinite   absolute | first_term: what stands for the denominators of a sum that is not positive definite
    """

    split: Split = pi
    indefinite: two_terms.Handler = two_terms.absolute
    cycles: ClassVar[int] = 30

    def __post_init__(self) -> None:
        two_terms.separable(self.split)

    def init(self, block: Block, like: Array) -> State:
        rearranged.refuse("Deflation", block)
        fields = factors.init(block, like)
        A, G = fields["A"], fields["G"]
        core = namespace(like).zeros_like(fields["weight"])
        return State(**fields, core=core, pair=rearranged.start(A, G), whitened=two_terms.init(A, G))

    def measure(self, state: State, record: Record, hyper: Hyper) -> Stats:
        first = rearranged.sweep(record, *rearranged.positive(state.A, state.G), positive=True)
        second = rearranged.sweep(record, *rearranged.ahead(state.pair))
        bad = rearranged.bad(first) + rearranged.bad(second)
        return Stats(first, second, factors.per_block(record.n, bad), bad)

    def update(self, state: State, stats: Stats, hyper: Hyper, donate: bool = False) -> State:
        ok = stats.bad == 0
        A, G, core, weight = rearranged.averaged(state, stats.first, stats.n, ok, hyper, donate)
        state = replace(state, A=A, G=G, core=core, weight=weight)
        first = rearranged.balanced(state)
        return replace(state, pair=rearranged.moved(state.pair, stats.second, stats.n, first, ok, hyper))

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
        return rearranged.balanced(state), rearranged.second(state.pair, state.weight)
