"""What network-level methods over block methods have in common: measure and update layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from kfaccore.method import Block, Hyper
from kfaccore.methods import KFAC
from kfaccore.record import Record
from kfaccore.solution import Solution
from kfaccore.xp.arrays import Array, scalar

Hypers = Mapping[str, Hyper]


@dataclass(frozen=True)
class Each:
    """`method` is one block method for all layers, or a mapping from layer to method; states have `layers`."""

    method: Any = field(default=KFAC())
    needs_records: ClassVar[bool] = False

    def covers(self, blocks: Mapping[str, Block]) -> list[str]:
        """All layers."""
        return list(blocks)

    def measure(self, state: Any, records: Mapping[str, Record], hypers: Hypers) -> dict[str, Any]:
        return {name: self._of(name).measure(state.layers[name], r, hypers[name]) for name, r in records.items()}

    def combine(self, first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
        return {name: self._of(name).combine(stats, second[name]) for name, stats in first.items()}

    def update(self, state: Any, stats: Mapping[str, Any], hypers: Hypers, donate: bool = False) -> Any:
        moved = {n: self._of(n).update(state.layers[n], s, hypers[n], donate) for n, s in stats.items()}
        return replace(state, layers={**state.layers, **moved})

    def matvec(self, state: Any, v: Mapping[str, Array], hypers: Hypers) -> dict[str, Array]:
        """The block methods' F~ v; a correction between layers has none without records."""
        return {name: self._of(name).matvec(state.layers[name], x, hypers[name]) for name, x in v.items()}

    def _of(self, name: str) -> Any:
        if not isinstance(self.method, Mapping):
            return self.method
        if name not in self.method:
            missing = f"{type(self).__name__}.method has no entry for layer {name!r}"
            raise ValueError(f"{missing}; it has {sorted(self.method)}")
        return self.method[name]


def joined(state: Any, found: Mapping[str, Solution], info: dict[str, Array] | None = None) -> Solution:
    """Solutions of layers as one: direction and code are dicts, the layers' states are those of `state`."""
    state = replace(state, layers={**state.layers, **{name: s.state for name, s in found.items()}})
    directions, codes = {n: s.direction for n, s in found.items()}, {n: s.code for n, s in found.items()}
    return Solution(directions, codes, state, info or {})


def one_batch(records: Mapping[str, Record], names: Iterable[str]) -> Any:
    """n of the batch of the layers `names`; ValueError where their records are not of one with the same draws."""
    missing = sorted(set(names) - set(records))
    if missing:
        raise ValueError(f"layers {missing} have gradients but no records")
    first = next(iter(names))
    for name in names:
        for what in ("draws", "batch"):
            left, right = getattr(records[first], what), getattr(records[name], what)
            if left != right:
                raise ValueError(f"{what} is {left} in layer {first!r} and {right} in {name!r}; need one batch")
    return scalar(records[first].n, records[first].g)
