"""What a method is given beside arrays: the sizes of a layer, and the numbers of a step."""

from __future__ import annotations

from dataclasses import dataclass

from kfaccore.record import Ids, Record
from kfaccore.xp.arrays import Array
from kfaccore.xp.ranges import AT_LEAST_0, COUNT, SHARE, SOME, Range, ranged, within


@dataclass(frozen=True)
class Block:
    """Static sizes of a layer: gradients are (blocks, d_out, d_in); rows and samples are a method's capacities.

    diagonal_in, diagonal_out   A, or G, is a diagonal (blocks, d): an embedding's inputs, a side too wide for a matrix
    """

    d_out: int
    d_in: int
    blocks: int = 1
    diagonal_in: bool = False
    rows: int = 0
    samples: int = 0
    diagonal_out: bool = False

    def __post_init__(self) -> None:
        ranged(self, d_out=COUNT, d_in=COUNT, blocks=COUNT, rows=SOME, samples=SOME)

    @classmethod
    def of(cls, record: Record) -> Block:
        """The block a record belongs to."""
        return cls(record.d_out, record.d_in, record.blocks, isinstance(record.a, Ids))


_OLD = Range("a number in [0, 1): it multiplies the old average", SHARE.holds)


@dataclass(frozen=True)
class Hyper:
    """Numbers of one step: `decay` multiplies the OLD average, `damping` is absolute unless the method says so."""

    step: int | Array
    decay: float | Array
    damping: float | Array
    epoch: int | Array = 0

    def __post_init__(self) -> None:
        within("damping", self.damping, AT_LEAST_0)
        within("decay", self.decay, _OLD)
