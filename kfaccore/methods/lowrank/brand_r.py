"""Brand K-FAC with overwriting (B-R-KFAC): as BrandKFAC between refreshes; a refresh sketches A ~ U_a D_a U_a^T anew.

The averages A and G are kept as well, so that modes lost to truncation come back: right after a refresh the error is
that of RandomizedKFAC's sketch. Brand's updates keep the modes current in between; refreshes can be rare.

Exact where BrandKFAC or RandomizedKFAC is: at most `rank` non-zero eigenvalues, then equal to K-FAC.
Source: Puiu 2022 (2210.08494).
Cost: update of K-FAC and of BrandKFAC; refresh and solve of RandomizedKFAC; memory d^2 + 2 (rank + Block.rows) d a
side, so nothing of the saving in memory is left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from kfaccore import factors
from kfaccore.damping import Split, pi
from kfaccore.linalg import kron
from kfaccore.linalg.inverse import accepted
from kfaccore.method import Block, Hyper
from kfaccore.methods.lowrank import brand_update as brand
from kfaccore.methods.lowrank import lowrank, modes
from kfaccore.methods.lowrank.lowrank import LowRank, Rank, even, fixed
from kfaccore.methods.lowrank.sketch import Symmetric, symmetric
from kfaccore.record import Factored, Record
from kfaccore.record.sharing import expand
from kfaccore.solution import Solution
from kfaccore.xp.arrays import Array, namespace


@dataclass(frozen=True)
class State:
    """Modes A, G and averages full_A, full_G, all times their `weight` (blocks,); random matrices; code (blocks,)."""

    A: Any
    G: Any
    weight: Array
    full_A: Array
    full_G: Array
    omega_A: Array
    omega_G: Array
    code: Array


@dataclass(frozen=True)
class BrandRKFAC:
    """BrandKFAC whose refresh is a sketch; see the module. Fields as there, and

    sketch    symmetric | singular, or either class with passes, oversample and seed
    """

    sharing: Callable[[Record], Record] = expand
    rank: Rank = fixed
    sketch: Symmetric = symmetric
    split: Split = pi
    outside: Callable[[LowRank], Array] = even
    start: float = 0.0
    cycles: ClassVar[int] = 1

    def __post_init__(self) -> None:
        modes.checked(self.split)

    def init(self, block: Block, like: Array) -> State:
        held = self.rank.cap + block.rows
        widths = (0 if block.diagonal_in else block.d_in, block.d_out)
        draws = [self.sketch.draw(block.blocks, d, held, number, like) for number, d in enumerate(widths)]
        zeros = factors.init(block, like)
        full = {f"full_{name}": zeros[name] for name in "AG"}
        return State(**modes.init(block, self.rank, like), **full, omega_A=draws[0], omega_G=draws[1])

    def measure(self, state: State, record: Record, hyper: Hyper) -> modes.Stats:
        return modes.measure(record, self.sharing)

    def combine(self, first: modes.Stats, second: modes.Stats) -> modes.Stats:
        return modes.combine(first, second)

    def update(self, state: State, stats: modes.Stats, hyper: Hyper, donate: bool = False) -> State:
        full = modes.averaged(state, stats, hyper, donate)
        return replace(modes.moved(state, stats, hyper, self.rank, self.outside), **full)

    def refresh(self, state: State, hyper: Hyper) -> State:
        A, code_a = self._overwritten(state.A, state.full_A, state.omega_A)
        G, code_g = self._overwritten(state.G, state.full_G, state.omega_G)
        code = namespace(code_a).maximum(code_a, code_g)
        kept, code = accepted((A, G), code, (state.A, state.G), state.code, state.weight)
        return replace(state, A=kept[0], G=kept[1], code=code)

    def solve(self, state: State, grad: Array | Factored, hyper: Hyper, record: Record | None = None) -> Solution:
        A, G, identity = modes.means(state, self.start)
        return modes.solve(state, A, G, self.split, identity, grad, hyper)

    def inverses(self, state: State, hyper: Hyper) -> tuple[Array, Array]:
        """Dense ((A~ + d_a I)^-1, (G~ + d_g I)^-1), for analysis."""
        A, G, identity = modes.means(state, self.start)
        return modes.inverses(state, A, G, self.split, identity, hyper)

    def matvec(self, state: State, v: Array, hyper: Hyper) -> Array:
        A, G, _ = modes.means(state, self.start)
        return kron.sandwich(lambda g: lowrank.times(g, G), v, lambda a: lowrank.times(a, A))

    def _overwritten(self, low: Any, average: Array, omega: Array) -> tuple[Any, Array]:
        if not isinstance(low, LowRank):
            xp = namespace(low)
            return low, xp.zeros_like(low[:, 0], dtype=xp.int32)
        U, D, code = self.sketch.modes(average, omega, low.D.shape[-1])
        return brand.held_modes(low, U, D, low.trace, self.rank, self.outside), code
