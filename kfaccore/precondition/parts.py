"""What comes out of a step by layer, cut out of stacks when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

from kfaccore.xp.arrays import Array, namespace

V = TypeVar("V")


@dataclass(frozen=True)
class Rows(Mapping[str, Array]):
    """{layer: its row of `table`}, an array (layers, ...); nothing is cut before it is asked for."""

    names: tuple[str, ...]
    table: Array

    @classmethod
    def of_blocks(cls, names: tuple[str, ...], x: Array) -> Rows:
        """Of an array (all blocks, ...) of a stack."""
        return cls(names, namespace(x).reshape(x, (len(names), -1, *x.shape[1:])))

    @cached_property
    def places(self) -> dict[str, int]:
        """Which row is whose, looked up once for all."""
        return {name: i for i, name in enumerate(self.names)}

    def __getitem__(self, name: str) -> Array:
        return self.table[self.places[name], ...]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Several(Mapping[str, V], Generic[V]):
    """Mappings of different layers as one, in the order of `names`."""

    names: tuple[str, ...]
    mappings: tuple[Mapping[str, V], ...]

    @cached_property
    def whose(self) -> dict[str, Mapping[str, V]]:
        """Which mapping has a layer, looked up once for all; the first of several."""
        return {name: mapping for mapping in reversed(self.mappings) for name in mapping}

    def __getitem__(self, name: str) -> V:
        return self.whose[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def runs(mapping: Mapping[str, Array]) -> Iterator[tuple[tuple[str, ...], Array]]:
    """(layers, their arrays end to end) as they lie, so that those of a stack are never cut."""
    if isinstance(mapping, Several):
        for inner in mapping.mappings:
            yield from runs(inner)
    elif isinstance(mapping, Rows):
        yield mapping.names, namespace(mapping.table).reshape(mapping.table, (-1, *mapping.table.shape[2:]))
    else:
        for name, x in mapping.items():
            yield (name,), x


@dataclass(frozen=True)
class Parts:
    """A group's directions, codes (blocks,) and information by layer; `whole` has all directions of a stack."""

    directions: Mapping[str, Array]
    codes: Mapping[str, Array]
    infos: dict[str, dict[str, Array]]
    whole: Array | None = None
