"""Solving with G1 (x) A1 + G2 (x) A2 by whitening: x = K_g [(K_g^T V K_a) / (1 + s_g s_a^T)] K_a^T.

The first pair is damped and positive definite; K^T (A1 + d_a I) K = I and K^T A2 K = diag(s_a), alike for G. The second
pair is symmetric and mostly indefinite, so the sum may be: then a function chosen by the method replaces the
denominators of that block and the code says INDEFINITE.
Source: Martens & Grosse 2015 (1503.05671), appendix B, for the sum of two Kronecker products.
Cost: four eigendecompositions a refresh, four products a solve.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from kfaccore import method
from kfaccore import xp as kernels
from kfaccore.damping import Split, check
from kfaccore.linalg import kron, kronsum, side
from kfaccore.linalg.inverse import accepted
from kfaccore.method import Block, Hyper
from kfaccore.options import function
from kfaccore.record import Factored, Record
from kfaccore.refreshing import InSteps
from kfaccore.solution import Solution, finish, gradient
from kfaccore.xp.arrays import Array, eps, namespace, select
from kfaccore.xp.asking import Ask, Asks
from kfaccore.xp.codes import Code, choose

Denominators = Callable[[Array], Array]  # from s_g s_a^T (blocks, d_out, d_in)
Term = tuple[Array, Array]  # (A, G) of one product G (x) A


@dataclass(frozen=True)
class Whitened:
    """Ka (blocks, d_in, d_in), Kg (blocks, d_out, d_out), and the second factors' eigenvalues there: a, g."""

    Ka: Array
    Kg: Array
    a: Array
    g: Array


def absolute(ratios: Array) -> Array:
    """1 + |s_g s_a|: every curvature of the second term counted as positive."""
    return 1.0 + namespace(ratios).abs(ratios)


def first_term(ratios: Array) -> Array:
    """1: the second term left out."""
    return namespace(ratios).ones_like(ratios)


def init(A: Array, G: Array) -> Whitened:
    """Identities: the direction is the gradient."""
    zero_a = namespace(A).zeros_like(side.diagonal(A))
    zero_g = namespace(G).zeros_like(side.diagonal(G))
    return Whitened(side.identity(A), side.identity(G), zero_a, zero_g)


def refreshing(first: Term, second: Term, split: Split, damping: float | Array) -> Asks[tuple[Whitened, Array]]:
    """Whitened form and code (blocks,) of (G1 + d_g I) (x) (A1 + d_a I) + G2 (x) A2, in steps."""
    A1, G1 = first
    A2, G2 = second
    d_a, d_g = split.shifts(side.Scale.of_factor(A1), side.Scale.of_factor(G1), damping)
    (Ka, a, code_a), (Kg, g, code_g) = yield Ask(_whiten, (A1, d_a, A2)), Ask(_whiten, (G1, d_g, G2))
    return Whitened(Ka, Kg, a, g), namespace(code_a).maximum(code_a, code_g)


def solve(parts: Whitened, grad: Array | Factored, otherwise: Denominators, code: Array) -> tuple[Array, Array, Array]:
    """Direction, code and the smallest denominator 1 + s_g s_a (blocks,) before any repair."""
    xp = namespace(parts.a)
    ratios = parts.g[:, :, None] * parts.a[:, None, :]
    below = 1.0 + ratios
    smallest = xp.min(below, axis=(-2, -1))
    reach = xp.max(xp.abs(ratios), axis=(-2, -1))
    indefinite = smallest <= 100.0 * eps(below.dtype, xp) * (1.0 + reach)
    below = select(indefinite, otherwise(ratios), below)
    code = choose(indefinite & (code < int(Code.INDEFINITE)), Code.INDEFINITE, code)
    return kron.solve(parts.Kg, grad, parts.Ka, below), code, smallest


def _whiten(first: Array, shift: Array, second: Array) -> tuple[Array, Array, Array]:
    """K with K^T (first + shift I) K = I and K^T second K = diag(s); s; code."""
    values, vectors, code = kernels.eigh(first)
    return kronsum.whitened(values + shift[:, None], vectors, code, second)


class State(method.State, Protocol):
    """A state with averages, their `weight` (blocks,), and the whitened sum of the last refresh."""

    @property
    def weight(self) -> Array: ...

    @property
    def whitened(self) -> Whitened: ...


S = TypeVar("S", bound=State)


class TwoTerms(InSteps[S]):
    """Base of methods with F~ = G1 (x) A1 + G2 (x) A2; they add `init`, `measure`, `update` and say their `pairs`."""

    split: Split
    indefinite: Denominators

    def __post_init__(self) -> None:
        check(self, self.split, instead="two terms need pi, equal, per_factor or Relative")
        function(self, "indefinite", "kf.absolute or kf.first_term")

    def pairs(self, state: S) -> tuple[Term, Term]:
        """The two pairs (A, G) of F~, the positive definite one first."""
        raise NotImplementedError

    def refreshing(self, state: S, hyper: Hyper) -> Asks[S]:
        first, second = self.pairs(state)
        new, code = yield from refreshing(first, second, self.split, hyper.damping)
        whitened, code = accepted(new, code, state.whitened, state.code, state.weight)
        return replace(state, whitened=whitened, code=code)

    def solve(self, state: S, grad: Array | Factored, hyper: Hyper, record: Record | None = None) -> Solution:
        Ka = state.whitened.Ka
        Kg = state.whitened.Kg
        grad, squeeze = gradient(grad, (*Kg.shape[:2], Ka.shape[-1]))
        direction, code, smallest = solve(state.whitened, grad, self.indefinite, state.code)
        return finish(direction, code, state, squeeze, smallest=smallest)

    def matvec(self, state: S, v: Array, hyper: Hyper) -> Array:
        first, second = self.pairs(state)
        return kron.apply(first[1], v, first[0]) + kron.apply(second[1], v, second[0])

    def kronecker_terms(self, state: S, block: Block) -> tuple[Term, ...]:
        """Pairs (A, G) whose Kronecker products add up to F~."""
        return self.pairs(state)
