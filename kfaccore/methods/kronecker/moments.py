"""Second moments of per-example gradients in the eigenbasis of two factors: what EKFAC and TEKFAC share.

S = (1/n) sum of (Q_g^T J Q_a)^2 in the basis of the last refresh; where its weight is 0, S is what that refresh put.
Eigenvectors of one eigenvalue have one moment, the mean: any basis of their space will do, and S is the same operator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from kfaccore import factors
from kfaccore import xp as kernels
from kfaccore.linalg import kron, side
from kfaccore.linalg.inverse import Eigenpairs, accepted, eigh, floored
from kfaccore.method import Additive, Block, Hyper
from kfaccore.methods.kronecker.clusters import levelled
from kfaccore.methods.kronecker.traces import Traces
from kfaccore.options import function
from kfaccore.record import Factored, Record
from kfaccore.record.squares import squares
from kfaccore.refreshing import InSteps
from kfaccore.solution import Solution, finish_later, gradient
from kfaccore.xp.arrays import Array, all_finite, namespace, scalar


@dataclass(frozen=True)
class State:
    """Averages A, G times `weight` (blocks,), the eigenpairs of the last refresh, S (blocks, d_out, d_in) times
    `S_weight` (blocks,), code (blocks,)."""

    A: Array
    G: Array
    weight: Array
    basis: Eigenpairs
    S: Array
    S_weight: Array
    code: Array


@dataclass(frozen=True)
class Stats:
    """The factors' sums, and the summed squares in the basis; they share n and `bad`."""

    factors: factors.Stats | Traces
    S: Array

    @property
    def bad(self) -> Array:
        """How many records were not finite, (blocks,)."""
        return self.factors.bad


class Moments(InSteps[State], Additive):
    """Base of methods whose F~ is diagonal in a Kronecker eigenbasis; they add `measure`, `refresh`, `eigensystem`."""

    sharing: Callable[[Record], Record]
    moves_with_basis: ClassVar[bool] = True

    def __post_init__(self) -> None:
        function(self, "sharing", factors.SHARINGS)

    def init(self, block: Block, like: Array) -> State:
        """Zero averages, the identity for a basis."""
        fields = factors.init(block, like)
        basis = eigh.init(fields["A"], fields["G"])
        S_weight = namespace(like).zeros_like(fields["weight"])
        return State(**fields, basis=basis, S=basis.products(), S_weight=S_weight)

    def factor_stats(self, state: State, record: Record) -> factors.Stats | Traces:
        """The sums that the basis is made of."""
        raise NotImplementedError

    def measure(self, state: State, record: Record, hyper: Hyper) -> Stats:
        return _measured(state, record, self.factor_stats(state, record))

    def basis_stats(self, state: State, record: Record, hyper: Hyper) -> Stats:
        """The factors' sums, and no squares."""
        factors.needs_draws(record)
        return Stats(self.factor_stats(state, record), namespace(state.S).zeros_like(state.S))

    def moment_stats(self, state: State, record: Record, hyper: Hyper) -> Stats:
        """The squares, and sums whose means are the state's own factors."""
        return _measured(state, record, factors.unmoved(state, record))

    def update(self, state: State, stats: Stats, hyper: Hyper, donate: bool = False) -> State:
        """Factors and moments moved towards the Stats; the first moments after a refresh replace what it put."""
        xp = namespace(state.S)
        ok = factors.usable(stats.factors)
        decay = scalar(hyper.decay, state.S_weight)
        keep = xp.where(state.S_weight > 0, decay + xp.zeros_like(state.S_weight), xp.zeros_like(state.S_weight))
        state = factors.update(state, stats.factors, hyper, donate)
        return replace(
            state,
            S=kernels.average(state.S, stats.S, keep, (1 - decay) / factors.positive(stats.factors.n), ok, donate),
            S_weight=xp.where(ok, decay * state.S_weight + (1 - decay), state.S_weight),
        )

    def eigensystem(self, state: State, hyper: Hyper) -> tuple[Array, Array, Array]:
        """(Qa, Qg, S with the damping in it)."""
        raise NotImplementedError

    def solve(self, state: State, grad: Array | Factored, hyper: Hyper, record: Record | None = None) -> Solution:
        """Q_g [(Q_g^T V Q_a) / (S with the damping in it)] Q_a^T."""
        grad, squeeze = gradient(grad, tuple(state.S.shape))
        Qa, Qg, values = self.eigensystem(state, hyper)
        below, code = floored(values, state.code)
        return finish_later(kron.solve(Qg, grad, Qa, below), code, state, squeeze)

    def matvec(self, state: State, v: Array, hyper: Hyper) -> Array:
        """Q_g [S * (Q_g^T v Q_a)] Q_a^T."""
        Qa = state.basis.Qa
        Qg = state.basis.Qg
        rotated = kron.apply(side.transposed(Qg), v, Qa)
        return kron.apply(Qg, moments(state) * rotated, side.transposed(Qa))


def moments(state: State) -> Array:
    """S (blocks, d_out, d_in), the eigenvalues of F~ = (Qg (x) Qa) diag(S) (Qg (x) Qa)^T."""
    return factors.mean(state.S, state.S_weight)


def _measured(state: State, record: Record, sums: factors.Stats | Traces) -> Stats:
    """The factors' sums with the squares of the record in the state's basis."""
    factors.needs_draws(record)
    S = levelled(squares(record, _turn(state.basis.Qa), _turn(state.basis.Qg)), state.basis)
    bad = sums.bad + namespace(S).astype(~all_finite(S / factors.positive(sums.n)[:, None, None]), S.dtype)
    return Stats(replace(sums, bad=bad), S)


def _turn(Q: Array) -> Array | None:
    """Eigenvectors as `squares` takes them: a diagonal side's, which are the standard basis, as None."""
    return None if side.is_diagonal(Q) else Q


def rebased(state: State, basis: Eigenpairs, S: Array, code: Array) -> State:
    """The state in a new basis with S of weight 0, where it can be used."""
    old = (state.basis, state.S, state.S_weight)
    new = (basis, S, namespace(S).zeros_like(state.S_weight))
    kept, code = accepted(new, code, old, state.code, state.weight)
    basis, S, S_weight = kept
    return replace(state, basis=basis, S=S, S_weight=S_weight, code=code)
