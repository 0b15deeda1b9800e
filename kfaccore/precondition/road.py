"""The road that every group of layers takes in one call: measure, combine, update; refresh; solve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import numpy as np

from kfaccore.method import Block, Hyper
from kfaccore.precondition.comm import Communicator
from kfaccore.precondition.due import Due, gated
from kfaccore.precondition.given import Given, in_dtype, joined, like_gradient, working
from kfaccore.precondition.groups import Alone, Grads, Group
from kfaccore.precondition.placement import exchanged, reduced, sent
from kfaccore.record import Record
from kfaccore.solution import Solution
from kfaccore.xp import Code, choose
from kfaccore.xp.arrays import Array, namespace

Batches = Mapping[str, Sequence[Given]]
Refused = dict[str, Array]


@dataclass(frozen=True)
class Road:
    """What is due, the ranks, which of them solve for which layer, and whether buffers may be reused; on several ranks
    the layers' blocks too, as their methods have them."""

    due: Due
    comm: Communicator
    work: Mapping[str, tuple[int, ...]]
    donate: bool
    blocks: Mapping[str, Block] = field(default_factory=dict)

    def run(
        self,
        groups: Sequence[Group],
        states: Sequence[object],
        batches: Batches,
        grads: Grads,
        hypers: Mapping[str, Hyper],
    ) -> list[Solution]:
        """A Solution a group: `direction` and `code` are dicts, `state` is what follows.

        batches   {layer: Records of its micro-batches, or Stats made of them}
        """
        with np.errstate(all="ignore"):  # what is not finite comes back as a code
            moved = [self._updated(g, s, batches, hypers) for g, s in zip(groups, states, strict=True)]
            refreshed = [self._refreshed(g, s, hypers) for g, (s, _) in zip(groups, moved, strict=True)]
            refreshed = self._exchanged(groups, refreshed)
            return [
                self._solved(group, state, batches, grads, hypers, refused)
                for group, state, (_, refused) in zip(groups, refreshed, moved, strict=True)
            ]

    def _updated(self, group: Group, state: Any, batches: Batches, hypers: Mapping[str, Hyper]) -> tuple[Any, Refused]:
        """The state with the group's batches in it, and where (blocks,) each layer's were refused."""
        given = {name: batch for name, batch in group.of(batches).items() if batch}
        if self.due.update is False or not given:
            return state, {}

        def measured() -> tuple[Any, Refused]:
            turns = zip(*given.values(), strict=True)
            stats = [self._measured(group, state, dict(zip(given, turn, strict=True)), hypers) for turn in turns]
            total = reduced(self.comm, reduce(group.method.combine, stats))
            refused = {name: total[name].bad > 0 for name in given}
            return group.method.update(state, total, group.of(hypers), self.donate), refused

        if self.due.update is True:
            return measured()
        codes = {name: group.layers(state)[name].code for name in given}
        kept = {name: namespace(code).zeros_like(code) > 0 for name, code in codes.items()}
        return gated(self.due.update, measured, (state, kept))

    def _measured(self, group: Group, state: Any, batch: dict[str, Any], hypers: Mapping[str, Hyper]) -> dict[str, Any]:
        """Stats of one micro-batch, in the dtype of the states they will move."""
        records: Any = {name: given for name, given in batch.items() if isinstance(given, Record | tuple)}
        found = {name: given for name, given in batch.items() if name not in records}
        if records:
            found |= group.method.measure(state, records, group.of(hypers))
        layers = group.layers(state)
        return {name: in_dtype(stats, working(layers[name])) for name, stats in found.items()}

    def _refreshed(self, group: Group, state: Any, hypers: Mapping[str, Hyper]) -> Any:
        """The state after a refresh by its owner."""
        if self.due.refresh is False or self.work[group.names[0]][0] != self.comm.rank:
            return state
        return gated(self.due.refresh, lambda: group.method.refresh(state, group.of(hypers)), state)

    def _exchanged(self, groups: Sequence[Group], states: list[Any]) -> list[Any]:
        """The states after a refresh with what other ranks made; network-level methods run in one process."""
        if self.due.refresh is False or self.comm.world == 1:
            return states
        methods = {group.label: group.method.method for group in groups if isinstance(group.method, Alone)}
        named = dict(zip((group.label for group in groups), states, strict=True))
        return list(exchanged(self.comm, named, methods, dict(self.work), self.blocks).values())

    def _solved(
        self,
        group: Group,
        state: Any,
        batches: Batches,
        grads: Mapping[str, Any],
        hypers: Mapping[str, Hyper],
        refused: Refused,
    ) -> Solution:
        """Directions in the gradients' dtype, sent by the owner to ranks that do not solve."""
        ours = group.of(grads)
        ranks = self.work[group.names[0]]
        layers = group.layers(state)
        if self.comm.rank in ranks:
            given = group.of(batches) if group.method.needs_records else {}
            whole = {name: joined(records) for name, records in given.items() if records}
            solution = group.method.solve(state, ours, group.of(hypers), whole or None)
        else:
            zeros = {name: namespace(grad).zeros_like(grad) for name, grad in ours.items()}
            solution = Solution(zeros, {name: layers[name].code for name in ours}, state)
        found = solution.direction.items()
        directions = {name: like_gradient(x, ours[name], working(layers[name])) for name, x in found}
        solution = sent(self.comm, Solution(directions, solution.code, solution.state, solution.info), ranks)
        if not refused:
            return solution
        bad = {name: choose(flag, Code.NONFINITE, solution.code[name]) for name, flag in refused.items()}
        return replace(solution, code={**solution.code, **bad})
