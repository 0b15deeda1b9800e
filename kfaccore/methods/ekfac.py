"""EKFAC: F ~ (Q_g (x) Q_a) diag(S) (Q_g (x) Q_a)^T, so x = Q_g [(Q_g^T V Q_a) / (S + damping)] Q_a^T.

Q_a, Q_g are the eigenvectors of K-FAC's factors at the last refresh; S = (1/n) sum of (Q_g^T J Q_a)^2 holds the exact
second moments of the per-example gradients J (summed over shared) in that basis. A refresh resets S to the outer
product of the eigenvalues with weight 0, so S becomes itself at the next update. S is the best diagonal in its basis:
never further from F in Frobenius norm than K-FAC.

Exact when F is diagonal in the Kronecker eigenbasis: wherever K-FAC is.
Source: George et al. 2018 (1806.03884).
Cost: K-FAC's update plus rows d_in d_out (shared 1); refresh two eigendecompositions; four products a solve.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from kfaccore import factors
from kfaccore import xp as kernels
from kfaccore.linalg import kron, side
from kfaccore.linalg.inverse import Eigenpairs, accepted, eigh, floored
from kfaccore.method import Additive, Block, Hyper, Solution, finish, gradient
from kfaccore.record import Factored, Ids, Record
from kfaccore.sharing import expand
from kfaccore.xp.arrays import Array, all_finite, namespace, scalar


@dataclass(frozen=True)
class State:
    """K-FAC's averages, the eigenpairs of the last refresh, and S (blocks, d_out, d_in) times `S_weight` (blocks,);
    where S_weight is 0, S is the outer product of the eigenvalues."""

    A: Array
    G: Array
    weight: Array
    basis: Eigenpairs
    S: Array
    S_weight: Array
    code: Array


@dataclass(frozen=True)
class Stats:
    """K-FAC's sums, and the summed squares in the basis; they share n and `bad`."""

    factors: factors.Stats
    S: Array

    @property
    def bad(self) -> Array:
        return self.factors.bad


@dataclass(frozen=True)
class EKFAC(Additive):
    """Eigenvalue-corrected K-FAC; see the module. `sharing` shapes the basis only, never the moments."""

    sharing: Callable[[Record], Record] = expand
    cycles: ClassVar[int] = 1

    def init(self, block: Block, like: Array) -> State:
        fields = factors.init(block, like)
        basis = eigh.init(fields["A"], fields["G"])
        S = basis.g[:, :, None] * basis.a[:, None, :]
        weight = namespace(like).zeros_like(fields["weight"])
        return State(**fields, basis=basis, S=S, S_weight=weight)

    def measure(self, state: State, record: Record, hyper: Hyper) -> Stats:
        if record.draws == 0:
            raise ValueError("EKFAC got a record of zero draws (forward only): it needs per-example gradients")
        sums = factors.measure(record, self.sharing)
        S = factors.squares(record, None if isinstance(record.a, Ids) else state.basis.Qa, state.basis.Qg)
        bad = sums.bad + namespace(S).astype(~all_finite(S), S.dtype)
        return Stats(replace(sums, bad=bad), S)

    def update(self, state: State, stats: Stats, hyper: Hyper, donate: bool = False) -> State:
        xp = namespace(state.S)
        ok = (stats.bad == 0) & (stats.factors.rows > 0)
        decay = scalar(hyper.decay, state.S_weight)
        keep = xp.where(state.S_weight > 0, decay + xp.zeros_like(state.S_weight), xp.zeros_like(state.S_weight))
        state = factors.update(state, stats.factors, hyper, donate)
        return replace(
            state,
            S=kernels.average(state.S, stats.S, keep, (1 - decay) / stats.factors.n, ok, donate),
            S_weight=xp.where(ok, decay * state.S_weight + (1 - decay), state.S_weight),
        )

    def refresh(self, state: State, hyper: Hyper) -> State:
        A, G = (factors.mean(x, state.weight) for x in (state.A, state.G))
        xp = namespace(state.S)
        new, code = eigh.refresh(A, G)
        S = new.g[:, :, None] * new.a[:, None, :]
        old = (state.basis, state.S, state.S_weight)
        kept, code = accepted((new, S, xp.zeros_like(state.S_weight)), code, old, state.code, state.weight)
        return replace(state, basis=kept[0], S=kept[1], S_weight=kept[2], code=code)

    def solve(self, state: State, grad: Array | Factored, hyper: Hyper, record: Record | None = None) -> Solution:
        grad, squeeze = gradient(grad, tuple(state.S.shape))
        below, code = floored(factors.mean(state.S, state.S_weight) + scalar(hyper.damping, state.S), state.code)
        return finish(kron.solve(state.basis.Qg, grad, state.basis.Qa, below), code, state, squeeze)

    def matvec(self, state: State, v: Array, hyper: Hyper) -> Array:
        S = factors.mean(state.S, state.S_weight)
        Qg, Qa = state.basis.Qg, state.basis.Qa
        return kron.apply(Qg, S * kron.apply(side.transposed(Qg), v, Qa), side.transposed(Qa))

    def eigensystem(self, state: State, block: Block) -> tuple[Array, Array, Array]:
        """(S (blocks, d_out, d_in), Qg, Qa) of F~ = (Qg (x) Qa) diag(S) (Qg (x) Qa)^T."""
        return factors.mean(state.S, state.S_weight), state.basis.Qg, state.basis.Qa
