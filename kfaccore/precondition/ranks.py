"""What a preconditioner on several ranks adds: who solves for which layer, who holds it, and the state of all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kfaccore import tree
from kfaccore.method import Block
from kfaccore.precondition.assigned import Assigned
from kfaccore.precondition.checks import checked
from kfaccore.precondition.comm import Communicator
from kfaccore.precondition.due import Due
from kfaccore.precondition.given import Given
from kfaccore.precondition.groups import Grads
from kfaccore.precondition.placement import agree, assign, costs
from kfaccore.precondition.sharding import Shards
from kfaccore.precondition.stacks import Layers
from kfaccore.precondition.state import State
from kfaccore.step import Rule


class OnRanks:
    """Base of a preconditioner."""

    comm: Communicator
    assigned: Assigned
    rule: Rule

    def gather(self, state: State) -> State:
        """The state with averages and inverses of all ranks, to be saved by any of them; every rank must call it."""
        shards = self._shards(state.layers, dict(state.blocks))
        return state if shards is None else replace(state, layers=shards.whole(state.layers, dict(state.places)))

    def _agreed(
        self, due: Due, state: State, layers: Layers, records: Mapping[str, Any], grads: Grads
    ) -> dict[str, Sequence[Given]]:
        """`checked` records; ValueError on all ranks where they do not agree on what takes part or is measured."""
        pre: Any = self
        if self.comm.world == 1:
            return checked(pre, due, state, records, grads)
        measured = records if due.measures or self.rule.needs_records else ()
        asked = self.comm, grads, tuple(layers), tree.leaves(layers.states)[0], measured
        if not records:  # before this rank alone is refused for it
            agree(*asked)
            return checked(pre, due, state, records, grads)
        batches = checked(pre, due, state, records, grads)
        agree(*asked)
        return batches

    def _placed(self, layers: Layers, state: State) -> tuple[Layers, State]:
        """Stacks and state of a step, each on its ranks."""
        shards = self._shards(state.layers, dict(state.blocks))
        if shards is None:
            return layers, state
        return shards.placed(layers, dict(state.places)), replace(state, places=shards.places)

    def _shards(self, names: Iterable[str], blocks: Mapping[str, Block]) -> Shards | None:
        """The ranks of layers; None where there is one."""
        given = self.assigned.narrowed(blocks)
        return Shards.of(self.comm, self.assigned, names, given, self._work(given)) if self.comm.world > 1 else None

    def _work(self, given: Mapping[str, Block]) -> dict[str, tuple[int, ...]]:
        """The ranks of each layer, whose blocks are as its method has them; all where own shares are asked for."""
        return assign(costs(given), self.comm.world, 1.0 if self.rule.wants_own else self.comm.fraction)
