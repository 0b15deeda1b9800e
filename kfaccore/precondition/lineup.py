"""The groups that take part in a step, and their states: a network-level method, and the stacks it leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kfaccore.method import Block
from kfaccore.precondition.assigned import Assigned
from kfaccore.precondition.groups import Group, Together
from kfaccore.precondition.stack import Stack
from kfaccore.precondition.stacks import Layers, part, put


@dataclass(frozen=True)
class Lineup:
    """Groups with a layer in the step, of a stack those of its layers that have a gradient."""

    layers: Layers
    groups: tuple[Group, ...]
    states: tuple[Any, ...]

    @classmethod
    def of(
        cls,
        assigned: Assigned,
        names: Mapping[str, object],
        together: Mapping[str, Block],
        layers: Layers,
        network: Any,
    ) -> Lineup:
        """Of the layers `names`; `together` are those of the network-level method, whose state is `network`."""
        groups: list[Group] = []
        states: list[Any] = []
        if assigned.network is not None and together:
            groups.append(Together(tuple(together), assigned.network))
            states.append(network)
        for stack, state in zip(layers.stacks, layers.states, strict=True):
            ours = tuple(name for name in stack if name in names)
            if ours:
                groups.append(Stack(ours, assigned.of(ours[0])))
                states.append(part(state, stack, ours))
        return cls(layers, tuple(groups), tuple(states))

    def after(self, states: Sequence[Any], network: Any) -> tuple[Layers, Any]:
        """Layers and the network-level method's state once the groups have these states."""
        found = list(self.layers.states)
        place = {name: i for i, stack in enumerate(self.layers.stacks) for name in stack}
        for group, new in zip(self.groups, states, strict=True):
            if isinstance(group, Stack):
                i = place[group.label]
                found[i] = put(found[i], self.layers.stacks[i], group.names, new)
            else:
                network = new
        return replace(self.layers, states=tuple(found)), network
