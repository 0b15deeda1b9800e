"""A state for a plan that changed: what it has of the layers that stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from kfaccore_torch.plan import UNSEEN, Plan
from kfaccore_torch.settle import Layer


def moved(known: Mapping[str, Layer], plan: Plan) -> tuple[dict[str, Layer], dict[str, str]]:
    """Layers as the model of a plan calls them: one whose parameters have other names now, as where a block was put in
    before it or modules changed places, goes with them. {name: layer} and {name: name that it had}."""
    now = {name: p for name, p, _ in plan.made_of}
    names = {id(p): name for name, p in reversed(now.items())}
    owners = _owned(plan)
    stays: dict[str, Layer] = {}
    goes: dict[str, tuple[str, Layer]] = {}
    for name, layer in known.items():
        paths = {role: names.get(id(p), "") for role, p in layer.parameters.items()}
        if all(now.get(layer.paths[role]) is p for role, p in layer.parameters.items()) or not all(paths.values()):
            stays[name] = layer
        else:
            new = _called(layer, paths, owners)
            goes[new] = name, replace(layer, name=new, paths=paths)
    found = {**stays, **{name: layer for name, (_, layer) in goes.items()}}
    return found, {name: goes[name][0] if name in goes else name for name in found}


def _owned(plan: Plan) -> dict[str, str]:
    """Name of a parameter that makes one layer alone -> the layer's."""
    found: dict[str, list[str]] = {}
    for ref, name in plan.places.items():
        found.setdefault(ref.name, []).append(name)
    return {path: layers[0] for path, layers in found.items() if len(layers) == 1}


def _called(layer: Layer, paths: Mapping[str, str], owners: Mapping[str, str]) -> str:
    """What a layer is called whose parameters have these names."""
    old, new = next((layer.paths[role], path) for role, path in paths.items())
    if new in owners and not layer.name.startswith(old):
        return owners[new]
    if layer.name.startswith(old):  # a parameter of no module, or a part of one
        return new + layer.name.removeprefix(old)
    return new.rpartition(".")[0] or layer.name


def carried(old: Any, new: Any, names: Mapping[str, str]) -> Any:
    """A new state with what `old` has of layers, by the names they had: name -> old name; and its step."""
    before = dict(old.places)
    layers = {name: old.layers[names[name]] if names.get(name) in old.layers else x for name, x in new.layers.items()}
    motion = _motion(old.motion, new.motion, names)
    order = [name for name, _ in new.blocks]
    same = [name for name, _ in old.blocks] == order and all(names.get(name) == name for name in order)
    network = old.network if same else new.network
    places = tuple((name, before[was]) for name, was in names.items() if was in before)  # new layers are nowhere yet
    missed = {n: old.missed[names[n]] if names.get(n) in old.missed else new.missed[n] for n in new.missed}
    missed = new.missed.rebuilt(missed)
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


def _motion(old: Any, new: Any, names: Mapping[str, str]) -> Any:
    """A rule's buffers: numbers are kept, and what it has of layers, by the names they had."""
    if isinstance(new, dict):
        return {name: old[names[name]] if names.get(name) in old else x for name, x in new.items()}
    if not is_dataclass(new) or isinstance(new, type):
        return old
    fresh = {f.name: _motion(getattr(old, f.name), getattr(new, f.name), names) for f in fields(new)}
    return replace(new, **fresh)
