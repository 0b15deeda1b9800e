"""Communication between ranks: what a preconditioner asks of it, and the communicator of a single process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


class Communicator(Protocol):
    """Ranks that train one model; trees hold arrays of the training namespace."""

    def all_reduce(self, tree: Any) -> Any:
        """Leafwise sum over ranks."""
        ...

    def broadcast(self, tree: Any, owner: int) -> Any:
        """The owner's tree on every rank."""
        ...


@dataclass(frozen=True)
class Serial:
    """One process: every call returns its argument."""

    def all_reduce(self, tree: Any) -> Any:
        return tree

    def broadcast(self, tree: Any, owner: int) -> Any:
        return tree
