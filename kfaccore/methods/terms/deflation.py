"""Deflation: F ~ G1 (x) A1 + G2 (x) A2, the two nearest Kronecker products; solved by whitening.

Block power iteration on two pairs, one simultaneous sweep an update, warm. The first pair is KPSVD's: P (x) Q / s from
P = Z vec(V), Q = Z^T vec(U), s = <U, P>, with Z the rearranged block. The second is the same iteration on the residual
Z - vec(P) vec(Q)^T / s, whose rank is one less; its term is P2 (x) V2, the best for its V2. Signs of U2, V2 follow the
last ones, or averages over updates would cancel. The damping is split over the first pair (a third term otherwise).

A layer of one output or one input has no second pair: F is one Kronecker product, and KPSVD's.

Exact when F is a sum of two Kronecker products of symmetric matrices, to the convergence of the iteration; at
convergence no two such terms are nearer (a second pair of antisymmetric matrices, which may be, is not looked for). The
second pair is indefinite, and so may the sum be: `indefinite` says what then, code INDEFINITE.
Source: Koroko et al. 2022 (2201.10285).
Cost: update 4 rows (d_in^2 + d_out^2) at shared 1, about 5 times K-FAC's; refresh four eigendecompositions; four
products a solve.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from kfaccore import factors
from kfaccore.damping import Split, pi
from kfaccore.method import Additive, Block, Hyper
from kfaccore.methods.terms import rearranged, two_terms
from kfaccore.methods.terms.two_terms import Term, TwoTerms
from kfaccore.record import Record
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
    """Sums of one sweep of each pair, their normaliser, how many rows there were and how many records were not
    finite."""

    first: rearranged.Sweep
    second: rearranged.Sweep
    n: Array
    rows: Array
    bad: Array


@dataclass(frozen=True)
class Deflation(TwoTerms[State], Additive):
    """x solves (G1 (x) A1 + G2 (x) A2) vec(x) = vec(V), the two nearest Kronecker terms of F by power iteration.

    The first is KPSVD's, the second the same iteration on what is left. V and x (blocks, d_out, d_in). Exact when F is
    a sum of two Kronecker products of symmetric matrices. Code INDEFINITE where the sum is not positive definite.
    Koroko et al. 2022, arxiv.org/abs/2201.10285.

    split        pi | equal | per_factor | Relative(...): damping of the first term
    indefinite   absolute | first_term: what stands for the denominators of a sum that is not positive definite
    """

    split: Split = pi
    indefinite: two_terms.Denominators = two_terms.absolute
    cycles: ClassVar[int] = 30

    def init(self, block: Block, like: Array) -> State:
        rearranged.refuse("Deflation", block)
        fields = factors.init(block, like)
        core = namespace(like).zeros_like(fields["weight"])
        pair = rearranged.start(fields["A"], fields["G"])
        return State(**fields, core=core, pair=pair, whitened=two_terms.init(fields["A"], fields["G"]))

    def measure(self, state: State, record: Record, hyper: Hyper) -> Stats:
        of_first = (*rearranged.positive(state.A, state.G), True)
        of_second = (*rearranged.ahead(state.pair), False)
        first, second = rearranged.sweeps(record, of_first, of_second)
        rows = factors.valid_rows(record)
        n = factors.per_block(record.n, rows)
        return Stats(first, second, n, rows, rearranged.bad(first, n) + rearranged.bad(second, n))

    def update(self, state: State, stats: Stats, hyper: Hyper, donate: bool = False) -> State:
        ok = factors.counts(stats.bad == 0, stats.rows, stats.n)
        state = replace(state, **rearranged.averaged(state, stats.first, stats.n, ok, hyper, donate))
        if 1 in (state.A.shape[-1], state.G.shape[-1]):
            return state  # Z is one row or column, which the first pair is: there is no second
        first = rearranged.balanced(state)  # the second pair fits what the first leaves now
        return replace(state, pair=rearranged.moved(state.pair, stats.second, stats.n, first, ok, hyper))

    def pairs(self, state: State) -> tuple[Term, Term]:
        return rearranged.balanced(state), rearranged.second(state.pair, state.weight)
