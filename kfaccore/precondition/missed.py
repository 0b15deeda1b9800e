"""What layers missed: dates of a clock that passed while they took no part, as heads, experts and parts opened later.

Such a layer does not wait for the next date, which it may miss as well: it is due at its next gradient. Nor does one
whose first record was not finite: there was nothing to measure, nor to refresh from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import array_api_compat as aac
import numpy as np

from kfaccore import tree
from kfaccore.xp.arrays import Array, is_tracer
from kfaccore.xp.blocks import together

Flags = Array  # (layers,), on the host or traced
MEASURE = 1
AWAITED = 2
REFRESH = 4
NEVER = 8


def places(names: Collection[str], among: Collection[str]) -> np.ndarray:
    """Where names stand among others."""
    place = {name: i for i, name in enumerate(among)}
    return np.array([place[name] for name in names], int)


@dataclass(frozen=True, eq=False)
class Missed(Mapping[str, Any]):
    """{layer: (1,), a sum of these}, kept as one array: a leaf for each would be an argument for each of a program.

    MEASURE   a date of the update clock passed since the layer was measured
    AWAITED   and it has come by since, in a step without its records: they are wanted until it is measured. A layer
              that never comes by is not waited for
    REFRESH   a date of the refresh clock passed since it was refreshed with all that it was to be measured by then
    NEVER     no step with it was finite yet; later ones are not asked, as averages and inverses then stay
    """

    table: Any
    names: tuple[str, ...] = tree.static(default=())

    @classmethod
    def start(cls, names: Collection[str]) -> Missed:
        """Of layers that have just been made: each is due at its first gradient. On the host, where steps are decided,
        wherever the states are; a traced shell brings it to its device."""
        return cls(np.full(len(names), MEASURE | REFRESH | NEVER, np.int32), tuple(names))

    @cached_property
    def places(self) -> dict[str, int]:
        """Where each layer stands, looked up once for all."""
        return {name: i for i, name in enumerate(self.names)}

    def __getitem__(self, name: str) -> Any:
        place = self.places[name]
        return self.table[place : place + 1]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def rebuilt(self, new: Mapping[str, Any]) -> Mapping[str, Any]:
        """The same layers with other numbers; a dict where what came are no arrays."""
        if not all(aac.is_array_api_obj(x) and x.ndim for x in new.values()):
            return dict(new)
        return replace(self, table=together([new[name] for name in self.names])) if new else self

    @cached_property
    def nothing(self) -> bool:
        """Whether it is known that no layer missed anything; asked once of a state that stays as it is."""
        return not self.names or (not is_tracer(self.table) and not np.any(np.asarray(self.table)))

    @cached_property
    def awaited(self) -> bool:
        """Whether the records of a layer are waited for."""
        return not self.nothing and bool(self.has(AWAITED).any())

    def among(self, names: Collection[str]) -> Missed | None:
        """Of some layers; None where it is known that they missed nothing."""
        if self.nothing:
            return None
        found = Missed(self.table[places(names, self.names)], tuple(names))
        return None if found.nothing else found

    def has(self, what: int) -> Any:
        """Which layers have it in their sum."""
        return (self.table & what) > 0

    def within(self, names: Collection[str]) -> np.ndarray:
        """Which layers are in a collection, on the host."""
        return np.array([name in names for name in self.names], bool)

    def halfway(self, measured: Collection[str], anew: Collection[str]) -> Missed:
        """After a step that failed, which has measured some layers and not refreshed them; some begin anew."""
        table = np.asarray(self.table) & ~np.where(self.within(measured), MEASURE | AWAITED, 0).astype(np.int32)
        start = MEASURE | REFRESH | NEVER
        return replace(self, table=table | np.where(self.within(anew), start, 0).astype(np.int32))

    def after(
        self,
        update: Flags | bool,
        refresh: Flags | bool,
        caught_up: bool,
        present: Collection[str],
        measured: Collection[str],
        idle: Collection[str],
        refused: Callable[[], Flags],
    ) -> Missed:
        """Once a step is taken.

        update, refresh   whether a date was struck, of all layers or each
        caught_up         whether those that had missed one did not wait
        present           layers with a gradient; `measured` with a record too; `idle` need none
        refused           which had anything that is not finite; on a device that is read, so it is asked of new layers
        """
        if not self.names:
            return self
        with_gradient = self.within(present)
        missed = self.has(MEASURE)
        late = self.has(REFRESH)
        done = self.within(measured) & (update | (missed & caught_up))
        never = self.has(NEVER)
        new = done & never
        if is_tracer(new) or new.any():
            done = done & ~(never & refused())
        missed = (missed | update) & ~done & ~self.within(idle)
        late = (late | refresh) & ~(with_gradient & ~missed & (refresh | (late & caught_up)))
        awaited = missed & (self.has(AWAITED) | with_gradient)
        table = missed * MEASURE + awaited * AWAITED + late * REFRESH + (never & ~done & missed) * NEVER
        return replace(self, table=table.astype(self.table.dtype))
