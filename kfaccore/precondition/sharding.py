"""Which ranks hold what: averages and inverses of a layer lie on the ranks that solve for it, and nowhere else.

Elsewhere stands a hollow state: arrays of the same shapes whose every number is one zero in memory, so that trees,
names and stacks are those of one process. Statistics are summed over all ranks where the state is. Methods whose
`measure` looks at the state (a basis, a root) keep it on every rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

import numpy as np

from kfaccore import tree
from kfaccore.method import Block, Method, State
from kfaccore.precondition.assigned import Assigned
from kfaccore.precondition.comm import Communicator
from kfaccore.precondition.placement import exchanged
from kfaccore.precondition.stacks import Layers, restacked
from kfaccore.precondition.trial import Trial
from kfaccore.xp.arrays import Array, device_of, namespace

S = TypeVar("S", bound=State)
Work = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Shards:
    """Methods and blocks of the layers of several ranks, and which of them solve for each."""

    comm: Communicator
    methods: Mapping[str, Method]
    blocks: Mapping[str, Block]
    work: Work

    @classmethod
    def of(
        cls, comm: Communicator, assigned: Assigned, names: Iterable[str], blocks: Mapping[str, Block], work: Work
    ) -> Shards:
        """Of the layers `names`; blocks and work may have others too."""
        methods = {name: assigned.of(name) for name in names}
        return cls(comm, methods, blocks, {name: work[name] for name in methods})

    def holders(self, name: str) -> tuple[int, ...]:
        """The ranks on which a layer's state is, its owner first."""
        ranks = self.work[name]
        block = self.blocks[name]
        if len(ranks) == self.comm.world or _blind(self.methods[name], block.diagonal_in, block.diagonal_out):
            return ranks
        return (ranks[0], *(r for r in range(self.comm.world) if r != ranks[0]))

    @property
    def places(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """The holders of every layer."""
        return tuple((name, self.holders(name)) for name in self.work)

    def placed(self, layers: Layers, places: Work) -> Layers:
        """Each stack on its ranks and nowhere else, wherever `places` says that its layers were."""
        return self.kept(restacked(self.moved(layers, places), layers.stacks))

    def kept(self, layers: Layers) -> Layers:
        """The stacks of this rank, hollow ones for the others."""
        pairs = zip(layers.stacks, layers.states, strict=True)
        ours = [state if self.comm.rank in self.holders(names[0]) else hollow(state) for names, state in pairs]
        return replace(layers, states=tuple(ours))

    def moved(self, layers: Mapping[str, S], places: Work) -> Mapping[str, S]:
        """Whole states on all ranks of the layers that other ranks held, where `places` says; every rank must call."""
        astray = {name: places[name] for name in layers if places.get(name, ()) and self._astray(name, places[name])}
        return self.gathered(layers, astray) if astray else layers

    def _astray(self, name: str, ranks: tuple[int, ...]) -> bool:
        return not set(self.holders(name)) <= set(ranks)

    def whole(self, layers: Mapping[str, S], places: Work) -> Mapping[str, S]:
        """All states on all ranks, from where `places` says that they are; every rank must call it."""
        return self.gathered(layers, {name: places.get(name) or self.holders(name) for name in layers})

    def gathered(self, layers: Mapping[str, S], places: Work) -> Mapping[str, S]:
        """The states of the layers of `places` on all ranks, from the first that has each; every rank must call it."""
        world = range(self.comm.world)
        everyone = {name: (held[0], *(r for r in world if r != held[0])) for name, held in places.items()}
        whole = frozenset(name for name, held in places.items() if len(held) < self.comm.world)
        some = {name: layers[name] for name in everyone}
        return {**layers, **exchanged(self.comm, some, self.methods, everyone, self.blocks, whole)}


def hollow(state: S) -> S:
    """The state's shapes: numbers a block stay, larger arrays are one zero, wherever it is looked at."""
    return tree.map(_hollow, state)


def _hollow(x: Array) -> Array:
    if x.ndim < 2:
        return x
    xp = namespace(x)
    return xp.broadcast_to(xp.zeros((), dtype=x.dtype, device=device_of(x)), x.shape)


@cache
def _blind(method: Method, diagonal_in: bool, diagonal_out: bool) -> bool:
    """Whether Stats are those of a fresh state whatever the state: tried on a layer of two by two."""
    like: Any = np.zeros(1)
    found = Trial.of(method, like, Block(2, 2, diagonal_in=diagonal_in, diagonal_out=diagonal_out))
    pairs = zip(found.measured.values(), found.again.values(), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)
