"""Communication between ranks: what a preconditioner asks of it, and the communicator of a single process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

Tree = TypeVar("Tree")  # dataclasses, dicts, tuples and lists of arrays


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

    def all_reduce(self, tree: Tree) -> Tree:
        """Leafwise sum over ranks."""
        ...

    def reduce(self, tree: Tree, ranks: tuple[int, ...]) -> Tree:
        """Leafwise sum over all ranks, on `ranks`; every rank calls it, any other rank gets its own back."""
        ...

    def broadcast(self, tree: Tree, ranks: tuple[int, ...]) -> Tree:
        """The tree of ranks[0] on all of `ranks`, who give one of the same structure and shapes; any other rank
        gets its own back."""
        ...


@dataclass(frozen=True)
class Receivers:
    """A communicator whose sums over all ranks arrive on some of them."""

    comm: Communicator
    ranks: tuple[int, ...]

    @property
    def rank(self) -> int:
        """This process."""
        return self.comm.rank

    @property
    def world(self) -> int:
        """How many there are."""
        return self.comm.world

    @property
    def fraction(self) -> float:
        """Share of the ranks that solve for each layer."""
        return self.comm.fraction

    def all_reduce(self, tree: Tree) -> Tree:
        """The sum over all ranks, on those that receive."""
        return self.comm.reduce(tree, self.ranks)

    def reduce(self, tree: Tree, ranks: tuple[int, ...]) -> Tree:
        """As the communicator does."""
        return self.comm.reduce(tree, ranks)

    def broadcast(self, tree: Tree, ranks: tuple[int, ...]) -> Tree:
        """As the communicator does."""
        return self.comm.broadcast(tree, ranks)


def receives(comm: Communicator) -> bool:
    """Whether this rank gets the sums."""
    return not isinstance(comm, Receivers) or comm.rank in comm.ranks


@dataclass(frozen=True)
class Serial:
    """One process: every call returns its argument."""

    rank: int = 0
    world: int = 1
    fraction: float = 1.0

    def all_reduce(self, tree: Tree) -> Tree:
        return tree

    def reduce(self, tree: Tree, ranks: tuple[int, ...]) -> Tree:
        return tree

    def broadcast(self, tree: Tree, ranks: tuple[int, ...]) -> Tree:
        return tree
