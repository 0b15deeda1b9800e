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
from typing import ClassVar

from kfaccore import factors
from kfaccore.damping import Split, pi
from kfaccore.method import Block, Hyper
from kfaccore.methods.lowrank import brand_update as brand
from kfaccore.methods.lowrank import grown, modes
from kfaccore.methods.lowrank.grown import Kept
from kfaccore.methods.lowrank.lowrank import Factor, LowRank, Outside, Rank, even, fixed
from kfaccore.methods.lowrank.sketch import SKETCHES, Leading, Sketch, symmetric
from kfaccore.options import instance
from kfaccore.record import Record
from kfaccore.record.sharing import expand
from kfaccore.refreshing import InSteps
from kfaccore.xp.arrays import Array
from kfaccore.xp.asking import Ask, Asks, lockstep


@dataclass(frozen=True)
class State:
    """Modes A, G and averages full_A, full_G, all times their `weight` (blocks,); random matrices; code (blocks,)."""

    A: Factor
    G: Factor
    weight: Array
    full_A: Array
    full_G: Array
    omega_A: Array
    omega_G: Array
    code: Array


@dataclass(frozen=True)
class BrandRKFAC(InSteps[State], Kept[State]):
    """BrandKFAC between refreshes; a refresh sketches the modes anew from averages A and G that are kept as well.

    What truncation lost comes back, for the memory of K-FAC. Shapes, errors and fields as BrandKFAC's, and
    (Puiu 2022, arxiv.org/abs/2210.08494)

    sketch    symmetric | singular, or either class with passes, oversample and seed
    """

    sharing: Callable[[Record], Record] = expand
    rank: Rank = fixed
    sketch: Sketch = symmetric
    split: Split = pi
    outside: Outside = even
    start: float = 0.0
    cycles: ClassVar[int] = 1
    restless: ClassVar[bool] = True  # an update after a refresh grows the sketched modes by its rows

    def __post_init__(self) -> None:
        super().__post_init__()
        instance(self, "sketch", Sketch, SKETCHES)

    def init(self, block: Block, like: Array) -> State:
        held = self.rank.cap + block.rows
        width_in = 0 if block.diagonal_in else block.d_in  # a diagonal side needs no sketch
        width_out = 0 if block.diagonal_out else block.d_out
        zeros = factors.init(block, like)
        return State(
            **grown.init(block, self.rank, like),
            full_A=zeros["A"],
            full_G=zeros["G"],
            omega_A=self.sketch.draw(block.blocks, width_in, held, 0, like),
            omega_G=self.sketch.draw(block.blocks, width_out, held, 1, like),
        )

    def refreshing(self, state: State, hyper: Hyper) -> Asks[State]:
        A = self._overwritten(state.A, state.full_A, state.omega_A)
        G = self._overwritten(state.G, state.full_G, state.omega_G)
        new_A, new_G = yield from lockstep([A, G])
        A, G, code = modes.kept(new_A, new_G, (state.A, state.G), state)
        return replace(state, A=A, G=G, code=code)

    def _overwritten(self, low: Factor, average: Array, omega: Array) -> Asks[tuple[Factor, Array]]:
        """Modes of the average itself and a code."""
        if not isinstance(low, LowRank):
            return low, modes.well(low)
        ((U, D, code),) = yield (Ask(Leading(self.sketch, low.D.shape[-1]), (average, omega)),)
        return brand.held_modes(low, U, D, low.trace, self.rank, self.outside), code
