"""A state for a plan that changed: what it has of the layers that stay."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any


def carried(old: Any, new: Any, names: set[str]) -> Any:
    """A new state with what `old` has of the layers `names`, and its step."""
    layers = {name: old.layers[name] if name in names and name in old.layers else x for name, x in new.layers.items()}
    motion = _motion(old.motion, new.motion, names)
    same = [name for name, _ in old.blocks] == [name for name, _ in new.blocks] and names >= {n for n, _ in new.blocks}
    network = old.network if same else new.network
    places = tuple((name, ranks) for name, ranks in old.places if name in names)  # new layers are nowhere yet
    return replace(new, step=old.step, layers=layers, motion=motion, network=network, places=places)


def _motion(old: Any, new: Any, names: set[str]) -> Any:
    """A rule's buffers: numbers are kept, and what it has of the layers `names`."""
    if isinstance(new, dict):
        return {name: old[name] if name in names and name in old else x for name, x in new.items()}
    if not is_dataclass(new) or isinstance(new, type):
        return old
    fresh = {f.name: _motion(getattr(old, f.name), getattr(new, f.name), names) for f in fields(new)}
    return replace(new, **fresh)
