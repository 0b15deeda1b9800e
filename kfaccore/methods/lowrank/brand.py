"""Brand K-FAC (B-KFAC): A ~ U_a D_a U_a^T grown from the rows alone, G likewise; x = (G~ + d_g I)^-1 V (A~ + d_a I)^-1.

At each update the `rank` largest modes take part in U D U^T <- decay U D U^T + (1 - decay) X^T X / rows, solved exactly
in the span of modes and new rows X; all of min(d, rank + Block.rows) modes are held and used until the next. No (d, d)
exists and a gradient given as Factored is never formed. What was cut is lost: U D U^T <= A always, and the error is at
least that of the best modes. For d >> rows; a convolution has more rows than d and is better off with RandomizedKFAC.

Exact while nothing is cut, that is while the averages have at most `rank` non-zero eigenvalues, then equal to K-FAC.
Source: Puiu 2022 (2210.08494), with the damping, continuation and identity start of 2206.15397.
Cost: update d (rank + rows)^2 a side, linear in d; no refresh; solve 4 rank d_in d_out, or 4 rank d rows factored;
memory (rank + Block.rows) (d_in + d_out).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from kfaccore.damping import Split, pi
from kfaccore.method import Block, Hyper
from kfaccore.methods.lowrank import grown
from kfaccore.methods.lowrank.grown import Grown
from kfaccore.methods.lowrank.lowrank import Factor, Outside, Rank, even, fixed
from kfaccore.record import Record
from kfaccore.record.sharing import expand
from kfaccore.xp.arrays import Array


@dataclass(frozen=True)
class State:
    """Modes of the averages (or a side's diagonal), times their `weight` (blocks,); code (blocks,)."""

    A: Factor
    G: Factor
    weight: Array
    code: Array


@dataclass(frozen=True)
class BrandKFAC(Grown[State]):
    """K-FAC by leading modes grown from rows: U D U^T <- decay U D U^T + (1 - decay) X^T X / rows at each update, cut.

    x = (Ug Dg Ug^T + d_g I)^-1 V (Ua Da Ua^T + d_a I)^-1; no (d, d) array exists. V and x (blocks, d_out, d_in).
    Equal to K-FAC while nothing is cut. Puiu 2022, arxiv.org/abs/2210.08494.

    sharing   expand | reduce
    rank      fixed | adaptive_brand | Rank(cap, start, ...)
    split     pi | equal | per_factor | top | Relative(...)
    outside   nothing | lowest | even
    start     the identity's coefficient before any update: 0 (averages are divided by their weight) or 1
    """

    sharing: Callable[[Record], Record] = expand
    rank: Rank = fixed
    split: Split = pi
    outside: Outside = even
    start: float = 0.0
    cycles: ClassVar[int] = 1
    linear_sides: ClassVar[bool] = True

    def init(self, block: Block, like: Array) -> State:
        return State(**grown.init(block, self.rank, like))

    def refresh(self, state: State, hyper: Hyper) -> State:
        return state
