"""Composes methods, clocks, schedules and a step over the layers of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from kfaccore import tree
from kfaccore.method import Block, Hyper, Method
from kfaccore.options import by_layer
from kfaccore.precondition.asked import Asked
from kfaccore.precondition.assigned import Assigned
from kfaccore.precondition.checks import Fisher, agreeing, beside, fitting, kinds
from kfaccore.precondition.comm import Communicator, Serial
from kfaccore.precondition.due import Due
from kfaccore.precondition.footprint import Footprint, footprints
from kfaccore.precondition.given import Given, alike, joined, like_gradient, widened
from kfaccore.precondition.groups import Grads, NetworkMethod
from kfaccore.precondition.info import Info
from kfaccore.precondition.knowing import knowing
from kfaccore.precondition.lineup import Lineup
from kfaccore.precondition.missed import Missed
from kfaccore.precondition.placement import check, common
from kfaccore.precondition.road import Begun, Road
from kfaccore.precondition.schedule import Clocks, Schedules
from kfaccore.precondition.stacks import Layers, Stacks, restacked, stacks_of, started
from kfaccore.precondition.state import State
from kfaccore.record import Record
from kfaccore.step import PLAIN, Rule, spread
from kfaccore.step.rule import judged
from kfaccore.xp.arrays import Array, device_of, namespace, widen
from kfaccore.xp.owned import apart


@dataclass(frozen=True, init=False)
class Preconditioner(Asked):
    """Turns records and gradients of all layers into updates; holds numbers only, state is returned.

    methods    one method for all layers, or a mapping from layer to method
    clocks, schedules, comm   see their classes
    network    TwoLevel(KFAC()), Tridiagonal(): one method for all the layers it covers; `methods` has the others
    step       from directions to updates, kept as `rule`: SelfTuning(), LineSearch(), GridSearch(), Quadratic(),
               Fixed(lr, momentum, rescale); the default hands directions on
    donate     let updates on NumPy and torch reuse the state's own buffers; the state passed in must not be used again
    widest     a wider side of a layer has a diagonal factor: no matrix of its square is made. A method whose memory is
               linear in the width keeps the side as it is: give that layer BrandKFAC() for a low-rank one
    stacked    whether layers of equal method and sizes are one call: None decides by cost, True takes all, False none
    """

    methods: Method | Mapping[str, Method] | None
    clocks: Clocks
    schedules: Schedules
    network: NetworkMethod | None
    rule: Rule
    comm: Communicator
    donate: bool
    widest: int
    stacked: bool | None
    assigned: Assigned = field(init=False, compare=False, repr=False)  # which method has which layer

    def __init__(
        self,
        methods: Method | Mapping[str, Method] | None = None,
        clocks: Clocks = Clocks(),  # noqa: B008 frozen
        schedules: Schedules = Schedules(),  # noqa: B008 frozen
        network: NetworkMethod | None = None,
        step: Rule = PLAIN,
        comm: Communicator = Serial(),  # noqa: B008 frozen
        donate: bool = False,
        widest: int = 8192,
        stacked: bool | None = None,
        rule: Rule | None = None,  # as `dataclasses.replace` hands on what `step` became
    ) -> None:
        step = spread(rule if rule is not None and step is PLAIN else step, comm)
        agreeing(network, step, comm)
        kinds(clocks=(clocks, Clocks), schedules=(schedules, Schedules))
        methods = dict(methods) if isinstance(methods, Mapping) else methods  # asked once: what it makes is held
        numbers = {"methods": methods, "clocks": clocks, "schedules": schedules, "network": network, "rule": step}
        numbers |= {"comm": comm, "donate": donate, "widest": widest, "stacked": stacked}
        numbers["assigned"] = Assigned(methods, network, widest)
        for name, value in numbers.items():
            object.__setattr__(self, name, value)

    def init(self, blocks: Mapping[str, Block], like: Array) -> State:
        """State of all layers, in the namespace, dtype and device of `like`.

        A float64 `like` keeps averages and inverses in float64 for float32 records, one of half precision in float32;
        updates keep the gradients' dtype.
        """
        by_layer(" to Block(d_out, d_in)", blocks=blocks)
        kinds(**{f"blocks[{name!r}]": (block, Block) for name, block in blocks.items()})
        like = widen(like, "like")
        together = self.assigned.together(blocks)
        methods = {name: self.assigned.of(name) for name in blocks if name not in together}
        check(methods, self.comm)
        given = self.assigned.narrowed(blocks)
        layers = started(methods, given, self._stacks(methods, given, like), like)
        shards = self._shards(methods, blocks)
        layers = layers if shards is None else shards.kept(layers)
        xp = namespace(like)
        shapes = {name: (block.blocks, block.d_out, block.d_in) for name, block in blocks.items()}
        zeros = {n: xp.zeros(shape, dtype=like.dtype, device=device_of(like)) for n, shape in shapes.items()}
        network = self.network.init(together, like) if self.network is not None and together else ()
        places = () if shards is None else shards.places
        return State(0, layers, self.rule.init(zeros), network, tuple(blocks.items()), places, Missed.start(blocks))

    def memory(self, blocks: Mapping[str, Block], like: Array | None = None) -> dict[str, int]:
        """Bytes of each layer's state, before a run; nothing of that size is allocated.

        `like` gives the dtype (default float32). Records, gradients and momentum are not counted; a network-level
        method is one entry, "network".
        """
        return {name: part.state for name, part in self.footprint(blocks, like).items()}

    def footprint(self, blocks: Mapping[str, Block], like: Array | None = None) -> dict[str, Footprint]:
        """As `memory`, in parts: bytes of averages and of inverses, and the peak of an update and a refresh."""
        return footprints(self.assigned, blocks, like, self.donate)

    def judge(
        self, state: State, before: float, place: Callable[[float], object], loss: Callable[[], float]
    ) -> tuple[float, State]:
        """Once a step's updates are in force: the share of them that stays (0: taken back), and the state that follows.

        before         loss of the step's batch without the updates, penalty included
        place(share)   sets parameters to the old ones minus share times the updates; called only to change the share
        loss()         loss of the same batch at the parameters in force; no gradient

        Needed after each step of a rule that `judges`; for the others it returns 1 and calls nothing.
        """
        share, motion = judged(self.rule, state.motion, before, place, loss)
        return share, replace(state, motion=motion)

    def step(
        self,
        state: State,
        records: Mapping[str, Given | Sequence[Given]] | None,
        grads: Grads,
        fisher: Fisher | None = None,
        *,
        loss: float | Array | None = None,
        own: Mapping[str, Record | Sequence[Record]] | None = None,
        lengths: Mapping[str, float | Array] | None = None,
        nonnegative: bool | None = None,
    ) -> tuple[dict[str, Array], State, Info]:
        """Updates to subtract, shaped like `grads`, the new state, and what happened.

        records   {layer: Record, or a sequence of Records of micro-batches}; ignored when not wanted. For a method of
                  several loss terms a tuple is one batch; Stats of the method may stand for Records
        grads     {layer: array or Factored}; a layer left out is frozen: not measured, refreshed or solved
        fisher    what filled the records' g: kfaccore's type2, monte_carlo, empirical or forward_only. Without it the
                  caller is believed: a rule that models the loss takes samples of the model, a method of
                  `own_gradients` the gradients of the loss itself
        loss      of this batch before the step, penalty included: for rules that bound what they promise
        own       {layer: Record, or micro-batches}: the rows of `records` with the loss's own gradients in g, one draw,
                  where `rule.wants_own`; n may be another, g / n counts. A layer that is not in it, as its rows mix
                  examples, is judged as it is
        lengths   {layer: norm}, for rescale=Graft()
        nonnegative   whether the loss cannot be below 0. False: only its differences count. None: believed until a
                  value below 0 shows otherwise, or one that its gradient would take far below

        Raises before anything is computed, so that `state` stays usable: ValueError for unknown layers, shapes that
        do not fit, missing records, or draws that a rule or method cannot use.

        Updates are the caller's, to scale or to keep: none lies in the memory of the state or of `grads`.
        """
        by_layer(", a list of micro-batches inside of it", records=records or {}, grads=grads)
        due = self.due(state, grads)
        updates, state, info = self.do(
            due, state, records, grads, fisher, loss=loss, own=own, lengths=lengths, nonnegative=nonnegative
        )
        return apart(updates, tree.leaves(state.motion)), state, info

    def do(
        self,
        due: Due,
        state: State,
        records: Mapping[str, Given | Sequence[Given]] | None,
        grads: Grads,
        fisher: Fisher | None = None,
        damping: float | Array | None = None,
        *,
        loss: float | Array | None = None,
        own: Mapping[str, Record | Sequence[Record]] | None = None,
        lengths: Mapping[str, float | Array] | None = None,
        nonnegative: bool | None = None,
        begun: list[Begun] | None = None,
    ) -> tuple[dict[str, Array], State, Info]:
        """`step` with what is `due` decided by the caller, for steps that are traced once and run many times; updates
        may be what the rule keeps in the state: read them, and write to copies.

        due       flags: a bool is decided now, a traced array on the device. Records must be given where `due.update`
                  may hold, and every layer's state is then computed both ways
        damping   in place of the scheduled one; begun: an empty list, for `left` where the step fails
        """
        stacked = self._stacked(state)
        batches = self._agreed(due, state, stacked, records or {}, grads)
        beside(self, state, grads, own, lengths)
        fitting(self, fisher if batches else None)
        wide = widened(grads)
        stacked, state = self._placed(stacked, state)
        seen = {name: joined(batches[name]) for name in wide} if self.rule.needs_records else {}
        ours = common(self.comm, alike(own or {}, seen), tuple(state.layers), seen) if self.rule.wants_own else {}
        motion = self.rule.begin(state.motion, seen)
        averaged, motion = self.rule.gradients(motion, self.assigned.free(wide, state.layers))
        hypers = self.schedules.hypers(wide, state.step, partial(self._told, motion, damping))
        due = due.whole(self.rule.restart(motion))
        blocks = dict(state.blocks)
        given = self.assigned.narrowed(blocks) if self.comm.world > 1 else blocks  # one rank has nothing to place
        lineup = Lineup.of(self.assigned, wide, self.assigned.together(blocks) if wide else {}, stacked, state.network)
        road = Road(due.met(batches), self.comm, self._work(given), self.donate, given, dict(state.places))
        groups, states = road.run(lineup.groups, lineup.states, batches, {**wide, **averaged}, hypers, begun)
        layers, network = lineup.after(states, state.network)
        found = {name: x for group in groups for name, x in group.directions.items()}
        known = knowing(self.assigned, ours, layers, hypers, loss, lengths, nonnegative)
        with np.errstate(all="ignore"):
            penalty = self.schedules.joint(wide, state.step)
            moves, motion, told = self.rule(motion, {n: found[n] for n in wide}, dict(wide), seen, penalty, known)
        updates = {name: like_gradient(x, grads[name]) for name, x in moves.items()}
        info = Info.of(road.due.update, road.due.refreshes, groups, told, dict(known.damping), updates)
        refused = partial(info.refused, state.missed.names)
        missed = due.leaves(state.missed, grads, batches.keys() & grads.keys(), lambda: self.idle(state), refused)
        after = replace(state, step=state.step + 1, layers=layers, motion=motion, network=network, missed=missed)
        return updates, after, info

    def _told(self, motion: Any, damping: float | Array | None, hyper: Hyper) -> Hyper:
        """The numbers of a layer as the rule and the caller have them."""
        return self.rule.hyper(motion, hyper if damping is None else replace(hyper, damping=damping))

    def _stacked(self, state: State) -> Layers:
        """The states by stack, also where someone put others in the place of some layers."""
        if isinstance(state.layers, Layers):
            return state.layers
        given = self.assigned.narrowed(dict(state.blocks))
        methods = {name: self.assigned.of(name) for name in state.layers}
        leaves = tree.leaves(state.layers)
        return restacked(state.layers, self._stacks(methods, given, leaves[0]) if leaves else ())

    def _stacks(self, methods: Mapping[str, Method], given: Mapping[str, Block], like: Array) -> Stacks:
        return stacks_of(methods, given, self._work(given), like, self.stacked)
