"""What network-level methods over block methods have in common: measure and update layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, replace
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from kfaccore.factors import needs_draws
from kfaccore.method import Block, Hyper, Method, State, Stats
from kfaccore.methods import KFAC
from kfaccore.record import Record
from kfaccore.refreshing import steps
from kfaccore.solution import Solution
from kfaccore.xp.arrays import Array, scalar
from kfaccore.xp.asking import alone, lockstep

Hypers = Mapping[str, Hyper]
NetworkSolution = Solution[dict[str, Array]]


class Layered(Protocol):
    """A frozen dataclass that has the states of its layers, by name."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def layers(self) -> Mapping[str, State]: ...


L = TypeVar("L", bound=Layered)


@dataclass(frozen=True)
class Each(Generic[L]):
    """`method` is one block method for all layers, or a mapping from layer to method; states have `layers`."""

    method: Method | Mapping[str, Method] = field(default=KFAC())
    needs_records: ClassVar[bool] = False

    def covers(self, blocks: Mapping[str, Block]) -> list[str]:
        """All layers."""
        return list(blocks)

    def measure(self, state: L, records: Mapping[str, Record], hypers: Hypers) -> dict[str, Stats]:
        return {name: self._of(name).measure(state.layers[name], r, hypers[name]) for name, r in records.items()}

    def combine(self, first: dict[str, Stats], second: dict[str, Stats]) -> dict[str, Stats]:
        return {name: self._of(name).combine(stats, second[name]) for name, stats in first.items()}

    def update(self, state: L, stats: Mapping[str, Stats], hypers: Hypers, donate: bool = False) -> L:
        moved = {}
        for name, found in stats.items():
            moved[name] = self._of(name).update(state.layers[name], found, hypers[name], donate)
        return replace(state, layers={**state.layers, **moved})

    def _refreshed(self, layers: Mapping[str, State], hypers: Hypers) -> dict[str, State]:
        """The states of some layers after a refresh: matrices of one size in one call."""
        callers = [steps(self._of(name), layer, hypers[name]) for name, layer in layers.items()]
        return dict(zip(layers, alone(lockstep(callers)), strict=True))

    def matvec(self, state: L, v: Mapping[str, Array], hypers: Hypers) -> dict[str, Array]:
        """The block methods' F~ v; a correction between layers has none without records."""
        return {name: self._of(name).matvec(state.layers[name], x, hypers[name]) for name, x in v.items()}

    def _of(self, name: str) -> Method:
        if not isinstance(self.method, Mapping):
            return self.method
        if name not in self.method:
            missing = f"{type(self).__name__}.method has no entry for layer {name!r}"
            raise ValueError(f"{missing}; it has {sorted(self.method)}")
        return self.method[name]


def joined(state: Layered, found: Mapping[str, Solution], info: dict[str, Array] | None = None) -> NetworkSolution:
    """Solutions of layers as one, whose states are those of `state`."""
    state = replace(state, layers={**state.layers, **{name: solution.state for name, solution in found.items()}})
    directions = {name: solution.direction for name, solution in found.items()}
    codes = {name: solution.code for name, solution in found.items()}
    return NetworkSolution(directions, codes, state, info or {})


def one_batch(records: Mapping[str, Record], names: Iterable[str]) -> float | Array:
    """n of the batch of the layers `names`; ValueError where their records are not of one with the same draws, or have
    none: F of zero draws is not defined, only G = I is."""
    missing = sorted(set(names) - set(records))
    if missing:
        raise ValueError(f"layers {missing} have gradients but no records")
    first = next(iter(names))
    one = records[first]
    for name in names:
        other = records[name]
        for what, left, right in (("draws", one.draws, other.draws), ("batch", one.batch, other.batch)):
            if left != right:
                raise ValueError(f"{what} is {left} in layer {first!r} and {right} in {name!r}; need one batch")
    needs_draws(one)
    return scalar(one.n, one.g)
