"""Composes methods, clocks, schedules and a step over the layers of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import array_api_compat as aac
import numpy as np

from kfaccore import tree
from kfaccore.method import Block, Hyper
from kfaccore.precondition.comm import Communicator, Serial
from kfaccore.precondition.given import is_stats, named, records_of
from kfaccore.precondition.info import Info
from kfaccore.precondition.layerwise import Turn
from kfaccore.precondition.placement import agree, assign, check, costs, exchanged
from kfaccore.precondition.schedule import Clocks, Schedules
from kfaccore.precondition.weighting import resting
from kfaccore.record import Factored, Record
from kfaccore.record.sharing import concat
from kfaccore.solution import gradient
from kfaccore.step import Fixed, Rule
from kfaccore.xp.arrays import Array, namespace


@dataclass(frozen=True)
class State:
    """Steps taken, one method state a layer, the step's own buffers, that of a network-level method; `blocks` is
    structure."""

    step: int
    layers: dict[str, Any]
    motion: Any
    network: Any = ()
    blocks: tuple[tuple[str, Block], ...] = tree.static(default=())


@dataclass(frozen=True, init=False)
class Preconditioner:
    """Turns records and gradients of all layers into updates; holds numbers only, state is returned.

    methods    one method for all layers, or a mapping from layer to method
    clocks, schedules, comm   see their classes
    network    TwoLevel(KFAC()), Tridiagonal(): one method for all the layers it covers; `methods` has the others
    step       from directions to updates, kept as `rule`: SelfTuning(), LineSearch(), GridSearch(), Quadratic(),
               Fixed(lr, momentum, rescale); the default hands directions on
    donate     let NumPy updates reuse the buffers of the state passed in, which must then not be used again
    """

    methods: Any
    clocks: Clocks
    schedules: Schedules
    network: Any
    rule: Any
    comm: Communicator
    donate: bool

    def __init__(
        self,
        methods: Any = None,
        clocks: Clocks = Clocks(),  # noqa: B008 frozen
        schedules: Schedules = Schedules(),  # noqa: B008 frozen
        network: Any = None,
        step: Rule = Fixed(),  # noqa: B008 frozen
        comm: Communicator = Serial(),  # noqa: B008 frozen
        donate: bool = False,
    ) -> None:
        if network is not None and not hasattr(network, "covers"):
            raise ValueError(f"network is {network!r}; need a network-level method such as TwoLevel()")
        if methods is None and network is None:
            raise ValueError("a Preconditioner needs methods, such as KFAC(), or a network-level method as network")
        if network is not None and comm.world > 1:
            raise ValueError(f"{network} needs the records of all {comm.world} ranks; it runs in one process")
        if comm.world > 1 and step.needs_records:
            over = getattr(step, "over", None)
            if over is None:
                raise ValueError(
                    f"{step} needs the records of all ranks: on {comm.world} take SelfTuning() or Fixed(lr)"
                )
            step = over(comm)
        numbers = {"methods": methods, "clocks": clocks, "schedules": schedules, "network": network, "rule": step}
        for name, value in {**numbers, "comm": comm, "donate": donate}.items():
            object.__setattr__(self, name, value)

    def init(self, blocks: Mapping[str, Block], like: Array) -> State:
        """State of all layers, in the namespace, dtype and device of `like`.

        A float64 `like` keeps averages and inverses in float64 for float32 records; updates keep the gradients' dtype.
        """
        together = self._together(blocks)
        methods = {name: self._method(name) for name in blocks if name not in together}
        check(methods, self.comm)
        layers, motion = {}, {}
        xp, device = namespace(like), aac.device(like)
        for name, block in blocks.items():
            with named(name):
                layers |= {name: methods[name].init(block, like)} if name in methods else {}
            motion[name] = xp.zeros((block.blocks, block.d_out, block.d_in), dtype=like.dtype, device=device)
        network = self.network.init(together, like) if together else ()
        return State(0, layers, self.rule.init(motion), network, tuple(blocks.items()))

    def memory(self, blocks: Mapping[str, Block], like: np.ndarray | None = None) -> dict[str, int]:
        """Bytes of each layer's state, before a run: states are made on NumPy, one at a time, and dropped.

        `like` gives the dtype (default float32). Records, gradients and momentum are not counted; a network-level
        method is one entry, "network".
        """
        like = np.zeros(1, np.float32) if like is None else like
        together = self._together(blocks)
        made = {name: (self._method(name).init, block) for name, block in blocks.items() if name not in together}
        made |= {"network": (self.network.init, together)} if together else {}
        return {n: sum(np.asarray(leaf).nbytes for leaf in tree.leaves(f(b, like))) for n, (f, b) in made.items()}

    def wants_records(self, state: State) -> bool:
        """Whether the next call of `step` will use records."""
        awake = {name for name, _ in state.blocks} - resting(self, state)
        whole = getattr(self.network, "needs_records", False) and awake - state.layers.keys()
        return bool(self.rule.needs_records or whole or (awake and state.step % self.clocks.update == 0))

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
            agree(self.comm, set(grads), tuple(state.layers), tree.leaves(state.layers)[0])
        hypers = {name: self.schedules.hyper(name, state.step) for name in grads}
        layers, motion = dict(state.layers), state.motion
        seen = {name: reduce(concat, batches[name]) for name in grads} if self.rule.needs_records else {}
        motion = self.rule.begin(motion, seen)
        hypers = {name: self._penalised(self.rule.hyper(motion, hyper)) for name, hyper in hypers.items()}
        refreshed = refreshed or self.rule.restart(motion)
        work = assign(costs(dict(state.blocks)), self.comm.world, self.comm.fraction)
        turn = Turn(updated, refreshed, self.comm, work, self.donate)
        directions, codes, infos, network = {}, {}, {}, state.network
        together = self._together(dict(state.blocks)) if grads else {}
        if together:
            ours: Any = ({n: given[n] for n in together if n in given} for given in (batches, grads, hypers))
            with np.errstate(all="ignore"):
                solution = turn.together(self.network, network, *ours)
            network, infos["network"] = solution.state, solution.info
            directions, codes = dict(solution.direction), dict(solution.code)
        alone = {name: grad for name, grad in grads.items() if name not in together}
        methods = {name: self._method(name) for name in alone}
        rows = {name for name, method in methods.items() if getattr(method, "rows_at_solve", False)}
        for name, found in turn.alone(methods, layers, batches, alone, hypers, rows).items():
            layers[name], directions[name], codes[name] = found.state, found.direction, found.code
            infos[name] = found.info
        with np.errstate(all="ignore"):
            directions, motion, told = self.rule(motion, directions, dict(grads), seen, self.schedules.l2)
        info = Info(updated, refreshed, codes, infos, told)
        return directions, replace(state, step=state.step + 1, layers=layers, motion=motion, network=network), info

    def gather(self, state: State) -> State:
        """The state with the inverses of all ranks, to be saved by any of them; every rank must call it."""
        ranks = tuple(range(self.comm.world))
        work = assign(costs(dict(state.blocks)), self.comm.world, self.comm.fraction)
        everyone = {name: (w[0], *(r for r in ranks if r != w[0])) for name, w in work.items()}
        methods = {name: self._method(name) for name in state.layers}
        return replace(state, layers=exchanged(self.comm, state.layers, methods, everyone))

    def _penalised(self, hyper: Hyper) -> Hyper:
        """The curvature of the l2 penalty is l2 I: it joins the damping."""
        return replace(hyper, damping=hyper.damping + self.schedules.l2) if self.schedules.l2 else hyper

    def _together(self, blocks: Mapping[str, Block]) -> dict[str, Block]:
        """Layers of the network-level method."""
        return {name: blocks[name] for name in self.network.covers(blocks)} if self.network is not None else {}

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
        together = set(self._together(blocks)) if grads else set()
        if together - set(grads):
            raise ValueError(f"layers {sorted(together - set(grads))} have no gradients; {self.network} needs them all")
        if not wanted:
            return {}
        if grads and not records and (self.rule.needs_records or state.step % self.clocks.update == 0):
            raise ValueError(
                f"step {state.step} updates statistics (every {self.clocks.update} steps) but got no records; "
                f"ask wants_records(state) before each step"
            )
        rest = resting(self, state)
        missing = sorted((set(grads) if self.rule.needs_records else together - rest) - set(records))
        if missing:
            whose = self.rule if self.rule.needs_records else self.network
            raise ValueError(f"layers {missing} have gradients but no records, which {whose} needs at every step")
        batches = {}
        for name, given in ((name, given) for name, given in records.items() if name not in rest):
            terms = isinstance(given, tuple) and name not in together and hasattr(self._method(name), "terms")
            if terms and self.rule.needs_records and not self.rule.terms:
                raise ValueError(f"{self.rule} cannot model several loss terms; use Quadratic() or GridSearch()")
            batches[name] = [given] if terms or isinstance(given, Record) or is_stats(given) else list(given)
            for record in records_of(batches[name]):
                have, need = Block.of(record), blocks[name]
                if (have.blocks, have.d_out, have.d_in) != (need.blocks, need.d_out, need.d_in):
                    raise ValueError(f"the record of layer {name!r} is for {have}; init was told {need}")
        return batches

    def _method(self, name: str) -> Any:
        if self.methods is None:
            raise ValueError(f"{self.network} leaves out layer {name!r}: give `methods` for it, Identity() to leave it")
        if not isinstance(self.methods, Mapping):
            return self.methods
        if name not in self.methods:
            raise ValueError(f"methods has no entry for layer {name!r}; give it one, Identity() to leave it alone")
        return self.methods[name]
