"""PINN-KFAC: F ~ sum_t G_t (x) A_t over loss terms t, so x solves sum_t (G_t + damping I) X (A_t + damping I) = V.

One pair of averages a loss term, each with its own n: the interior of a differential equation, whose Taylor
coefficients are shared positions, and the boundary. A record is a tuple, one Record a term. Two terms are solved
exactly by whitening, more by preconditioned conjugate gradients; damping is added to every factor.

Exact for one term where K-FAC is; with expand not for a second-order operator, even for one example.
Source: Dangel, Mueller & Zeinhofer 2024 (2405.15603); Martens & Grosse 2015 (1503.05671), appendix I.
Cost: update rows (d_in^2 + d_out^2) a term; refresh 4 (d_in^3 + d_out^3) eigendecompositions; four products a solve.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce as fold
from operator import add
from typing import ClassVar

from kfaccore import factors
from kfaccore.damping import Split, check, per_factor
from kfaccore.linalg import kronsum, side
from kfaccore.linalg.inverse import accepted
from kfaccore.method import Additive, Block, Hyper
from kfaccore.options import function
from kfaccore.record import Factored, Record
from kfaccore.record.sharing import expand
from kfaccore.refreshing import InSteps
from kfaccore.solution import Solution, finish, gradient
from kfaccore.xp import Code, choose
from kfaccore.xp.arrays import Array, eps, namespace
from kfaccore.xp.asking import Asks
from kfaccore.xp.ranges import AT_LEAST_0, COUNT, UNIT, ranged


@dataclass(frozen=True)
class Term:
    """Averages of one loss term, times their `weight` (blocks,)."""

    A: Array
    G: Array
    weight: Array


@dataclass(frozen=True)
class State:
    """A Term each, the pair of the last refresh, code (blocks,)."""

    terms: tuple[Term, ...]
    inverse: kronsum.Pair
    code: Array

    @property
    def weight(self) -> Array:
        return self.terms[0].weight


@dataclass(frozen=True)
class Stats:
    """Sums of each term; a record is bad when any of its terms is."""

    terms: tuple[factors.Stats, ...]

    @property
    def bad(self) -> Array:
        """How many records were not finite, (blocks,)."""
        return fold(add, (term.bad for term in self.terms))


@dataclass(frozen=True)
class PINNKFAC(InSteps[State], Additive):
    """x solves sum_t (G_t + damping I) x (A_t + damping I) = V, one pair of K-FAC's factors a loss term t.

    A record is a tuple of Records, one a term, each with its n. V and x (blocks, d_out, d_in). Two terms are solved by
    whitening, more by conjugate gradients (code UNCONVERGED at the limit). Exact for one term where K-FAC is.
    Dangel, Mueller & Zeinhofer 2024, arxiv.org/abs/2405.15603.

    terms      number of loss terms; with 1 a record need not be a tuple
    start      weight of the identity the averages start from: 1 is the paper's, 0 the average of what was seen
    split      how damping shifts the factors of a term: per_factor | pi | equal
    tolerance, iterations   of the conjugate gradients for more than two terms
    """

    terms: int = 2
    sharing: Callable[[Record], Record] = expand
    split: Split = per_factor
    start: float = 0.0
    tolerance: float = 1e-12
    iterations: int = 50
    cycles: ClassVar[int] = 1

    def __post_init__(self) -> None:
        function(self, "sharing", factors.SHARINGS)
        check(self, self.split, shifts=False)
        ranged(self, terms=COUNT, start=UNIT, tolerance=AT_LEAST_0, iterations=COUNT)
        if not self.split.separable:
            raise ValueError(f"{self}: need a split that shifts each factor")

    def init(self, block: Block, like: Array) -> State:
        why = side.dense_only("PINNKFAC", block)
        if why:
            raise TypeError(why)
        fields = factors.init(block, like)
        A = self.start * side.identity(fields["A"])
        G = self.start * side.identity(fields["G"])
        # + 0.0: an array of its own for each term, as `update` may write into it
        terms = tuple(Term(A + 0.0, G + 0.0, fields["weight"] + self.start) for _ in range(self.terms))
        return State(terms, kronsum.identity(fields["G"], fields["A"]), fields["code"])

    def measure(self, state: State, record: tuple[Record, ...] | Record, hyper: Hyper) -> Stats:
        records = (record,) if isinstance(record, Record) else tuple(record)
        if len(records) != self.terms:
            raise ValueError(f"record has {len(records)} terms; this PINNKFAC needs a tuple of {self.terms}")
        return Stats(tuple(factors.measure(term, self.sharing) for term in records))

    def update(self, state: State, stats: Stats, hyper: Hyper, donate: bool = False) -> State:
        bad = stats.bad
        pairs = zip(state.terms, stats.terms, strict=True)
        return replace(state, terms=tuple(factors.update(t, replace(s, bad=bad), hyper, donate) for t, s in pairs))

    def refreshing(self, state: State, hyper: Hyper) -> Asks[State]:
        _warn_if_lost(hyper.damping, state.weight)
        (G, A), *rest = self._damped(state, hyper)
        # whitening needs a second term; without one it is 0 (x) A, which adds nothing
        other_G = fold(add, (term[0] for term in rest)) if rest else namespace(G).zeros_like(G)
        other_A = fold(add, (term[1] for term in rest)) if rest else A
        new, code = yield from kronsum.pairing(G, A, other_G, other_A)
        inverse, code = accepted(new, code, state.inverse, state.code, state.weight)
        return replace(state, inverse=inverse, code=code)

    def solve(self, state: State, grad: Array | Factored, hyper: Hyper, record: Record | None = None) -> Solution:
        grad, squeeze = gradient(grad, tuple(state.inverse.below.shape))
        if self.terms <= 2:
            return finish(kronsum.solve(state.inverse, grad), state.code, state, squeeze)
        V = grad.dense() if isinstance(grad, Factored) else grad
        found, count, residual = kronsum.conjugate_gradients(
            self._damped(state, hyper), state.inverse, V, self.tolerance, self.iterations
        )
        xp = namespace(V)
        first = state.code == int(Code.IDENTITY)
        code = choose((residual > self.tolerance) & (state.code == int(Code.OK)), Code.UNCONVERGED, state.code)
        direction = xp.where(first[:, None, None], V, found)
        return finish(direction, code, state, squeeze, iterations=count, residual=residual)

    def matvec(self, state: State, v: Array, hyper: Hyper) -> Array:
        pairs = [factors.means(term) for term in state.terms]
        return kronsum.apply([(G, A) for A, G in pairs], v)

    def _damped(self, state: State, hyper: Hyper) -> list[tuple[Array, Array]]:
        """(G + d_g I, A + d_a I) of each term."""
        found = []
        for term in state.terms:
            A, G = factors.means(term)
            d_a, d_g = self.split.shifts(side.Scale.of_factor(A), side.Scale.of_factor(G), hyper.damping)
            shifted_A = A + d_a[:, None, None] * side.identity(A)
            shifted_G = G + d_g[:, None, None] * side.identity(G)
            found.append((shifted_G, shifted_A))
        return found


def _warn_if_lost(damping: float | Array, like: Array) -> None:
    """A warning when damping is under the rounding of factors of size 1."""
    rounding = eps(like.dtype, namespace(like))
    if isinstance(damping, float) and 0 < damping < rounding:
        warnings.warn(
            f"damping {damping:g} is below {rounding:.2g}, the rounding of {like.dtype}: factors of size 1 do not "
            f"change. Use float64 parameters, or damping of at least {rounding:.2g}",
            RuntimeWarning,
            stacklevel=3,
        )
