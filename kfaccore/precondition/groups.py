"""What one step treats alike: a network-level method with all its layers, or a stack of equal ones (`stack`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, ClassVar, Protocol, TypeVar

from kfaccore.method import Block, Hyper, State, T
from kfaccore.precondition.comm import Communicator
from kfaccore.precondition.given import Given, in_dtype, joined, like_gradient, refused, working
from kfaccore.precondition.moving import moves
from kfaccore.precondition.parts import Parts
from kfaccore.precondition.placement import reduced
from kfaccore.record import Factored, Record
from kfaccore.solution import Solution
from kfaccore.xp import Code, choose, precision
from kfaccore.xp.arrays import Array, namespace
from kfaccore.xp.asking import Asks

Hypers = Mapping[str, Hyper]
Grads = Mapping[str, Array | Factored]
Batches = Mapping[str, Sequence[Given]]
K = TypeVar("K")  # a tree of where each layer's statistics were refused
N = TypeVar("N")  # a network-level method's state
X = TypeVar("X")


class Layered(Protocol):
    """A network-level method's state."""

    @property
    def layers(self) -> Mapping[str, State]: ...


class NetworkMethod(Protocol[N, T]):
    """A method on dicts {layer: ...} of one batch with the same draws; its state has `layers`, one a layer.

    needs_records   whether `solve` needs the records of every step
    """

    needs_records: ClassVar[bool]

    def covers(self, blocks: Mapping[str, Block]) -> list[str]:
        """The layers it takes; the others go to the methods that stand alone."""
        ...

    def init(self, blocks: Mapping[str, Block], like: Array) -> N:
        """As `Method.init`, for all of them."""
        ...

    def measure(self, state: N, records: Mapping[str, Record], hypers: Hypers) -> dict[str, T]:
        """Stats of each layer."""
        ...

    def combine(self, first: dict[str, T], second: dict[str, T]) -> dict[str, T]:
        """Stats of two micro-batches as one."""
        ...

    def update(self, state: N, stats: Mapping[str, T], hypers: Hypers, donate: bool = False) -> N:
        """Averages moved."""
        ...

    def refresh(self, state: N, hypers: Hypers) -> N:
        """Inverses from averages."""
        ...

    def solve(self, state: N, grads: Grads, hypers: Hypers, records: Mapping[str, Record] | None = None) -> Solution:
        """Directions: `direction` and `code` are dicts."""
        ...


class Group(Protocol[N, K]):
    """Layers that are measured, refreshed and solved in one call; its states are trees of arrays, and `direction` and
    `code` of its Solutions are trees that ranks may send."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def label(self) -> str:
        """What its information is kept under."""
        ...

    def updated(self, state: N, given: Batches, hypers: Hypers, comm: Communicator, donate: bool) -> tuple[N, K]:
        """The state with the batches of some of its layers in it; where (blocks,) they were refused, a tree."""
        ...

    def accepted(self, state: N) -> K:
        """The tree of an update that refused nothing."""
        ...

    def refreshing(self, state: N, hypers: Hypers) -> Asks[N]:
        """Inverses from averages, in steps."""
        ...

    def solve(self, state: N, grads: Grads, hypers: Hypers, batches: Batches) -> Solution:
        """Directions of its layers, in their gradients' dtype; they may be unchecked, see `kfaccore.solution.check`."""
        ...

    def unsolved(self, state: N, grads: Grads) -> Solution:
        """Zeros shaped like the directions, on a rank that another sends them to."""
        ...

    def marked(self, solved: Solution, refused: K | None) -> Solution:
        """With the code of what was refused, as `updated` gave it; None for nothing."""
        ...

    def parts(self, solved: Solution, grads: Grads) -> Parts:
        """Directions, codes and information by layer."""
        ...


def of(names: Sequence[str], given: Mapping[str, X]) -> dict[str, X]:
    """The part of a dict that is about these layers."""
    return {name: given[name] for name in names if name in given}


@dataclass(frozen=True)
class Together:
    """A network-level method and its layers; what it gives are dicts of one array a layer."""

    names: tuple[str, ...]
    method: NetworkMethod

    @property
    def label(self) -> str:
        return "network"

    def updated(
        self, state: Layered, given: Batches, hypers: Hypers, comm: Communicator, donate: bool
    ) -> tuple[Layered, dict[str, Array]]:
        turns = zip(*given.values(), strict=True)
        stats = [self._measured(state, dict(zip(given, turn, strict=True)), hypers) for turn in turns]
        total = reduced(comm, reduce(self.method.combine, stats))
        bad = {name: refused(found) for name, found in total.items()}
        with precision.exact():
            moves(donate)
            moved = self.method.update(state, total, of(self.names, hypers), donate)
        return moved, bad | self._fine(state, bad)

    def _measured(self, state: Layered, batch: dict[str, Any], hypers: Hypers) -> dict[str, Any]:
        """Stats of one micro-batch, in the dtype of the states they will move."""
        records: Any = {name: given for name, given in batch.items() if isinstance(given, Record | tuple)}
        found = {name: given for name, given in batch.items() if name not in records}
        if records:
            with precision.measuring(self.names):
                found |= self.method.measure(state, records, of(self.names, hypers))
        return {name: in_dtype(stats, working(state.layers[name])) for name, stats in found.items()}

    def _fine(self, state: Layered, but: Mapping[str, object]) -> dict[str, Array]:
        codes = {name: layer.code for name, layer in state.layers.items() if name not in but}
        return {name: namespace(code).zeros_like(code) > 0 for name, code in codes.items()}

    def accepted(self, state: Layered) -> dict[str, Array]:
        return self._fine(state, {})

    def refreshing(self, state: Layered, hypers: Hypers) -> Asks[Layered]:
        """In one step: a network-level method asks for its own layers' by itself."""
        yield ()
        return self.method.refresh(state, of(self.names, hypers))

    def solve(self, state: Layered, grads: Grads, hypers: Hypers, batches: Batches) -> Solution:
        given = of(self.names, batches) if self.method.needs_records else {}
        whole = {name: joined(records) for name, records in given.items() if records}
        ours = of(self.names, grads)
        with precision.solving(self.names):
            found = self.method.solve(state, ours, of(self.names, hypers), whole or None)
        directions = {}
        for name, x in found.direction.items():
            directions[name] = like_gradient(x, ours[name])
        return Solution(directions, found.code, found.state, found.info)

    def unsolved(self, state: Layered, grads: Grads) -> Solution:
        ours: dict[str, Any] = of(self.names, grads)
        zeros: dict[str, Any] = {name: namespace(x).zeros_like(x) for name, x in ours.items()}
        return Solution(zeros, {name: state.layers[name].code for name in zeros}, state, {})

    def marked(self, solved: Solution, refused: dict[str, Array] | None) -> Solution:
        codes = dict(solved.code)
        for name, flag in (refused or {}).items():
            if name in codes:
                codes[name] = choose(flag, Code.NONFINITE, codes[name])
        return replace(solved, code=codes)

    def parts(self, solved: Solution, grads: Grads) -> Parts:
        return Parts(solved.direction, dict(solved.code), {self.label: solved.info})
