"""TEKFAC: F ~ (Q_g (x) Q_a) diag(S) (Q_g (x) Q_a)^T, so x = Q_g [(Q_g^T V Q_a) / (S + damping)] Q_a^T.

Q_a, Q_g are the eigenvectors of TKFAC's factors Phi = (1/n) sum |g|^2 a a^T and Psi = (1/n) sum |a|^2 g g^T at the last
refresh; S = (1/n) sum of (Q_g^T J Q_a)^2 holds the exact second moments of the per-example gradients J (summed over
shared) in that basis and carries the scale: no delta. A refresh resets S to TKFAC's eigenvalues with weight 0.
Never further from F in Frobenius norm than TKFAC, up to what `sharing` changes.

Exact when F is diagonal in the Kronecker eigenbasis: wherever TKFAC is.
Source: Gao et al. 2020 (2011.13609).
Cost: TKFAC's update plus rows d_in d_out (shared 1); refresh two eigendecompositions; four products a solve.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from kfaccore import factors
from kfaccore import xp as kernels
from kfaccore.damping import as_given
from kfaccore.linalg import kron, side
from kfaccore.linalg.inverse import Eigenpairs, accepted, eigh, floored
from kfaccore.method import Additive, Block, Hyper, Solution, finish, gradient
from kfaccore.record import Factored, Ids, Record
from kfaccore.sharing import expand
from kfaccore.xp.arrays import Array, all_finite, namespace, scalar


@dataclass(frozen=True)
class State:
    """TKFAC's averages, the eigenpairs of the last refresh, and S (blocks, d_out, d_in) times `S_weight` (blocks,);
    where S_weight is 0, S is TKFAC's eigenvalues."""

    A: Array
    G: Array
    weight: Array
    basis: Eigenpairs
    S: Array
    S_weight: Array
    code: Array


@dataclass(frozen=True)
class Stats:
    """TKFAC's sums, and the summed squares in the basis; they share n and `bad`."""

    factors: factors.Stats
    S: Array

    @property
    def bad(self) -> Array:
        return self.factors.bad


@dataclass(frozen=True)
class TEKFAC(Additive):
    """Eigenvalue-corrected TKFAC; see the module.

    sharing   shapes the basis only, never the moments
    damping   as_given (dense layers) | Adaptive(floor), in units of the mean of S (the paper's for convolutions)
    """

    sharing: Callable[[Record], Record] = expand
    damping: Callable = as_given
    cycles: ClassVar[int] = 1

    def init(self, block: Block, like: Array) -> State:
        fields = factors.init(block, like)
        basis = eigh.init(fields["A"], fields["G"])
        S = basis.g[:, :, None] * basis.a[:, None, :]
        return State(**fields, basis=basis, S=S, S_weight=namespace(like).zeros_like(fields["weight"]))

    def measure(self, state: State, record: Record, hyper: Hyper) -> Stats:
        sums = factors.partial_traces(record, self.sharing)
        S = factors.squares(record, None if isinstance(record.a, Ids) else state.basis.Qa, state.basis.Qg)
        bad = sums.bad + namespace(S).astype(~all_finite(S), S.dtype)
        return Stats(replace(sums, bad=bad), S)

    def update(self, state: State, stats: Stats, hyper: Hyper, donate: bool = False) -> State:
        xp = namespace(state.S)
        ok = stats.bad == 0
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
        trace = xp.sum(side.diagonal(A), axis=-1)
        S = factors.mean(new.g[:, :, None] * new.a[:, None, :], trace)
        old = (state.basis, state.S, state.S_weight)
        kept, code = accepted((new, S, xp.zeros_like(state.S_weight)), code, old, state.code, state.weight)
        return replace(state, basis=kept[0], S=kept[1], S_weight=kept[2], code=code)

    def solve(self, state: State, grad: Array | Factored, hyper: Hyper, record: Record | None = None) -> Solution:
        xp = namespace(state.S)
        grad, squeeze = gradient(grad, tuple(state.S.shape))
        S = factors.mean(state.S, state.S_weight)
        damping = self.damping(xp.sum(S, axis=(-2, -1)), S.shape[-2] * S.shape[-1], hyper.damping)
        below, code = floored(S + _shift(damping, S), state.code)
        return finish(kron.solve(state.basis.Qg, grad, state.basis.Qa, below), code, state, squeeze)

    def matvec(self, state: State, v: Array, hyper: Hyper) -> Array:
        S = factors.mean(state.S, state.S_weight)
        Qg, Qa = state.basis.Qg, state.basis.Qa
        return kron.apply(Qg, S * kron.apply(side.transposed(Qg), v, Qa), side.transposed(Qa))

    def eigensystem(self, state: State, block: Block) -> tuple[Array, Array, Array]:
        """(S (blocks, d_out, d_in), Qg, Qa) of F~ = (Qg (x) Qa) diag(S) (Qg (x) Qa)^T."""
        return factors.mean(state.S, state.S_weight), state.basis.Qg, state.basis.Qa


def _shift(damping: float | Array, S: Array) -> float | Array:
    """A number, or one a block, ready to be added to S."""
    value: Any = scalar(damping, S)
    return value[:, None, None] if getattr(value, "ndim", 0) == 1 else value
