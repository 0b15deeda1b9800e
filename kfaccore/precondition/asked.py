"""What a preconditioner is asked before a step: what is due in it, and whether it uses records."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from kfaccore.precondition.due import Due, clocked
from kfaccore.precondition.groups import NetworkMethod
from kfaccore.precondition.placement import costs
from kfaccore.precondition.ranks import OnRanks
from kfaccore.precondition.schedule import Clocks, Schedules
from kfaccore.precondition.state import State


class Asked(OnRanks):
    """Base of a preconditioner."""

    clocks: Clocks
    schedules: Schedules
    network: NetworkMethod | None

    def due(self, state: State, names: Collection[str] = ()) -> Due:
        """What the clocks ask of the next step; flags are traced where the state's step is.

        names   layers that take part: of them also those that a date has passed by, which are due now
        """
        found = clocked(state.step, self.clocks, lambda: costs(self.assigned.narrowed(dict(state.blocks))))
        missed = state.missed.among(names) if names else None
        return found if missed is None else replace(found, missed=missed)

    def wants_records(self, state: State) -> bool:
        """Whether the next call of `step` will use records."""
        names = [name for name, _ in state.blocks]
        awake = set(names) - self.resting(state) - self.assigned.unmeasured(names, state.layers)
        whole = self.network is not None and self.network.needs_records and awake - state.layers.keys()
        return bool(self.rule.needs_records or whole or (awake and (self.due(state).update or state.missed.awaited)))

    def resting(self, state: State) -> set[str]:
        """Layers whose method rests in the step to come; see `weighting`."""
        if self.rule.needs_records:
            return set()
        hyper = lambda name: self.schedules.hyper(name, state.step)  # noqa: E731
        return self.assigned.resting((name for name, _ in state.blocks), state.layers, hyper)

    def idle(self, state: State) -> set[str]:
        """Layers that need no records in the step to come."""
        return self.resting(state) | self.assigned.unmeasured([name for name, _ in state.blocks], state.layers)
