"""Brand K-FAC with corrections (B-KFAC-C): as BrandKFAC; a refresh corrects a share of A ~ U_a D_a U_a^T by A.

A refresh takes a random share of the modes, Q = U[:, chosen], and puts the eigenpairs of A in span(Q) in their place:
|A - U D U^T|_F never grows, and the span stays what it was. Shares are consecutive runs of one random order, so that
each mode has its turn. The averages A and G are kept for it.

Exact where BrandKFAC is: at most `rank` non-zero eigenvalues, then equal to K-FAC.
Source: Puiu 2022 (2210.08494), B-KFAC-C.
Cost: update of K-FAC and of BrandKFAC; refresh 2 share k d^2 + 2 k^2 d + k^3 a side of k = rank + Block.rows modes;
solve of BrandKFAC; memory d^2 + k d a side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from kfaccore import factors
from kfaccore import xp as kernels
from kfaccore.damping import Split, pi
from kfaccore.method import Block, Hyper
from kfaccore.methods.lowrank import brand_update as brand
from kfaccore.methods.lowrank import grown, modes
from kfaccore.methods.lowrank.grown import Kept
from kfaccore.methods.lowrank.lowrank import Factor, LowRank, Outside, Rank, even, fixed
from kfaccore.options import instance
from kfaccore.record import Record
from kfaccore.record.sharing import expand
from kfaccore.refreshing import InSteps
from kfaccore.xp.arrays import Array, namespace
from kfaccore.xp.asking import Asks, lockstep
from kfaccore.xp.ranges import PART, ranged


@dataclass(frozen=True)
class State:
    """Modes A, G and averages full_A, full_G, all times their `weight` (blocks,); the random orders of the modes
    (blocks, k), at first the same in each block, rolled on by each of its refreshes; code (blocks,)."""

    A: Factor
    G: Factor
    weight: Array
    full_A: Array
    full_G: Array
    order_A: Array
    order_G: Array
    code: Array


@dataclass(frozen=True)
class Correction:
    """The share of the modes that one refresh corrects, and the seed of their order."""

    share: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        ranged(self, share=PART)


@dataclass(frozen=True)
class BrandCKFAC(InSteps[State], Kept[State]):
    """BrandKFAC whose refresh puts the eigenpairs of A in span(U[:, chosen]) in the place of a share of its modes.

    |A - U D U^T|_F never grows by it. Shapes, errors and fields as BrandKFAC's, and (Puiu 2022,
    arxiv.org/abs/2210.08494)

    correction    Correction(share, seed)
    """

    sharing: Callable[[Record], Record] = expand
    rank: Rank = fixed
    correction: Correction = Correction()
    split: Split = pi
    outside: Outside = even
    start: float = 0.0
    cycles: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        instance(self, "correction", Correction, "Correction(share, seed)")

    def init(self, block: Block, like: Array) -> State:
        fields = grown.init(block, self.rank, like)
        zeros = factors.init(block, like)
        rng = np.random.default_rng(self.correction.seed)
        return State(
            **fields,
            full_A=zeros["A"],
            full_G=zeros["G"],
            order_A=_order(rng, fields["A"], block.blocks, like),
            order_G=_order(rng, fields["G"], block.blocks, like),
        )

    def refreshing(self, state: State, hyper: Hyper) -> Asks[State]:
        A = self._corrected(state.A, state.full_A, state.order_A)
        G = self._corrected(state.G, state.full_G, state.order_G)
        (new_A, order_A), (new_G, order_G) = yield from lockstep([A, G])
        A, G, code = modes.kept(new_A, new_G, (state.A, state.G), state)
        return replace(state, A=A, G=G, order_A=order_A, order_G=order_G, code=code)

    def _corrected(self, low: Factor, average: Array, order: Array) -> Asks[tuple[tuple[Factor, Array], Array]]:
        """Modes with a code, and the order rolled on."""
        if not isinstance(low, LowRank) or low.D.shape[-1] == 0:
            return (low, modes.well(average)), order
        many = max(1, round(self.correction.share * order.shape[-1]))
        new = yield from brand.corrected(low, average, order[:, :many], order[:, many:], self.outside)
        return new, namespace(order).concat([order[:, many:], order[:, :many]], axis=-1)


def _order(rng: np.random.Generator, low: Factor, blocks: int, like: Array) -> Array:
    """A random order of the modes, int32 (blocks, k), the same in each block; layers of a stack may miss a turn."""
    k = low.D.shape[-1] if isinstance(low, LowRank) else 0
    return kernels.from_host(np.tile(rng.permutation(k).astype(np.int32), (blocks, 1)), like)
