"""The one road of a step, which every group of layers takes in one call: update; refresh; solve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from kfaccore import tree
from kfaccore.method import Block, Hyper
from kfaccore.precondition.comm import Communicator, Receivers, receives
from kfaccore.precondition.due import Due, Each, Flag, Piece, gated
from kfaccore.precondition.groups import Batches, Grads, Group, of
from kfaccore.precondition.moving import moved as has_moved
from kfaccore.precondition.moving import still
from kfaccore.precondition.parts import Parts
from kfaccore.precondition.placement import exchanged, sent
from kfaccore.precondition.renewal import renewed
from kfaccore.precondition.stack import Stack
from kfaccore.precondition.stacks import part, put
from kfaccore.solution import Solution, check
from kfaccore.xp import precision
from kfaccore.xp.arrays import Array, is_tracer, namespace, select

Hypers = Mapping[str, Hyper]
Begun = tuple[Group, Any]  # a group, and its state with the statistics of the step; None while they move
Tree = TypeVar("Tree")


@dataclass(frozen=True)
class Road:
    """What is due, the ranks, which of them solve for which layer, and whether buffers may be reused; on several ranks
    the layers' blocks too, as their methods have them, and which ranks hold their states."""

    due: Due
    comm: Communicator
    work: Mapping[str, tuple[int, ...]]
    donate: bool
    blocks: Mapping[str, Block] = field(default_factory=dict)
    holders: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def run(
        self,
        groups: Sequence[Group],
        states: Sequence[object],
        batches: Batches,
        grads: Grads,
        hypers: Hypers,
        begun: list[Begun] | None = None,
    ) -> tuple[list[Parts], list[object]]:
        """What came out of each group, and the states that follow.

        batches   {layer: Records of its micro-batches, or Stats made of them}
        begun     is told of each group when it is begun, and again once its statistics have moved
        """
        begun = [] if begun is None else begun
        with np.errstate(all="ignore"):  # what is not finite comes back as a code
            pairs = zip(groups, states, strict=True)
            moved = [self._begun(begun, group, state, batches, hypers) for group, state in pairs]
            refreshed = self._refreshed(groups, [state for state, _ in moved], hypers)
            for piece in self.due.pieces:
                refreshed = self._in_part(piece, groups, refreshed, hypers)
            solutions = self._solved(groups, refreshed, batches, grads, hypers)
            found = []
            for i, (group, (_, refused)) in enumerate(zip(groups, moved, strict=True)):
                ranks = self.work[group.names[0]]
                if self.comm.rank in ranks:
                    solutions[i] = group.marked(solutions[i], refused)
                found.append(group.parts(sent(self.comm, solutions[i], ranks), grads))
            return found, [solved.state for solved in solutions]

    def _solved(
        self, groups: Sequence[Group], states: Sequence[object], batches: Batches, grads: Grads, hypers: Hypers
    ) -> list[Solution]:
        """Of each group, zeros where other ranks solve for it; those of a GPU checked together."""
        solutions = []
        for group, state in zip(groups, states, strict=True):
            ours = self.comm.rank in self.work[group.names[0]]
            solutions.append(group.solve(state, grads, hypers, batches) if ours else group.unsolved(state, grads))
        check(solutions)
        return solutions

    def _begun(self, begun: list[Begun], group: Group, state: Any, batches: Batches, hypers: Hypers) -> tuple[Any, Any]:
        """As `_updated`, which is told."""
        still()
        begun.append((group, None))
        try:
            found = self._updated(group, state, batches, hypers)
            begun[-1] = group, found[0]
        finally:
            if begun[-1][1] is None and not has_moved():
                begun[-1] = group, state
        return found

    def _updated(self, group: Group, state: Any, batches: Batches, hypers: Hypers) -> tuple[Any, Any]:
        """The state with the group's batches in it, and where each layer's were refused; None for nowhere."""
        given = {name: batch for name, batch in of(group.names, batches).items() if batch}
        each = self.due.each
        if each is not None:
            given = {name: batch for name, batch in given.items() if each.may_measure(name)}
        if self.due.update is False or not given:
            return state, None
        no = (state, None if self.due.update is True else group.accepted(state))
        comm = self._to(group)

        def moved() -> tuple[Any, Any]:
            new = group.updated(state, given, hypers, comm, self.donate)
            return new if each is None or self.due.update is True else chosen(group, each, each.update, new, no)

        return gated(self.due.update, moved, no)

    def _to(self, group: Group) -> Communicator:
        """What sums the group's statistics where its states are."""
        ranks = self.holders.get(group.names[0], ())
        return Receivers(self.comm, ranks) if 0 < len(ranks) < self.comm.world else self.comm

    def _in_part(self, piece: Piece, groups: Sequence[Group], states: list[Any], hypers: Hypers) -> list[Any]:
        """The states after a refresh of the layers of a piece, in one call for those of a stack; a network-level method
        goes with the first of its layers."""
        found = list(states)
        ours: list[tuple[int, Group]] = []
        for i, group in enumerate(groups):
            names = tuple(name for name in group.names if name in piece.names)
            if not receives(self._to(group)):
                continue  # its state lies elsewhere
            if isinstance(group, Stack):
                ours += [(i, Stack(names, group.method))] if names else []
            elif group.names[0] in names:
                ours.append((i, group))

        def after_turn() -> list[Any]:
            cuts = [part(states[i], groups[i].names, group.names) for i, group in ours]
            new = self._all_refreshed([group for _, group in ours], cuts, True, hypers)
            pairs = zip(ours, new, strict=True)
            return [put(states[i], groups[i].names, group.names, fresh) for (i, group), fresh in pairs]

        after = gated(piece.refresh, after_turn, [states[i] for i, _ in ours])
        for (i, _), state in zip(ours, after, strict=True):
            found[i] = state
        return found

    def _refreshed(self, groups: Sequence[Group], states: list[Any], hypers: Hypers) -> list[Any]:
        """The states after what all layers are due for; of a traced program that cannot know which layers missed a
        date, all are refreshed where one did, and the others keep what they had."""
        each = self.due.each
        if each is None or isinstance(self.due.refresh, bool):
            return self._all_refreshed(groups, states, self.due.refresh, hypers)

        def after_those() -> list[Any]:
            new = self._all_refreshed(groups, states, True, hypers)
            return [chosen(group, each, each.refresh, *pair) for group, *pair in zip(groups, new, states, strict=True)]

        return gated(self.due.refresh, after_those, states)

    def _all_refreshed(self, groups: Sequence[Group], states: list[Any], flag: Flag, hypers: Hypers) -> list[Any]:
        """The states after a refresh where the flag holds, on every rank that needs them."""
        if flag is False:
            return states
        ours = [i for i, group in enumerate(groups) if self.work[group.names[0]][0] == self.comm.rank]
        mine = [states[i] for i in ours]
        with precision.exact():
            after = gated(flag, lambda: renewed([groups[i] for i in ours], mine, hypers), mine)
        found = dict(enumerate(states)) | dict(zip(ours, after, strict=True))
        return self._exchanged(groups, list(found.values()))

    def _exchanged(self, groups: Sequence[Group], states: list[Any]) -> list[Any]:
        """The states after a refresh with what other ranks made; network-level methods run in one process."""
        if self.comm.world == 1:
            return states
        methods = {group.label: group.method for group in groups if isinstance(group, Stack)}
        named = dict(zip((group.label for group in groups), states, strict=True))
        return list(exchanged(self.comm, named, methods, dict(self.work), self.blocks).values())


def chosen(group: Group, each: Each, flags: Array, new: Tree, old: Tree) -> Tree:
    """`new` for the layers of a stack whose traced flag holds, `old` for the others; a network-level method is one."""
    if not is_tracer(flags) or not isinstance(group, Stack):
        return new
    mine = each.of(flags, group.names)

    def of_blocks(x: Array, y: Array) -> Array:
        return x if x is y else select(namespace(mine).repeat(mine, x.shape[0] // len(group.names)), x, y)

    return tree.map(of_blocks, new, old)
