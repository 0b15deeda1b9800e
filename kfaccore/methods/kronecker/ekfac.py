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
from dataclasses import dataclass
from typing import ClassVar

from kfaccore import factors
from kfaccore.damping import joint
from kfaccore.linalg.inverse import eigh
from kfaccore.method import Hyper
from kfaccore.methods.kronecker.moments import Moments, State, moments, rebased
from kfaccore.record import Record
from kfaccore.record.sharing import expand
from kfaccore.xp.arrays import Array
from kfaccore.xp.asking import Asks


@dataclass(frozen=True)
class EKFAC(Moments):
    """EKFAC: x = Qg [(Qg^T V Qa) / (S + damping)] Qa^T, S = (1/n) sum of (Qg^T J Qa)^2 entry by entry.

    Qa, Qg are the eigenvectors of K-FAC's factors at the last refresh, J a gradient of one example; V, x and S are
    (blocks, d_out, d_in). Exact when F is diagonal in that basis; never further from F in Frobenius norm than K-FAC.
    Right after a refresh S is K-FAC's, until the next update. George et al. 2018, arxiv.org/abs/1806.03884.

    sharing   expand | reduce | any function from record to record: shapes the basis only, never the moments
    """

    sharing: Callable[[Record], Record] = expand
    cycles: ClassVar[int] = 1

    def factor_stats(self, state: State, record: Record) -> factors.Stats:
        return factors.measure(record, self.sharing, state)

    def refreshing(self, state: State, hyper: Hyper) -> Asks[State]:
        A, G = factors.means(state)
        new, code = yield from eigh.refreshing(A, G)
        return rebased(state, new, new.products(), code)

    def eigensystem(self, state: State, hyper: Hyper) -> tuple[Array, Array, Array]:
        """(Qa, Qg, S + damping)."""
        S = moments(state)
        return state.basis.Qa, state.basis.Qg, S + joint(hyper.damping, S)
