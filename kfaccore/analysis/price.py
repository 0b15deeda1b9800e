"""What measuring a method on a layer will take, before anything of that size exists.

Bytes come from the method's own `init` on shapes. Seconds are a count of multiplications over the rate of a matrix
product on this machine, times what the method was seen to need more than that on layers it has been measured on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from kfaccore import tree
from kfaccore.method import Block, Method, Resting, declares
from kfaccore.method import Matrix as HoldsBlock
from kfaccore.record import Record
from kfaccore.xp.arrays import Array
from kfaccore.xp.shapes import Shape

_DECOMPOSED = 20  # d^3 that an inverse or eigenvectors take, in multiplications of a product
_WORK = 6  # matrices beside the result while one is decomposed
_UNSEEN = 2.0  # a method that was not seen yet may take this many times what is counted


@dataclass(frozen=True)
class Price:
    """`fit` bytes held at once in float64 (half of it in float32), and multiplications: `swept` in an update, `once` in
    the refresh and solve that follow all of them."""

    fit: int
    swept: float
    once: float

    def work(self, cycles: int) -> float:
        """Multiplications of a state that takes so many updates."""
        return cycles * self.swept + self.once


def price(method: Method, record: Record) -> Price:
    """Of measuring `method` on this record; raises what its `init` does for a block it cannot take."""
    block = Block.of(record)
    like: Any = Shape((1,), np.dtype(np.float64))
    leaves: list[Array] = tree.leaves(method.init(block, like))
    state = sum(_bytes(leaf) for leaf in leaves)
    square = [leaf for leaf in leaves if isinstance(leaf, Shape) and _is_square(leaf)]
    largest = max((leaf.nbytes // leaf.shape[0] for leaf in square), default=0)
    decomposed = sum(leaf.shape[0] * leaf.shape[-1] ** 3 for leaf in square)
    size = block.d_out * block.d_in * block.blocks
    rows = record.draws * record.batch
    J = 8 * rows * size if declares(method, HoldsBlock) else 0  # per-example gradients, all at once
    positions = record.batch * record.shared
    products = positions * (block.d_in**2 + record.draws * block.d_out**2) * block.blocks
    products = 0 if not square else rows * size * size if J else products
    # coefficients of examples are solved for: J J^T with two copies to factorise
    examples = rows if declares(method, Resting) else 0
    return Price(
        fit=3 * state + _WORK * largest + J + 4 * 8 * size + 3 * 8 * examples**2,
        swept=products + 4.0 * rows * record.shared * size,
        once=_DECOMPOSED * decomposed / 2 + examples**2 * (examples + block.d_in + block.d_out),
    )


def _is_square(leaf: Shape) -> bool:
    return leaf.ndim == 3 and leaf.shape[-1] == leaf.shape[-2]


def _bytes(leaf: Array | float) -> int:
    return leaf.nbytes if isinstance(leaf, Shape) else np.asarray(leaf).nbytes


@cache
def rate() -> float:
    """Multiplications a second of a product of two matrices, float64, here and now."""
    x = np.ones((256, 256))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        np.matmul(x, x)
        seconds.append(time.perf_counter() - start)
    return 256**3 / max(min(seconds), 1e-6)


@dataclass
class Pace:
    """Predicted seconds, corrected by what was seen."""

    factors: dict[str, float] = field(default_factory=dict)

    def seconds(self, label: str, work: float) -> float:
        """What so much work of a kind should take on this machine."""
        return self.factors.get(label, _UNSEEN) * work / rate()

    def saw(self, label: str, work: float, seconds: float) -> None:
        """Learn from a layer; small ones, whose time is that of calls, teach nothing."""
        if work > 1e7:
            self.factors[label] = seconds * rate() / work
