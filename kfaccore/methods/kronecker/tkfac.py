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
from typing import ClassVar

from kfaccore import factors
from kfaccore.damping import UNITS, Split, Units, as_given, equal
from kfaccore.linalg import side
from kfaccore.linalg.inverse import Inverse, Parts, accepted, cholesky
from kfaccore.method import Block, Hyper
from kfaccore.methods.kronecker.product import Product
from kfaccore.methods.kronecker.traces import Traces, partial_traces
from kfaccore.options import function
from kfaccore.record import Factored, Record
from kfaccore.record.sharing import expand
from kfaccore.solution import Solution
from kfaccore.xp.arrays import Array, namespace
from kfaccore.xp.asking import Asks


@dataclass(frozen=True)
class State:
    """Averages of Phi in A (blocks, d_in, d_in) and of Psi in G, or (blocks, d) of a diagonal side, times their
    `weight` (blocks,); what `inverse` made of them, and delta, at the last refresh; code (blocks,)."""

    A: Array
    G: Array
    weight: Array
    inverse: Parts
    trace: Array
    code: Array


@dataclass(frozen=True)
class TKFAC(Product[State]):
    """TKFAC: x = (G + d_g I)^-1 V (A + d_a I)^-1 with A, G the partial traces of F over the root of its trace.

    A = (1/n) sum |g|^2 a a^T / sqrt(delta), G = (1/n) sum |a|^2 g g^T / sqrt(delta), delta = tr F: the product keeps
    F's trace, as K-FAC's does not. V and x (blocks, d_out, d_in). Exact when F is a Kronecker product.
    Gao et al. 2021, arxiv.org/abs/2011.10741.

    sharing   expand | reduce | any function from record to record
    inverse   cholesky (separable splits, damping baked at refresh) | eigh (every split, newest damping)
    split     equal (the paper's) | pi | per_factor | exact | Relative(...), applied to factors of equal trace
    damping   as_given (dense layers) | Adaptive(floor), in units of the mean eigenvalue (the paper's for convolutions)
    """

    sharing: Callable[[Record], Record] = expand
    inverse: Inverse = cholesky
    split: Split = equal
    damping: Units = as_given
    cycles: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        function(self, "damping", UNITS)

    def init(self, block: Block, like: Array) -> State:
        fields = factors.init(block, like)
        inverse = self.inverse.init(fields["A"], fields["G"])
        return State(**fields, inverse=inverse, trace=namespace(like).zeros_like(fields["weight"]))

    def measure(self, state: State, record: Record, hyper: Hyper) -> Traces:
        return partial_traces(record, self.sharing, state)

    def refreshing(self, state: State, hyper: Hyper) -> Asks[State]:
        A, G = self.product(state)
        trace = _trace(state)
        damping = self._damping(state, trace, hyper.damping)
        new, code = yield from self.inverse.refreshing(A, G, self.split, damping)
        kept, code = accepted((new, trace), code, (state.inverse, state.trace), state.code, state.weight)
        inverse, trace = kept
        return replace(state, inverse=inverse, trace=trace, code=code)

    def solve(self, state: State, grad: Array | Factored, hyper: Hyper, record: Record | None = None) -> Solution:
        damping = self._damping(state, state.trace, hyper.damping)
        return super().solve(state, grad, replace(hyper, damping=damping), record)

    def eigensystem(self, state: State, hyper: Hyper) -> tuple[Array, Array, Array] | None:
        """(Qa, Qg, values) of the last refresh with eigh, at the damping in the method's own units."""
        damping = self._damping(state, state.trace, hyper.damping)
        return super().eigensystem(state, replace(hyper, damping=damping))

    def unit(self, state: State) -> float | Array:
        """What damping 1 adds to the eigenvalues of the inverse in use, a number or (blocks,)."""
        return self._damping(state, state.trace, 1.0)

    def product(self, state: State) -> tuple[Array, Array]:
        """(Phi / sqrt(delta), Psi / sqrt(delta))."""
        Phi, Psi = factors.means(state)
        trace = _trace(state)
        xp = namespace(trace)
        root = xp.sqrt(xp.where(trace > 0, trace, xp.ones_like(trace)))
        return factors.mean(Phi, root), factors.mean(Psi, root)

    def _damping(self, state: State, trace: Array, damping: float | Array) -> float | Array:
        return self.damping(trace, state.G.shape[-1] * state.A.shape[-1], damping)


def _trace(state: State) -> Array:
    """delta (blocks,)."""
    Phi = factors.mean(side.diagonal(state.A), state.weight)
    return namespace(Phi).sum(Phi, axis=-1)
