"""What a Preconditioner keeps from one step to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kfaccore import tree
from kfaccore.method import Block
from kfaccore.precondition.groups import Group


@dataclass(frozen=True)
class State:
    """Steps taken, one method state a layer, the step's own buffers, that of a network-level method; `blocks` is
    structure."""

    step: int
    layers: dict[str, Any]
    motion: Any
    network: Any = ()
    blocks: tuple[tuple[str, Block], ...] = tree.static(default=())

    def moved(self, groups: Sequence[Group], states: Sequence[Any], motion: Any) -> State:
        """The state of the next step, from those of the groups and the motion of the rule."""
        layers = dict(self.layers)
        network = self.network
        for group, new in zip(groups, states, strict=True):
            if group.alone:
                layers[group.label] = new
            else:
                network = new
        return replace(self, step=self.step + 1, layers=layers, motion=motion, network=network)
