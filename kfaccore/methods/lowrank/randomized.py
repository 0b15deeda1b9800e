"""Randomised K-FAC: A ~ U_a D_a U_a^T by a sketch, G likewise, so x = (G~ + d_g I)^-1 V (A~ + d_a I)^-1 by modes.

A and G are K-FAC's averages; a refresh finds their `rank` largest eigenpairs from a few products with a thin random
matrix. (U D U^T + d I)^-1 = U [(D + d)^-1 - 1/d] U^T + I / d, at the newest damping. What the modes miss has the
eigenvalue `outside`: 0, the lowest kept one, or the rest of the trace. As published: split=top (each factor's shift is
damping times its largest eigenvalue), outside=lowest, start=1.0 (averages start at the identity, which joins the
damping and decays).

Exact when both factors have at most `rank` non-zero eigenvalues, then equal to K-FAC; with rank >= d by construction.
Source: Puiu 2022 (2206.15397): RS-KFAC is sketch=singular, SRE-KFAC sketch=symmetric.
Cost: K-FAC's update; refresh 2 (passes + 1) (rank + 10) d^2 a side; solve 4 rank d_in d_out; memory 2 rank d above
K-FAC's averages, d^2 a side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from kfaccore import factors
from kfaccore.damping import Split, pi
from kfaccore.linalg import equal, side
from kfaccore.method import Additive, Block, Hyper
from kfaccore.methods.lowrank import lowrank, modes
from kfaccore.methods.lowrank.lowrank import Factor, LowRank, Outside, Rank, even, fixed
from kfaccore.methods.lowrank.modes import Modes, Sides
from kfaccore.methods.lowrank.sketch import SKETCHES, Leading, Sketch, symmetric
from kfaccore.options import instance
from kfaccore.record import Record
from kfaccore.record.sharing import expand
from kfaccore.refreshing import InSteps
from kfaccore.xp.arrays import Array, namespace
from kfaccore.xp.asking import Ask, Asks, lockstep


@dataclass(frozen=True)
class State:
    """K-FAC's averages times their weight, the modes of their means at the last refresh (or a side's diagonal),
    the random matrices (blocks, d, rank + oversample), code (blocks,)."""

    A: Array
    G: Array
    weight: Array
    modes_A: Factor
    modes_G: Factor
    omega_A: Array
    omega_G: Array
    code: Array


@dataclass(frozen=True)
class RandomizedKFAC(InSteps[State], Modes[State], Additive):
    """K-FAC by leading modes: x = (Ug Dg Ug^T + d_g I)^-1 V (Ua Da Ua^T + d_a I)^-1, modes by a sketch at each refresh.

    V and x (blocks, d_out, d_in); Ua (blocks, d_in, rank). Equal to K-FAC while the factors have at most `rank`
    eigenvalues that are not zero. Puiu 2022, arxiv.org/abs/2206.15397.

    sharing   expand | reduce
    rank      fixed | adaptive | Rank(cap, start, ...)
    sketch    symmetric | singular, or either class with passes, oversample and seed
    split     pi | equal | per_factor | top | Relative(...)
    outside   even | lowest | nothing; nothing makes steps along what the modes miss as long as damping allows
    start     the identity's coefficient before any update: 0 (averages are divided by their weight) or 1
    """

    sharing: Callable[[Record], Record] = expand
    rank: Rank = fixed
    sketch: Sketch = symmetric
    split: Split = pi
    outside: Outside = even
    start: float = 0.0
    cycles: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        instance(self, "sketch", Sketch, SKETCHES)

    def init(self, block: Block, like: Array) -> State:
        cap = self.rank.cap
        width_in = 0 if block.diagonal_in else block.d_in  # a diagonal side needs no sketch
        width_out = 0 if block.diagonal_out else block.d_out
        return State(
            **factors.init(block, like),
            modes_A=modes.empty(block.d_in, block.diagonal_in, block.blocks, cap, self.rank, like),
            modes_G=modes.empty(block.d_out, block.diagonal_out, block.blocks, cap, self.rank, like),
            omega_A=self.sketch.draw(block.blocks, width_in, cap, 0, like),
            omega_G=self.sketch.draw(block.blocks, width_out, cap, 1, like),
        )

    def measure(self, state: State, record: Record, hyper: Hyper) -> factors.Stats:
        return factors.measure(record, self.sharing, state)

    def update(self, state: State, stats: factors.Stats, hyper: Hyper, donate: bool = False) -> State:
        return factors.update(state, stats, hyper, donate)

    def refreshing(self, state: State, hyper: Hyper) -> Asks[State]:
        total, _ = modes.normaliser(state.weight, self.start)
        A = self._sketched(factors.mean(state.A, total), state.modes_A, state.omega_A)
        G = self._sketched(factors.mean(state.G, total), state.modes_G, state.omega_G)
        new_A, new_G = yield from lockstep([A, G])
        A, G, code = modes.kept(new_A, new_G, (state.modes_A, state.modes_G), state)
        return replace(state, modes_A=A, modes_G=G, code=code)

    def sides(self, state: State) -> Sides:
        """The modes of the last refresh."""
        _, identity = modes.normaliser(state.weight, self.start)
        return Sides(state.modes_A, state.modes_G, identity)

    def _sketched(self, mean: Array, old: Factor, omega: Array) -> Asks[tuple[Factor, Array]]:
        """Modes of a mean and a code; the next count of modes follows from them."""
        if not isinstance(old, LowRank):
            return mean, modes.well(mean)
        ((U, D, code),) = yield (Ask(Leading(self.sketch, old.D.shape[-1]), (mean, omega)),)
        if self.rank.cuts(D.shape[-1]):
            U = equal.counted(D, U, old.rank)
        trace = namespace(mean).sum(side.diagonal(mean), axis=-1)
        new = lowrank.with_modes(old, U, D, trace, self.outside)
        return replace(new, rank=self.rank.next(new)), code
