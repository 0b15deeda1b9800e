"""Composes methods, clocks, schedules and a step over the layers of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import array_api_compat as aac
import numpy as np

from kfaccore import tree
from kfaccore.comm import Communicator, Serial
from kfaccore.given import in_dtype, is_stats, like_gradient, named, records_of
from kfaccore.info import Info
from kfaccore.method import Block, Hyper, Solution, gradient
from kfaccore.placement import agree, assign, check, costs, exchanged, sent
from kfaccore.record import Factored, Record
from kfaccore.schedule import Clocks, Schedules
from kfaccore.sharing import concat
from kfaccore.step import Fixed, Rule
from kfaccore.xp import Code, choose
from kfaccore.xp.arrays import Array, namespace


@dataclass(frozen=True)
class State:
    """Steps taken, one method state a layer, the step's own buffers; `blocks` is structure."""

    step: int
    layers: dict[str, Any]
    motion: Any
    blocks: tuple[tuple[str, Block], ...] = tree.static(default=())


@dataclass(frozen=True, init=False)
class Preconditioner:
    """Turns records and gradients of all layers into updates; holds numbers only, state is returned.

    methods    one method for all layers, or a mapping from layer to method
    clocks, schedules, comm   see their classes
    network    for network-level methods, of which there is none yet
    step       from directions to updates, kept as `rule`: SelfTuning(), LineSearch(), GridSearch(), Quadratic(),
               Fixed(lr, momentum, rescale); the default hands directions on
    donate     let NumPy updates reuse the buffers of the state passed in, which must then not be used again
    """

    methods: Any
    clocks: Clocks
    schedules: Schedules
    rule: Any
    comm: Communicator
    donate: bool

    def __init__(
        self,
        methods: Any,
        clocks: Clocks = Clocks(),  # noqa: B008 frozen
        schedules: Schedules = Schedules(),  # noqa: B008 frozen
        network: None = None,
        step: Rule = Fixed(),  # noqa: B008 frozen
        comm: Communicator = Serial(),  # noqa: B008 frozen
        donate: bool = False,
    ) -> None:
        if network is not None:
            raise ValueError(f"network is {network!r}; there is no network-level method yet: leave it out")
        numbers = {"methods": methods, "clocks": clocks, "schedules": schedules, "rule": step}
        for name, value in {**numbers, "comm": comm, "donate": donate}.items():
            object.__setattr__(self, name, value)

    def init(self, blocks: Mapping[str, Block], like: Array) -> State:
        """State of all layers, in the namespace, dtype and device of `like`.

        A float64 `like` keeps averages and inverses in float64 for float32 records; updates keep the gradients' dtype.
        """
        check({name: self._method(name) for name in blocks}, self.comm)
        layers, motion = {}, {}
        xp, device = namespace(like), aac.device(like)
        for name, block in blocks.items():
            with named(name):
                layers[name] = self._method(name).init(block, like)
            motion[name] = xp.zeros((block.blocks, block.d_out, block.d_in), dtype=like.dtype, device=device)
        return State(0, layers, self.rule.init(motion), tuple(blocks.items()))

    def memory(self, blocks: Mapping[str, Block], like: np.ndarray | None = None) -> dict[str, int]:
        """Bytes of each layer's state, before a run: states are made on NumPy, one at a time, and dropped.

        `like` gives the dtype (default float32). Records, gradients and momentum are not counted.
        """
        like = np.zeros(1, np.float32) if like is None else like
        return {
            name: sum(np.asarray(leaf).nbytes for leaf in tree.leaves(self._method(name).init(block, like)))
            for name, block in blocks.items()
        }

    def wants_records(self, state: State) -> bool:
        """Whether the next call of `step` will use records."""
        return self.rule.needs_records or state.step % self.clocks.update == 0

    def judge(
        self, state: State, before: float, place: Callable[[float], object], loss: Callable[[], float]
    ) -> tuple[float, State]:
        """Once a step's updates are in force: the share of them that stays (0: taken back), and the state that follows.

        before         loss of the step's batch without the updates, penalty included
        place(share)   sets parameters to the old ones minus share times the updates; called only to change the share
        loss()         loss of the same batch at the parameters in force; no gradient

        Needed after each step of a rule that `judges`; for the others it returns 1 and calls nothing.
        """
        share, wanted, motion = 0.0, 1.0, state.motion
        while self.rule.judges and wanted not in (0, share):
            share = wanted
            wanted, motion = self.rule.judge(motion, share, before, loss())
            if wanted != share:
                place(wanted)
        share = wanted
        return share, replace(state, motion=motion)

    def step(
        self,
        state: State,
        records: Mapping[str, Record | Sequence[Record]] | None,
        grads: Mapping[str, Array | Factored],
    ) -> tuple[dict[str, Array], State, Info]:
        """Updates to subtract, shaped like `grads`, the new state, and what happened.

        records   {layer: Record, or a sequence of Records of micro-batches}; ignored when not wanted. For a method of
                  several loss terms a tuple is one batch; Stats of the method may stand for Records
        grads     {layer: array or Factored}; a layer left out is frozen: not measured, refreshed or solved

        Raises before anything is computed, so that `state` stays usable: ValueError for unknown layers, shapes that
        do not fit, or missing records.
        """
        updated, refreshed = state.step % self.clocks.update == 0, state.step % self.clocks.refresh == 0
        batches = self._check(state, records or {}, grads, self.wants_records(state))
        if self.comm.world > 1:
            agree(self.comm, set(grads), tuple(state.layers), tree.leaves(state.motion)[0])
        hypers = {name: self.schedules.hyper(name, state.step) for name in grads}
        layers, motion = dict(state.layers), state.motion
        seen = {name: reduce(concat, batches[name]) for name in grads} if self.rule.needs_records else {}
        motion = self.rule.begin(motion, seen)
        hypers = {name: self._penalised(self.rule.hyper(motion, hyper)) for name, hyper in hypers.items()}
        refreshed = refreshed or self.rule.restart(motion)
        refused = self._update(layers, batches if updated else {}, hypers)
        work = assign(costs(dict(state.blocks)), self.comm.world, self.comm.fraction)
        if refreshed:
            self._refresh(layers, hypers, work)
        newest = {name: found[-1] for name, found in batches.items() if found}
        solutions = self._solve(layers, grads, hypers, newest, work)
        directions, codes, infos = {}, {}, {}
        for name, found in solutions.items():
            layers[name], directions[name], infos[name] = found.state, found.direction, found.info
            codes[name] = choose(refused[name], Code.NONFINITE, found.code) if name in refused else found.code
        with np.errstate(all="ignore"):
            directions, motion, told = self.rule(motion, directions, dict(grads), seen, self.schedules.l2)
        info = Info(updated, refreshed, codes, infos, told)
        return directions, replace(state, step=state.step + 1, layers=layers, motion=motion), info

    def _penalised(self, hyper: Hyper) -> Hyper:
        """The curvature of the l2 penalty is l2 I: it joins the damping."""
        return replace(hyper, damping=hyper.damping + self.schedules.l2) if self.schedules.l2 else hyper

    def _update(self, layers: dict, batches: Mapping[str, Sequence], hypers: dict[str, Hyper]) -> dict[str, Array]:
        """Statistics of all layers into their states; where (blocks,) they were refused."""
        refused = {}
        for name in (name for name in hypers if batches.get(name)):
            with named(name), np.errstate(all="ignore"):  # what is not finite comes back as a code
                method, state = self._method(name), layers[name]
                found = (r if is_stats(r) else method.measure(state, r, hypers[name]) for r in batches[name])
                measured = (in_dtype(stats, getattr(state, "weight", None)) for stats in found)
                stats = self.comm.all_reduce(reduce(method.combine, measured))
                layers[name] = method.update(state, stats, hypers[name], self.donate)
                refused[name] = stats.bad > 0
        return refused

    def _refresh(self, layers: dict, hypers: dict[str, Hyper], work: dict[str, tuple[int, ...]]) -> None:
        """Refresh the layers this rank owns, and get the others from their owners."""
        for name in (name for name in hypers if work[name][0] == self.comm.rank):
            with named(name), np.errstate(all="ignore"):
                layers[name] = self._method(name).refresh(layers[name], hypers[name])
        states = {name: layers[name] for name in hypers}
        layers.update(exchanged(self.comm, states, {name: self._method(name) for name in hypers}, work))

    def _solve(
        self, layers: dict, grads: Mapping, hypers: dict[str, Hyper], newest: Mapping, work: dict[str, tuple[int, ...]]
    ) -> dict[str, Solution]:
        """Directions of all layers, those solved by other ranks sent from the owner."""
        found = {}
        for name, grad in grads.items():
            with named(name), np.errstate(all="ignore"):
                method, state = self._method(name), layers[name]
                if self.comm.rank in work[name]:
                    record = newest.get(name) if getattr(method, "rows_at_solve", False) else None
                    solution = method.solve(state, grad, hypers[name], record)
                else:
                    solution = Solution(namespace(grad).zeros_like(grad), state.code, state)
                direction = like_gradient(solution.direction, grad, getattr(state, "weight", None))
                found[name] = sent(self.comm, replace(solution, direction=direction), work[name])
        return found

    def _check(self, state: State, records: Mapping, grads: Mapping, wanted: bool) -> dict[str, Sequence[Record]]:
        """Records as sequences, after every test that can fail without looking at the data."""
        blocks = dict(state.blocks)
        for what, given in (("grads", grads), ("records", records)):
            unknown = sorted(set(given) - set(blocks))
            if unknown:
                raise ValueError(f"{what} has layers {unknown} that init never saw; it knows {sorted(blocks)}")
        for name, grad in grads.items():
            with named(name):
                gradient(grad, (blocks[name].blocks, blocks[name].d_out, blocks[name].d_in))
        if not wanted:
            return {}
        if grads and not records:
            raise ValueError(
                f"step {state.step} updates statistics (every {self.clocks.update} steps) but got no records; "
                f"ask wants_records(state) before each step"
            )
        missing = sorted(set(grads) - set(records))
        if missing and self.rule.needs_records:
            raise ValueError(f"layers {missing} have gradients but no records, which {self.rule} needs at every step")
        batches = {}
        for name, given in records.items():
            terms = isinstance(given, tuple) and hasattr(self._method(name), "terms")
            batches[name] = [given] if terms or isinstance(given, Record) or is_stats(given) else list(given)
            for record in records_of(batches[name]):
                have, need = Block.of(record), blocks[name]
                if (have.blocks, have.d_out, have.d_in) != (need.blocks, need.d_out, need.d_in):
                    raise ValueError(f"the record of layer {name!r} is for {have}; init was told {need}")
        return batches

    def _method(self, name: str) -> Any:
        if not isinstance(self.methods, Mapping):
            return self.methods
        if name not in self.methods:
            raise ValueError(f"methods has no entry for layer {name!r}; give it one, Identity() to leave it alone")
        return self.methods[name]
