"""What a Preconditioner keeps from one step to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kfaccore import tree
from kfaccore.method import Block
from kfaccore.precondition.missed import Missed


@dataclass(frozen=True)
class State:
    """Steps taken, one method state a layer, the step's own buffers, that of a network-level method; `blocks` is
    structure, as is which ranks hold each layer's, where there are several; `missed` dates layers have to make up."""

    step: int
    layers: Mapping[str, Any]
    motion: Any
    network: Any = ()
    blocks: tuple[tuple[str, Block], ...] = tree.static(default=())
    places: tuple[tuple[str, tuple[int, ...]], ...] = tree.static(default=())
    missed: Missed = tree.added(era=3, default_factory=lambda: Missed(None))  # noqa: RUF009 a field
