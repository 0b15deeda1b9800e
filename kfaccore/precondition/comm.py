"""Communication between ranks: what a preconditioner asks of it, and the communicator of a single process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


class Communicator(Protocol):
    """Ranks that train one model; trees hold arrays of the training namespace.

    rank, world   this process and how many there are
    fraction      share of the ranks that solve for each layer; see `placement`
    """

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    @property
    def fraction(self) -> float: ...

    def all_reduce(self, tree: Any) -> Any:
        """Leafwise sum over ranks."""
        ...

    def broadcast(self, tree: Any, ranks: tuple[int, ...]) -> Any:
        """The tree of ranks[0] on all of `ranks`, who give one of the same structure and shapes; any other rank
        gets its own back."""
        ...


@dataclass(frozen=True)
class Serial:
    """One process: every call returns its argument."""

    rank: int = 0
    world: int = 1
    fraction: float = 1.0

    def all_reduce(self, tree: Any) -> Any:
        return tree

    def broadcast(self, tree: Any, ranks: tuple[int, ...]) -> Any:
        return tree
