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
from typing import ClassVar

from kfaccore import factors
from kfaccore.damping import UNITS, Units, as_given, joint
from kfaccore.linalg import side
from kfaccore.linalg.inverse import eigh
from kfaccore.method import Hyper
from kfaccore.methods.kronecker.moments import Moments, State, moments, rebased
from kfaccore.methods.kronecker.traces import Traces, partial_traces
from kfaccore.options import function
from kfaccore.record import Record
from kfaccore.record.sharing import expand
from kfaccore.xp.arrays import Array, namespace
from kfaccore.xp.asking import Asks


@dataclass(frozen=True)
class TEKFAC(Moments):
    """TEKFAC: x = Qg [(Qg^T V Qa) / (S + damping)] Qa^T, S = (1/n) sum of (Qg^T J Qa)^2 entry by entry.

    Qa, Qg are the eigenvectors of TKFAC's factors at the last refresh; V, x and S are (blocks, d_out, d_in). Exact when
    F is diagonal in that basis. Gao et al. 2020, arxiv.org/abs/2011.13609.

    sharing   shapes the basis only, never the moments
    damping   as_given (dense layers) | Adaptive(floor), in units of the mean of S (the paper's for convolutions)
    """

    sharing: Callable[[Record], Record] = expand
    damping: Units = as_given
    cycles: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        function(self, "damping", UNITS)

    def factor_stats(self, state: State, record: Record) -> Traces:
        return partial_traces(record, self.sharing, state)

    def refreshing(self, state: State, hyper: Hyper) -> Asks[State]:
        A, G = factors.means(state)
        new, code = yield from eigh.refreshing(A, G)
        trace = namespace(A).sum(side.diagonal(A), axis=-1)
        # divided first: the product of both traces may be too large for the dtype where their quotient is not
        return rebased(state, new, replace(new, g=factors.mean(new.g, trace)).products(), code)

    def eigensystem(self, state: State, hyper: Hyper) -> tuple[Array, Array, Array]:
        """(Qa, Qg, S + the damping that `damping` makes of it)."""
        S = moments(state)
        return state.basis.Qa, state.basis.Qg, S + joint(self._damping(S, hyper.damping), S)

    def unit(self, state: State) -> float | Array:
        """What damping 1 adds to the eigenvalues in use, a number or (blocks,)."""
        return self._damping(moments(state), 1.0)

    def _damping(self, S: Array, damping: float | Array) -> float | Array:
        return self.damping(namespace(S).sum(S, axis=(-2, -1)), S.shape[-2] * S.shape[-1], damping)
