"""Brand K-FAC with corrections (B-KFAC-C): as BrandKFAC; a refresh corrects a share of A ~ U_a D_a U_a^T by A.

A refresh takes a random share of the modes, Q = U[:, chosen], and puts the eigenpairs of A in span(Q) in their place:
|A - U D U^T|_F never grows, and the span stays what it was. Shares are consecutive runs of one random order, so that
each mode has its turn. The averages A and G are kept for it.

Exact where BrandKFAC is: at most `rank` non-zero eigenvalues, then equal to K-FAC.
Source: Puiu 2022 (2210.08494), B-KFAC-C.
Cost: update of K-FAC and of BrandKFAC; refresh 2 share (rank + Block.rows) d^2 a side; solve of BrandKFAC; memory
d^2 + (rank + Block.rows) d a side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import array_api_compat as aac
import numpy as np

from kfaccore import factors
from kfaccore import xp as kernels
from kfaccore.damping import Split, pi
from kfaccore.linalg import kron
from kfaccore.linalg.inverse import accepted
from kfaccore.method import Block, Hyper
from kfaccore.methods.lowrank import brand_update as brand
from kfaccore.methods.lowrank import lowrank, modes
from kfaccore.methods.lowrank.lowrank import LowRank, Rank, even, fixed
from kfaccore.record import Factored, Record
from kfaccore.record.sharing import expand
from kfaccore.solution import Solution
from kfaccore.xp.arrays import Array, namespace


@dataclass(frozen=True)
class State:
    """Modes A, G and averages full_A, full_G, all times their `weight` (blocks,); the random orders of the modes
    (blocks, k), the same in each block, rolled on by each refresh; code (blocks,)."""

    A: Any
    G: Any
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
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}; need a number in (0, 1]")


@dataclass(frozen=True)
class BrandCKFAC:
    """BrandKFAC whose refresh corrects modes; see the module. Fields as there, and

    correction    Correction(share, seed)
    """

    sharing: Callable[[Record], Record] = expand
    rank: Rank = fixed
    correction: Correction = Correction()
    split: Split = pi
    outside: Callable[[LowRank], Array] = even
    start: float = 0.0
    cycles: ClassVar[int] = 1

    def __post_init__(self) -> None:
        modes.checked(self.split)

    def init(self, block: Block, like: Array) -> State:
        fields, zeros = modes.init(block, self.rank, like), factors.init(block, like)
        rng = np.random.default_rng(self.correction.seed)
        for name in "AG":
            k = fields[name].D.shape[-1] if isinstance(fields[name], LowRank) else 0
            order = np.tile(rng.permutation(k).astype(np.int32), (block.blocks, 1))
            fields |= {f"full_{name}": zeros[name], f"order_{name}": kernels.from_host(order, like)}
        return State(**fields)

    def measure(self, state: State, record: Record, hyper: Hyper) -> modes.Stats:
        return modes.measure(record, self.sharing)

    def combine(self, first: modes.Stats, second: modes.Stats) -> modes.Stats:
        return modes.combine(first, second)

    def update(self, state: State, stats: modes.Stats, hyper: Hyper, donate: bool = False) -> State:
        full = modes.averaged(state, stats, hyper, donate)
        return replace(modes.moved(state, stats, hyper, self.rank, self.outside), **full)

    def refresh(self, state: State, hyper: Hyper) -> State:
        A, order_A, code_a = self._corrected(state.A, state.full_A, state.order_A)
        G, order_G, code_g = self._corrected(state.G, state.full_G, state.order_G)
        code = namespace(code_a).maximum(code_a, code_g)
        kept, code = accepted((A, G), code, (state.A, state.G), state.code, state.weight)
        return replace(state, A=kept[0], G=kept[1], order_A=order_A, order_G=order_G, code=code)

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

    def _corrected(self, low: Any, average: Array, order: Array) -> tuple[Any, Array, Array]:
        """Modes, the order rolled on, a code."""
        if not isinstance(low, LowRank) or low.D.shape[-1] == 0:
            xp = namespace(average)
            ok = xp.zeros((average.shape[0],), dtype=xp.int32, device=aac.device(average))
            return low, order, ok
        many = max(1, round(self.correction.share * order.shape[-1]))
        chosen, rest = order[0, :many], order[0, many:]
        new, code = brand.corrected(low, average, chosen, rest, self.outside)
        return new, namespace(order).concat([order[:, many:], order[:, :many]], axis=-1), code
