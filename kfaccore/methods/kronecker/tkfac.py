"""TKFAC: F ~ Psi (x) Phi / delta = G (x) A, so x = (G + d_g I)^-1 V (A + d_a I)^-1.

G = Psi / sqrt(delta), A = Phi / sqrt(delta); Phi = (1/n) sum |g|^2 a a^T and Psi = (1/n) sum |a|^2 g g^T over rows are
the partial traces of F, delta their common trace: the approximation keeps the trace of F, as K-FAC does not. The
averages are of Phi and Psi themselves, so they stay partial traces of the averaged F. `sharing` turns shared positions
into rows: the trace kept is that of the F whose examples are those rows.

Exact when F is a Kronecker product, wherever K-FAC is with the same sharing.
Source: Gao et al. 2021 (2011.10741).
Cost: K-FAC's, and rows (d_in + d_out) an update; a convolution's patches are unfolded in chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from kfaccore import factors
from kfaccore.damping import Split, as_given, equal
from kfaccore.linalg import kron, side
from kfaccore.linalg.inverse import Cholesky, Eigh, accepted, cholesky
from kfaccore.method import Additive, Block, Hyper
from kfaccore.record import Factored, Record
from kfaccore.record.sharing import expand
from kfaccore.solution import Solution, finish, gradient
from kfaccore.xp.arrays import Array, namespace


@dataclass(frozen=True)
class State:
    """Averages of Phi in A (blocks, d_in, d_in), or (blocks, d_in) for an embedding, and of Psi in G, times their
    `weight` (blocks,); what `inverse` made of them, and delta, at the last refresh; code (blocks,)."""

    A: Array
    G: Array
    weight: Array
    inverse: Any
    trace: Array
    code: Array


@dataclass(frozen=True)
class TKFAC(Additive):
    """Trace-restricted K-FAC; see the module.

    sharing   expand | reduce | any function from record to record
    inverse   cholesky (separable splits, damping baked at refresh) | eigh (every split, newest damping)
    split     equal (the paper's) | pi | per_factor | exact | Relative(...), applied to factors of equal trace
    damping   as_given (dense layers) | Adaptive(floor), in units of the mean eigenvalue (the paper's for convolutions)
    """

    sharing: Callable[[Record], Record] = expand
    inverse: Cholesky | Eigh = cholesky
    split: Split = equal
    damping: Callable = as_given
    cycles: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.inverse.needs_separable and not self.split.separable:
            raise ValueError(f"split={self.split} does not shift each factor, so Cholesky cannot use it: inverse=eigh")

    def init(self, block: Block, like: Array) -> State:
        fields = factors.init(block, like)
        inverse = self.inverse.init(fields["A"], fields["G"])
        return State(**fields, inverse=inverse, trace=namespace(like).zeros_like(fields["weight"]))

    def measure(self, state: State, record: Record, hyper: Hyper) -> factors.Stats:
        return factors.partial_traces(record, self.sharing)

    def update(self, state: State, stats: factors.Stats, hyper: Hyper, donate: bool = False) -> State:
        return factors.update(state, stats, hyper, donate)

    def refresh(self, state: State, hyper: Hyper) -> State:
        A, G, trace = self._balanced(state)
        new, code = self.inverse.refresh(A, G, self.split, self._damping(state, trace, hyper.damping))
        kept, code = accepted((new, trace), code, (state.inverse, state.trace), state.code, state.weight)
        return replace(state, inverse=kept[0], trace=kept[1], code=code)

    def solve(self, state: State, grad: Array | Factored, hyper: Hyper, record: Record | None = None) -> Solution:
        grad, squeeze = gradient(grad, (*state.G.shape[:2], state.A.shape[-1]))
        damping = self._damping(state, state.trace, hyper.damping)
        direction, code = self.inverse.solve(state.inverse, grad, self.split, damping, state.code)
        return finish(direction, code, state, squeeze)

    def matvec(self, state: State, v: Array, hyper: Hyper) -> Array:
        A, G, _ = self._balanced(state)
        return kron.apply(G, v, A)

    def kronecker_terms(self, state: State, block: Block) -> tuple[tuple[Array, Array], ...]:
        """Pairs (A, G) whose Kronecker products add up to F~."""
        return (self._balanced(state)[:2],)

    def unit(self, state: State) -> float | Array:
        """What damping 1 adds to the eigenvalues of the inverse in use, a number or (blocks,)."""
        return self._damping(state, state.trace, 1.0)

    def _damping(self, state: State, trace: Array, damping: float | Array) -> float | Array:
        return self.damping(trace, state.G.shape[-1] * state.A.shape[-1], damping)

    def _balanced(self, state: State) -> tuple[Array, Array, Array]:
        """(Phi / sqrt(delta), Psi / sqrt(delta), delta)."""
        xp = namespace(state.G)
        A, G = (factors.mean(x, state.weight) for x in (state.A, state.G))
        trace = xp.sum(side.diagonal(A), axis=-1)
        root = xp.sqrt(xp.where(trace > 0, trace, xp.ones_like(trace)))
        return factors.mean(A, root), factors.mean(G, root), trace
