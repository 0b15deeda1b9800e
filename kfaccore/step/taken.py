"""Which layers a step was of, so that judging it leaves the motion of the others alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kfaccore.xp.arrays import Array

Taken = tuple[str, ...] | None  # None is all: structure of a state, which steps of all layers leave as it is


def taken(directions: Mapping[str, Array], buffers: Mapping[str, Array]) -> Taken:
    """The layers of a step, given the buffers of all."""
    return None if len(directions) == len(buffers) else tuple(directions)


def of_step(change: Callable[[Array], Any], buffers: Mapping[str, Array], layers: Taken) -> dict[str, Array]:
    """The buffers once those of the step's layers are changed; layers left out keep theirs."""
    return {name: change(x) if layers is None or name in layers else x for name, x in buffers.items()}
