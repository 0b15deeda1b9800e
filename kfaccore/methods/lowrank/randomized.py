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
from typing import Any, ClassVar

from kfaccore import factors
from kfaccore.damping import Split, pi
from kfaccore.linalg import kron, side
from kfaccore.linalg.inverse import accepted
from kfaccore.method import Additive, Block, Hyper
from kfaccore.methods.lowrank import lowrank, modes
from kfaccore.methods.lowrank.lowrank import LowRank, Rank, even, fixed
from kfaccore.methods.lowrank.sketch import Symmetric, symmetric
from kfaccore.record import Factored, Record
from kfaccore.record.sharing import expand
from kfaccore.solution import Solution
from kfaccore.xp.arrays import Array, namespace


@dataclass(frozen=True)
class State:
    """K-FAC's averages times their weight, the modes of their means at the last refresh (a diagonal for an embedding),
    the random matrices (blocks, d, rank + oversample), code (blocks,)."""

    A: Array
    G: Array
    weight: Array
    modes_A: Any
    modes_G: Any
    omega_A: Array
    omega_G: Array
    code: Array


@dataclass(frozen=True)
class RandomizedKFAC(Additive):
    """K-FAC with sketched factors; see the module.

    sharing   expand | reduce
    rank      fixed | adaptive | Rank(cap, start, ...)
    sketch    symmetric | singular, or either class with passes, oversample and seed
    split     pi | equal | per_factor | top | Relative(...)
    outside   even | lowest | nothing; nothing makes steps along what the modes miss as long as damping allows
    start     the identity's coefficient before any update: 0 (averages are divided by their weight) or 1
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
        found = {}
        sides = (("A", block.d_in, block.diagonal_in), ("G", block.d_out, False))
        for number, (name, d, diagonal) in enumerate(sides):
            found[f"modes_{name}"] = modes.start(d, diagonal, block.blocks, self.rank.cap, self.rank, like)
            width = 0 if diagonal else d
            found[f"omega_{name}"] = self.sketch.draw(block.blocks, width, self.rank.cap, number, like)
        return State(**factors.init(block, like), **found)

    def measure(self, state: State, record: Record, hyper: Hyper) -> factors.Stats:
        return factors.measure(record, self.sharing)

    def update(self, state: State, stats: factors.Stats, hyper: Hyper, donate: bool = False) -> State:
        return factors.update(state, stats, hyper, donate)

    def refresh(self, state: State, hyper: Hyper) -> State:
        total, _ = modes.normaliser(state.weight, self.start)
        A, code_a = self._modes(state.A, total, state.modes_A, state.omega_A)
        G, code_g = self._modes(state.G, total, state.modes_G, state.omega_G)
        code = namespace(code_a).maximum(code_a, code_g)
        kept, code = accepted((A, G), code, (state.modes_A, state.modes_G), state.code, state.weight)
        return replace(state, modes_A=kept[0], modes_G=kept[1], code=code)

    def solve(self, state: State, grad: Array | Factored, hyper: Hyper, record: Record | None = None) -> Solution:
        _, identity = modes.normaliser(state.weight, self.start)
        return modes.solve(state, state.modes_A, state.modes_G, self.split, identity, grad, hyper)

    def matvec(self, state: State, v: Array, hyper: Hyper) -> Array:
        return kron.sandwich(lambda g: lowrank.times(g, state.modes_G), v, lambda a: lowrank.times(a, state.modes_A))

    def inverses(self, state: State, hyper: Hyper) -> tuple[Array, Array]:
        """Dense ((A~ + d_a I)^-1, (G~ + d_g I)^-1), for analysis."""
        _, identity = modes.normaliser(state.weight, self.start)
        return modes.inverses(state, state.modes_A, state.modes_G, self.split, identity, hyper)

    def _modes(self, average: Array, total: Array, old: Any, omega: Array) -> tuple[Any, Array]:
        """Modes of average / total and a code; the next count of modes follows from them."""
        xp = namespace(average)
        mean = average / xp.reshape(total, (-1, *(1,) * (average.ndim - 1)))
        if not isinstance(old, LowRank):
            return mean, xp.zeros_like(old[:, 0], dtype=xp.int32)
        U, D, code = self.sketch.modes(mean, omega, old.D.shape[-1])
        trace = xp.sum(side.diagonal(mean), axis=-1)
        new = lowrank.with_modes(old, U, D, trace, self.outside)
        return replace(new, rank=self.rank.next(new)), code
