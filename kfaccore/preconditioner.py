"""Composes methods, clocks, schedules and a step over the layers of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import array_api_compat as aac
import numpy as np

from kfaccore import tree
from kfaccore.comm import Communicator, Serial
from kfaccore.method import Block, Hyper, Solution, gradient
from kfaccore.record import Factored, Record
from kfaccore.schedule import Clocks, Schedules
from kfaccore.sharing import concat
from kfaccore.step import Fixed, Rule
from kfaccore.xp import Code, choose
from kfaccore.xp.arrays import Array, namespace, to_host


@dataclass(frozen=True)
class State:
    """Steps taken, one method state a layer, the step's own buffers; `blocks` is structure."""

    step: int
    layers: dict[str, Any]
    motion: Any
    blocks: tuple[tuple[str, Block], ...] = tree.static(default=())


@dataclass(frozen=True)
class Info:
    """What one call did: result codes (blocks,) and solver information a layer, and the step's own numbers."""

    updated: bool
    refreshed: bool
    codes: dict[str, Array]
    layers: dict[str, dict[str, Array]]
    step: dict[str, Any]

    def counts(self) -> dict[Code, int]:
        """How many blocks ended with each code; reads the codes to the host."""
        codes = [to_host(code) for code in self.codes.values()]
        found, how_many = np.unique(np.concatenate(codes), return_counts=True) if codes else ((), ())
        return {Code(int(code)): int(count) for code, count in zip(found, how_many, strict=True)}


@dataclass(frozen=True, init=False)
class Preconditioner:
    """Turns records and gradients of all layers into updates; holds numbers only, state is returned.

    methods    one method for all layers, or a mapping from layer to method
    clocks, schedules, comm   see their classes
    network    for network-level methods, of which there is none yet
    step       from directions to updates, kept as `rule`: SelfTuning(), LineSearch(), or Fixed(lr, momentum, rescale),
               whose default hands directions on
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
        layers, motion = {}, {}
        for name, block in blocks.items():
            with _named(name):
                layers[name] = self._method(name).init(block, like)
            shape = (block.blocks, block.d_out, block.d_in)
            motion[name] = namespace(like).zeros(shape, dtype=like.dtype, device=aac.device(like))
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
        share, motion = 1.0, state.motion
        while self.rule.judges:
            wanted, motion = self.rule.judge(motion, share, before, loss())
            if wanted == share:
                break
            share = wanted
            place(share)
            if share == 0:
                break
        return share, replace(state, motion=motion)

    def step(
        self,
        state: State,
        records: Mapping[str, Record | Sequence[Record]] | None,
        grads: Mapping[str, Array | Factored],
    ) -> tuple[dict[str, Array], State, Info]:
        """Updates to subtract, shaped like `grads`, the new state, and what happened.

        records   {layer: Record, or a sequence of Records of micro-batches}; ignored when not wanted
        grads     {layer: array or Factored}; a layer left out is frozen: not measured, refreshed or solved

        Raises before anything is computed, so that `state` stays usable: ValueError for unknown layers, shapes that
        do not fit, or missing records.
        """
        updated = self.wants_records(state)
        refreshed = state.step % self.clocks.refresh == 0
        batches = self._check(state, records or {}, grads, updated)
        hypers = {name: self.schedules.hyper(name, state.step) for name in grads}
        layers, motion = dict(state.layers), state.motion
        seen = {name: reduce(concat, batches[name]) for name in grads} if self.rule.needs_records else {}
        motion = self.rule.begin(motion, seen)
        hypers = {name: self._penalised(self.rule.hyper(motion, hyper)) for name, hyper in hypers.items()}
        refreshed = refreshed or self.rule.restart(motion)
        directions, codes, infos = {}, {}, {}
        for name, grad in grads.items():
            with _named(name), np.errstate(all="ignore"):  # what is not finite comes back as a code
                solution = self._layer(name, layers[name], batches.get(name, ()), grad, hypers[name], refreshed)
            layers[name] = solution.state
            directions[name], codes[name], infos[name] = solution.direction, solution.code, solution.info
        with np.errstate(all="ignore"):
            directions, motion, told = self.rule(motion, directions, dict(grads), seen, self.schedules.l2)
        info = Info(updated, refreshed, codes, infos, told)
        return directions, replace(state, step=state.step + 1, layers=layers, motion=motion), info

    def _penalised(self, hyper: Hyper) -> Hyper:
        """The curvature of the l2 penalty is l2 I: it joins the damping."""
        return replace(hyper, damping=hyper.damping + self.schedules.l2) if self.schedules.l2 else hyper

    def _layer(
        self, name: str, state: Any, records: Sequence[Record], grad: Any, hyper: Hyper, refreshed: bool
    ) -> Solution:
        """One layer's measure, update, refresh and solve."""
        method = self._method(name)
        refused, like = None, getattr(state, "weight", None)
        if records:
            measured = (_in_dtype(method.measure(state, record, hyper), like) for record in records)
            stats = reduce(method.combine, measured)
            stats = self.comm.all_reduce(stats)
            state = method.update(state, stats, hyper, self.donate)
            refused = stats.bad > 0
        if refreshed:
            state = method.refresh(state, hyper)
        newest = records[-1] if records and getattr(method, "rows_at_solve", False) else None
        solution = method.solve(state, grad, hyper, newest)
        wanted = getattr(grad, "g", grad).dtype
        if like is not None and solution.direction.dtype != wanted and solution.direction.dtype == like.dtype:
            solution = replace(solution, direction=namespace(like).astype(solution.direction, wanted))
        if refused is not None:
            solution = replace(solution, code=choose(refused, Code.NONFINITE, solution.code))
        return solution

    def _check(self, state: State, records: Mapping, grads: Mapping, wanted: bool) -> dict[str, Sequence[Record]]:
        """Records as sequences, after every test that can fail without looking at the data."""
        blocks = dict(state.blocks)
        for what, given in (("grads", grads), ("records", records)):
            unknown = sorted(set(given) - set(blocks))
            if unknown:
                raise ValueError(f"{what} has layers {unknown} that init never saw; it knows {sorted(blocks)}")
        for name, grad in grads.items():
            with _named(name):
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
            batches[name] = [given] if isinstance(given, Record) else list(given)
            for record in batches[name]:
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


def _in_dtype(stats: Any, like: Array | None) -> Any:
    """Stats in the dtype of the state they will move."""
    if like is None or stats.bad.dtype == like.dtype:
        return stats
    return tree.map(lambda x: namespace(x).astype(x, like.dtype), stats)


@contextmanager
def _named(layer: str) -> Iterator[None]:
    """Adds the layer's name to whatever is raised inside, once."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in layer {layer!r}")
        raise
