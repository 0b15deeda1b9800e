"""A state for a plan that changed: what it has of the layers that stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from kfaccore_torch.plan import UNSEEN, Plan
from kfaccore_torch.settle import Layer


def carried(old: Any, new: Any, names: set[str]) -> Any:
    """A new state with what `old` has of the layers `names`, and its step."""
    layers = {name: old.layers[name] if name in names and name in old.layers else x for name, x in new.layers.items()}
    motion = _motion(old.motion, new.motion, names)
    same = [name for name, _ in old.blocks] == [name for name, _ in new.blocks] and names >= {n for n, _ in new.blocks}
    network = old.network if same else new.network
    places = tuple((name, ranks) for name, ranks in old.places if name in names)  # new layers are nowhere yet
    missed = new.missed.rebuilt({n: (old if n in names and n in old.missed else new).missed[n] for n in new.missed})
    return replace(new, step=old.step, layers=layers, motion=motion, network=network, places=places, missed=missed)


def left_out(known: Mapping[str, Layer], plan: Plan) -> dict[str, Layer]:
    """The layers of `known` that a plan leaves out for now: all their parameters are still there, and frozen, or not
    shown yet by a forward."""
    named = {name: p for name, p, _ in plan.made_of}
    covered = {path for layer in plan.layers.values() for path in layer.paths.values()}
    elsewhere = covered | {path for path, why in plan.uncovered.items() if why != UNSEEN}
    found = {}
    for name, layer in known.items():
        now = {role: named[path] for role, path in layer.paths.items() if path in named}
        there = all(role in now and now[role].shape == p.shape for role, p in layer.parameters.items())
        if there and name not in plan.layers and elsewhere.isdisjoint(layer.paths.values()):
            found[name] = replace(layer, parameters=now)
    return found


def _motion(old: Any, new: Any, names: set[str]) -> Any:
    """A rule's buffers: numbers are kept, and what it has of the layers `names`."""
    if isinstance(new, dict):
        return {name: old[name] if name in names and name in old else x for name, x in new.items()}
    if not is_dataclass(new) or isinstance(new, type):
        return old
    fresh = {f.name: _motion(getattr(old, f.name), getattr(new, f.name), names) for f in fields(new)}
    return replace(new, **fresh)
