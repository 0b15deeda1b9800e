"""KPSVD: F ~ G (x) A, the Kronecker product nearest to F, so x = (G + d_g I)^-1 V (A + d_a I)^-1.

Power iteration for the top singular triple of the rearranged block Z, one simultaneous sweep an update, warm: from
matrices U, V of the last update come P = Z vec(V) and Q = Z^T vec(U), sums over examples of J V J^T and J^T U J, and
s = <U, P>. P, Q and s are averaged and the block is P (x) Q / s; the next U, V are P, Q over their traces. From the
identity the first sweep is TKFAC on the per-example gradients J (summed over shared). All iterates are positive
semidefinite because Z keeps that cone.

Exact when F is a Kronecker product; at convergence <F - G (x) A, G (x) A> = 0 and no Kronecker product is nearer.
Source: Koroko et al. 2022 (2201.10285); Van Loan & Pitsianis 1993.
Cost: update 2 rows (d_in^2 + d_out^2) at shared 1, about twice K-FAC's; refresh and solve as K-FAC.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from kfaccore import factors
from kfaccore.damping import Split, check, pi
from kfaccore.linalg import kron
from kfaccore.linalg.inverse import INVERSES, Inverse, Parts, accepted, cholesky
from kfaccore.method import Additive, Block, Hyper
from kfaccore.methods.terms import rearranged
from kfaccore.options import instance
from kfaccore.record import Factored, Record
from kfaccore.refreshing import InSteps
from kfaccore.solution import Solution, finish, gradient
from kfaccore.xp.arrays import Array, namespace
from kfaccore.xp.asking import Asks


@dataclass(frozen=True)
class State:
    """Averages of Q in A (blocks, d_in, d_in), of P in G and of s in `core` (blocks,), times `weight` (blocks,); what
    `inverse` made of them at the last refresh; code (blocks,)."""

    A: Array
    G: Array
    core: Array
    weight: Array
    inverse: Parts
    code: Array


@dataclass(frozen=True)
class Stats:
    """Sums of one sweep, their normaliser, how many rows there were and how many records were not finite."""

    sweep: rearranged.Sweep
    n: Array
    rows: Array
    bad: Array


@dataclass(frozen=True)
class KPSVD(InSteps[State], Additive):
    """x = (G + d_g I)^-1 V (A + d_a I)^-1 with G (x) A the Kronecker product nearest to F, by power iteration.

    One sweep an update: P = (1/n) sum J V J^T, Q = (1/n) sum J^T U J, s = <U, P>; the block is P (x) Q / s. V and x
    (blocks, d_out, d_in). Exact when F is a Kronecker product; none is nearer at convergence. Refuses embeddings.
    Koroko et al. 2022, arxiv.org/abs/2201.10285.

    inverse, split   as for KFAC
    """

    inverse: Inverse = cholesky
    split: Split = pi
    cycles: ClassVar[int] = 30

    def __post_init__(self) -> None:
        instance(self, "inverse", Inverse, INVERSES)
        check(self, self.split, self.inverse.needs_separable, "Cholesky cannot use it, but inverse=eigh can")

    def init(self, block: Block, like: Array) -> State:
        rearranged.refuse("KPSVD", block)
        fields = factors.init(block, like)
        core = namespace(like).zeros_like(fields["weight"])
        return State(**fields, core=core, inverse=self.inverse.init(fields["A"], fields["G"]))

    def measure(self, state: State, record: Record, hyper: Hyper) -> Stats:
        U, V = rearranged.positive(state.A, state.G)
        sums = rearranged.sweep(record, U, V, positive=True)
        rows = factors.valid_rows(record)
        n = factors.per_block(record.n, rows)
        return Stats(sums, n, rows, rearranged.bad(sums, n))

    def update(self, state: State, stats: Stats, hyper: Hyper, donate: bool = False) -> State:
        ok = factors.counts(stats.bad == 0, stats.rows, stats.n)
        return replace(state, **rearranged.averaged(state, stats.sweep, stats.n, ok, hyper, donate))

    def refreshing(self, state: State, hyper: Hyper) -> Asks[State]:
        A, G = rearranged.balanced(state)
        new, code = yield from self.inverse.refreshing(A, G, self.split, hyper.damping)
        inverse, code = accepted(new, code, state.inverse, state.code, state.weight)
        return replace(state, inverse=inverse, code=code)

    def solve(self, state: State, grad: Array | Factored, hyper: Hyper, record: Record | None = None) -> Solution:
        grad, squeeze = gradient(grad, (*state.G.shape[:2], state.A.shape[-1]))
        direction, code = state.inverse.solve(grad, self.split, hyper.damping, state.code)
        return finish(direction, code, state, squeeze)

    def matvec(self, state: State, v: Array, hyper: Hyper) -> Array:
        A, G = rearranged.balanced(state)
        return kron.apply(G, v, A)

    def kronecker_terms(self, state: State, block: Block) -> tuple[tuple[Array, Array], ...]:
        """Pairs (A, G) whose Kronecker products add up to F~."""
        return (rearranged.balanced(state),)
