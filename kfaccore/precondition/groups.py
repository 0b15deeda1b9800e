"""What one step treats alike: a network-level method with its layers, or one layer under the same names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from kfaccore.method import Block, Hyper, Method, RowsAtSolve, S, State, T, declares
from kfaccore.precondition.given import named
from kfaccore.record import Factored, Record
from kfaccore.solution import Solution
from kfaccore.xp.arrays import Array

Hypers = Mapping[str, Hyper]
Grads = Mapping[str, Array | Factored]
N = TypeVar("N")  # a network-level method's state
X = TypeVar("X")


class NetworkMethod(Protocol[N, T]):
    """A method on dicts {layer: ...} of one batch with the same draws; its state has `layers`, one a layer.

    needs_records   whether `solve` needs the records of every step
    """

    needs_records: ClassVar[bool]

    def covers(self, blocks: Mapping[str, Block]) -> list[str]:
        """The layers it takes; the others go to the methods that stand alone."""
        ...

    def init(self, blocks: Mapping[str, Block], like: Array) -> N:
        """As `Method.init`, for all of them."""
        ...

    def measure(self, state: N, records: Mapping[str, Record], hypers: Hypers) -> dict[str, T]:
        """Stats of each layer."""
        ...

    def combine(self, first: dict[str, T], second: dict[str, T]) -> dict[str, T]:
        """Stats of two micro-batches as one."""
        ...

    def update(self, state: N, stats: Mapping[str, T], hypers: Hypers, donate: bool = False) -> N:
        """Averages moved."""
        ...

    def refresh(self, state: N, hypers: Hypers) -> N:
        """Inverses from averages."""
        ...

    def solve(self, state: N, grads: Grads, hypers: Hypers, records: Mapping[str, Record] | None = None) -> Solution:
        """Directions: `direction` and `code` are dicts."""
        ...


@dataclass(frozen=True)
class Alone(Generic[S, T]):
    """The method of one layer under the names of a network-level one; errors are told the layer's name."""

    name: str
    method: Method[S, T]

    @property
    def needs_records(self) -> bool:
        return declares(self.method, RowsAtSolve)

    def measure(self, state: S, records: Mapping[str, Record], hypers: Hypers) -> dict[str, T]:
        with named(self.name):
            return {self.name: self.method.measure(state, records[self.name], hypers[self.name])}

    def combine(self, first: dict[str, T], second: dict[str, T]) -> dict[str, T]:
        with named(self.name):
            return {self.name: self.method.combine(first[self.name], second[self.name])}

    def update(self, state: S, stats: Mapping[str, T], hypers: Hypers, donate: bool = False) -> S:
        with named(self.name):
            return self.method.update(state, stats[self.name], hypers[self.name], donate)

    def refresh(self, state: S, hypers: Hypers) -> S:
        with named(self.name):
            return self.method.refresh(state, hypers[self.name])

    def solve(self, state: S, grads: Grads, hypers: Hypers, records: Mapping[str, Record] | None = None) -> Solution:
        record = records[self.name] if records else None
        with named(self.name):
            found = self.method.solve(state, grads[self.name], hypers[self.name], record)
        return Solution({self.name: found.direction}, {self.name: found.code}, found.state, found.info)


@dataclass(frozen=True)
class Group:
    """Layers that are measured, refreshed and solved in one call; `label` is what its information is kept under."""

    label: str
    names: tuple[str, ...]
    method: NetworkMethod | Alone

    @property
    def alone(self) -> bool:
        """Whether it is one layer by itself."""
        return isinstance(self.method, Alone)

    def of(self, given: Mapping[str, X]) -> dict[str, X]:
        """The part of a dict that is about these layers."""
        return {name: given[name] for name in self.names if name in given}

    def layers(self, state: object) -> dict[str, State]:
        """The states of its layers."""
        known: Any = state
        return {self.names[0]: known} if self.alone else known.layers
