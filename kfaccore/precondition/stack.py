"""A stack as a group of a step: its layers' gradients and statistics go in as blocks of one, directions are views."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from kfaccore import tree
from kfaccore.method import Hyper, Method, RowsAtSolve, State, Stats, declares
from kfaccore.precondition.comm import Communicator, receives
from kfaccore.precondition.given import Given, in_dtype, joined, like_gradient, named, refused, working
from kfaccore.precondition.groups import Batches, Grads, Hypers, of
from kfaccore.precondition.moving import moves
from kfaccore.precondition.parts import Parts, Rows
from kfaccore.precondition.placement import reduced
from kfaccore.precondition.side_by_side import gradients, kind_of, records_of_turn, shared
from kfaccore.precondition.stacks import Names, mergeable, merged, part, put
from kfaccore.record import Factored, Record
from kfaccore.refreshing import steps
from kfaccore.solution import Solution, later
from kfaccore.xp import Code, precision
from kfaccore.xp.arrays import Array, filled, namespace
from kfaccore.xp.asking import Asks
from kfaccore.xp.blocks import parted, unstacked


@dataclass(frozen=True)
class Stack:
    """Layers of one method and equal sizes, whose states are blocks of one, in the order of `names`."""

    names: Names
    method: Method

    @property
    def label(self) -> str:
        return self.names[0]

    def updated(
        self, state: State, given: Batches, hypers: Hypers, comm: Communicator, donate: bool
    ) -> tuple[State, Array]:
        ours = Stack(tuple(given), self.method)
        mine = part(state, self.names, ours.names)
        stats = ours._stats(mine, given, hypers)
        if comm.world > 1 or mergeable(stats):  # over ranks Stats are sums, and all ranks must do the same
            mine, refused = ours._moved(mine, merged(stats), hypers, comm, donate)
        else:  # rows of batches of different sizes: one by one
            mine, refused = ours._apart(mine, stats, hypers, comm, donate)
        if not receives(comm):
            return state, self.accepted(state)
        if ours.names == self.names:
            return mine, refused
        return put(state, self.names, ours.names, mine), put(self.accepted(state), self.names, ours.names, refused)

    def _moved(
        self, state: State, stats: Stats, hypers: Hypers, comm: Communicator, donate: bool
    ) -> tuple[State, Array]:
        total = reduced(comm, stats)
        if not receives(comm):
            return state, self.accepted(state)
        with self._named(), precision.exact():
            moves(donate)
            return self.method.update(state, total, self._hyper(hypers, state), donate), refused(total)

    def _apart(
        self, state: State, stats: Sequence[Stats], hypers: Hypers, comm: Communicator, donate: bool
    ) -> tuple[State, Array]:
        found = []
        for name, one in zip(self.names, stats, strict=True):
            alone = Stack((name,), self.method)
            found.append(alone._moved(part(state, self.names, (name,)), one, hypers, comm, donate))
        return merged([new for new, _ in found]), merged([refused for _, refused in found])

    def _stats(self, state: State, given: Batches, hypers: Hypers) -> list[Stats]:
        """Of all layers as one where their records can stand side by side, else of each."""
        turns = records_of_turn(list(given.values()))
        if turns:
            hyper = self._hyper(hypers, state)
            with self._named(), precision.measuring(self.names):
                return [self._total(state, turns, hyper)]
        stats = []
        for name, batches in given.items():
            with named(name), precision.measuring((name,)):
                raw = any(isinstance(x, Record | tuple) for x in batches)
                mine = part(state, self.names, (name,)) if raw else state
                stats.append(self._total(mine, batches, hypers[name]))
        return stats

    def _total(self, state: State, batches: Sequence[Given], hyper: Hyper) -> Stats:
        """Stats of the micro-batches, in the dtype of the state they will move."""
        method: Any = self.method
        like = working(state)
        found = [method.measure(state, x, hyper) if isinstance(x, Record | tuple) else x for x in batches]
        return reduce(method.combine, [in_dtype(x, like) for x in found])

    def accepted(self, state: State) -> Array:
        return namespace(state.code).zeros_like(state.code) > 0

    def refreshing(self, state: State, hypers: Hypers) -> Asks[State]:
        with self._named():
            return (yield from steps(self.method, state, self._hyper(hypers, state)))

    def solve(self, state: State, grads: Grads, hypers: Hypers, batches: Batches) -> Solution:
        kinds: dict[object, list[str]] = {}
        for name in self.names:
            kinds.setdefault(kind_of(grads[name]), []).append(name)
        if len(kinds) == 1:
            return self._alike(state, grads, hypers, batches)
        pieces = {}
        for names in kinds.values():
            ours = Stack(tuple(names), self.method)
            mine = part(state, self.names, names)
            pieces[ours.names] = ours._alike(mine, grads, hypers, batches)
        return self._assembled(pieces)

    def _assembled(self, pieces: Mapping[Names, Solution]) -> Solution:
        """Solutions of parts of the stack as one of all."""
        order = tuple(name for names in pieces for name in names)
        whole = {}
        for field in ("direction", "code", "state", "info"):
            whole[field] = part(merged([getattr(piece, field) for piece in pieces.values()]), order, self.names)
        return Solution(**whole)

    def _alike(self, state: State, grads: Grads, hypers: Hypers, batches: Batches) -> Solution:
        """Directions for gradients of one kind: arrays, or rows of one shape."""
        ours = [grads[name] for name in self.names]
        rows = self._rows(batches) if declares(self.method, RowsAtSolve) else None
        if rows is not None and len(rows) > 1:
            return self._one_by_one(state, grads, hypers, batches)
        with self._named(), precision.solving(self.names), later():
            record = rows[0] if rows else None
            method: Any = self.method
            found: Solution = method.solve(state, gradients(ours), self._hyper(hypers, state), record)
        return replace(found, direction=like_gradient(found.direction, ours[0]))

    def _rows(self, batches: Batches) -> list[Any] | None:
        """The newest records that a solve is given: one of all layers if they stand side by side, else one each."""
        given = of(self.names, batches)
        if not any(given.values()):
            return None
        if len(given) == len(self.names) and all(given.values()):
            turns = records_of_turn(list(given.values()), bounded=False)
            if turns:
                return [joined(turns)]
        return [joined(given[name]) if given.get(name) else None for name in self.names]

    def _one_by_one(self, state: State, grads: Grads, hypers: Hypers, batches: Batches) -> Solution:
        pieces = {}
        for name in self.names:
            alone = Stack((name,), self.method)
            pieces[alone.names] = alone._alike(part(state, self.names, alone.names), grads, hypers, batches)
        return self._assembled(pieces)

    def unsolved(self, state: State, grads: Grads) -> Solution:
        like = gradients([grads[name] for name in self.names])
        like = like.dense() if isinstance(like, Factored) else like
        return Solution(namespace(like).zeros_like(like), state.code, state, {})

    def marked(self, solved: Solution, refused: Array | None) -> Solution:
        if refused is None:
            return solved
        return replace(solved, code=filled(solved.code, refused, int(Code.NONFINITE)))

    def parts(self, solved: Solution, grads: Grads) -> Parts:
        x = solved.direction
        each = x.shape[0] // len(self.names)
        flat = [_flat(grads[name]) for name in self.names]
        cut = unstacked(x) if all(flat) else parted(x, each)
        directions = dict(zip(self.names, cut, strict=True))
        if any(flat) and not all(flat):
            directions = {n: d[0, ...] if f else d for (n, d), f in zip(directions.items(), flat, strict=True)}
        infos = {name: self._info(solved.info, i) for i, name in enumerate(self.names)}
        return Parts(directions, Rows.of_blocks(self.names, solved.code), infos, x)

    def _info(self, info: dict[str, Array], place: int) -> dict[str, Array]:
        """One layer's; a number of all is that of each."""
        found = {}
        for key, x in info.items():
            each = x.shape[0] // len(self.names) if x.ndim else 0
            found[key] = x[place * each : (place + 1) * each, ...] if each else x
        return found

    def _hyper(self, hypers: Hypers, state: State) -> Hyper:
        like = working(state)
        like = _real(state) if like is None else like
        return shared([hypers[name] for name in self.names], state.code.shape[0], like)

    def _named(self) -> named:
        return named(*self.names)


def _real(state: State) -> Array:
    """A leaf that tells in what a state computes."""
    return next((x for x in tree.leaves(state) if "float" in str(x.dtype)), state.code)


def _flat(grad: Array | Factored) -> bool:
    """Whether a gradient came without a blocks axis, as its direction shall go."""
    return not isinstance(grad, Factored) and grad.ndim == 2
