"""What a change of the model takes out of the layers: pruned, normed or otherwise remade weights are said once."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from torch import nn

from kfaccore_torch.kinds import Rest
from kfaccore_torch.plan import UNSEEN, UNUSED, Plan


@dataclass
class Changed:
    """Parameters of layers as they were when the model's parameters last changed, until a forward has shown what they
    have become.

    said  parameters that were named
    """

    said: set[str] = field(default_factory=set)
    _before: dict[str, nn.Parameter] = field(default_factory=dict)  # of layers, by the names they had
    _others: dict[int, nn.Parameter] = field(default_factory=dict)  # of no layer, by id

    def follow(self, old: Plan, new: Plan, told: Collection[str]) -> None:
        """One plan takes the place of another; a warning for what stands where a layer's parameters were and is not
        covered, those that were `told` apart."""
        if new.made_of is not old.made_of:
            covered = _covered(old)
            ours = {id(p) for p in covered.values()}
            self._before |= covered
            self._others |= {id(p): p for _, p, _ in old.made_of if id(p) not in ours}
        if not self._before or not new.seen:
            return
        found = {name: new.uncovered[name] for name in self._lost(new) if name not in self.said and name not in told}
        self._before = {}
        self._others = {}
        self.said |= found.keys()
        if found:
            reasons = "; ".join(f"{name!r}: {why}" for name, why in found.items())
            warnings.warn(
                f"the model has changed, and parameters in the place of ones that were preconditioned are not: "
                f"{reasons}. They are as others that are not covered; see report()",
                stacklevel=2,
            )

    def _lost(self, new: Plan) -> Iterator[str]:
        """Uncovered parameters that were a layer's, or are new and stand where one was."""
        now = _covered(new)
        there = {id(p) for p in now.values()}
        were = {id(p) for p in self._before.values()}
        gone = [path for path, p in self._before.items() if id(p) not in there and path not in now]
        for name, p, _ in new.made_of:
            why = new.uncovered.get(name, UNUSED)
            if why in (UNSEEN, UNUSED) or why.startswith("skipped"):
                continue
            if id(p) in were or (id(p) not in self._others and any(_beside(name, path) for path in gone)):
                yield name


def _covered(plan: Plan) -> dict[str, nn.Parameter]:
    """Parameters of layers with a record, by name."""
    layers = [layer for layer in plan.layers.values() if not isinstance(layer.kind, Rest)]
    return {path: layer.parameters[role] for layer in layers for role, path in layer.paths.items()}


def _beside(name: str, path: str) -> bool:
    """Whether a parameter is in the module that has, or had, another; of the model itself, made of that one."""
    module, _, leaf = path.rpartition(".")
    return name.startswith(f"{module}." if module else (leaf, f"parametrizations.{leaf}"))
