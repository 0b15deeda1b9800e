"""What a preconditioner is asked before a step: what is due in it, and whether it uses records."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from kfaccore import tree
from kfaccore.precondition.due import Due, clocked
from kfaccore.precondition.groups import NetworkMethod
from kfaccore.precondition.lineup import Lineup
from kfaccore.precondition.placement import costs
from kfaccore.precondition.ranks import OnRanks
from kfaccore.precondition.road import Begun
from kfaccore.precondition.schedule import Clocks, Schedules
from kfaccore.precondition.stack import Stack
from kfaccore.precondition.stacks import merged
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

    def left(self, state: State, begun: Sequence[Begun], measured: Collection[str]) -> tuple[State, set[str]]:
        """What a step that failed leaves of the state that it was given to reuse (`donate`): averages with the step's
        statistics where they have moved, none where they had not begun to, at a state of the step before. Those of the
        layers that are named were in between, and begin anew.

        begun      as `do` has filled it
        measured   layers that it had records of, where the statistics of any were due
        """
        pre: Any = self
        stacked, state = self._placed(pre._stacked(state), state)
        torn = {name for group, new in begun if new is None for name in group.names}
        fresh = pre.init(dict(state.blocks), tree.leaves(state.layers)[0]) if torn else state
        states = []
        for group, new in begun:
            if new is None:
                whole = isinstance(group, Stack)
                new = merged([fresh.layers[name] for name in group.names]) if whole else fresh.network
            states.append(new)
        groups = tuple(group for group, _ in begun)
        layers, network = Lineup(stacked, groups, ()).after(states, state.network)
        done = {name for group, _ in begun for name in group.names if name in measured} - torn
        return replace(state, layers=layers, network=network, missed=state.missed.halfway(done, torn)), torn

    def wants_records(self, state: State) -> bool:
        """Whether the next call of `step` will use records."""
        names = [name for name, _ in state.blocks]
        awake = set(names) - self.resting(state) - self.assigned.unmeasured(names, state.layers)
        rows = self.assigned.solved_with_rows(awake, state.layers)
        return bool(self.rule.needs_records or rows or (awake and (self.due(state).update or state.missed.awaited)))

    def resting(self, state: State) -> set[str]:
        """Layers whose method rests in the step to come; see `weighting`."""
        if self.rule.needs_records:
            return set()
        hyper = lambda name: self.schedules.hyper(name, state.step)  # noqa: E731
        return self.assigned.resting((name for name, _ in state.blocks), state.layers, hyper)

    def idle(self, state: State) -> set[str]:
        """Layers that need no records in the step to come."""
        return self.resting(state) | self.assigned.unmeasured([name for name, _ in state.blocks], state.layers)
