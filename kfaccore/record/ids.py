"""Inputs of an embedding: which rows of its table, never as one-hot rows."""

from __future__ import annotations

from dataclasses import dataclass

from kfaccore.xp.arrays import Array, namespace
from kfaccore.xp.integers import signed


@dataclass(frozen=True)
class Ids:
    """Inputs of an embedding: `index` (batch, shared) or (batch,) integers below `size`, never one-hot rows.

    Of any dtype of integers, and kept as int32 or int64.
    A record of an index outside 0 .. size-1 is not finite, unless its mask says that the position does not exist.
    """

    index: Array
    size: int

    def __post_init__(self) -> None:
        xp = namespace(self.index)
        if not xp.isdtype(self.index.dtype, "integral"):
            raise TypeError(f"Ids.index has dtype {self.index.dtype}; need integers")
        if self.index.ndim not in (1, 2):
            raise ValueError(f"Ids.index has shape {tuple(self.index.shape)}; need (batch,) or (batch, shared)")
        if self.size < 1:
            raise ValueError(f"Ids.size is {self.size}; need the number of rows of the embedding, at least 1")
        object.__setattr__(self, "index", signed(self.index))
