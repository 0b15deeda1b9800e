"""What a Preconditioner does with the layers of one call: each for itself, or all of a network-level method at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from kfaccore import tree
from kfaccore.comm import Communicator
from kfaccore.method import Hyper, Solution
from kfaccore.record import Record
from kfaccore.sharing import concat
from kfaccore.xp import Code, choose
from kfaccore.xp.arrays import Array, namespace


@dataclass(frozen=True)
class Turn:
    """What is due in one call: averages are updated, inverses refreshed."""

    updated: bool
    refreshed: bool
    comm: Communicator
    donate: bool

    def alone(self, method: Any, state: Any, records: Sequence[Record], grad: Any, hyper: Hyper) -> Solution:
        """One layer's measure, update, refresh and solve."""
        refused, like = None, getattr(state, "weight", None)
        if records and self.updated:
            measured = (_in_dtype(method.measure(state, record, hyper), like) for record in records)
            stats = self.comm.all_reduce(reduce(method.combine, measured))
            state = method.update(state, stats, hyper, self.donate)
            refused = stats.bad > 0
        if self.refreshed:
            state = method.refresh(state, hyper)
        newest = records[-1] if records and getattr(method, "rows_at_solve", False) else None
        solution = method.solve(state, grad, hyper, newest)
        direction = _like_gradient(solution.direction, grad, like)
        code = solution.code if refused is None else choose(refused, Code.NONFINITE, solution.code)
        return replace(solution, direction=direction, code=code)

    def together(
        self,
        network: Any,
        state: Any,
        records: Mapping[str, Sequence[Record]],
        grads: Mapping[str, Any],
        hypers: Mapping[str, Hyper],
    ) -> Solution:
        """The same for the layers of a network-level method; direction and code are dicts."""
        refused, like = {}, {name: getattr(layer, "weight", None) for name, layer in state.layers.items()}
        if records and self.updated:
            measured = []
            for batch in zip(*records.values(), strict=True):
                found = network.measure(state, dict(zip(records, batch, strict=True)), hypers)
                measured.append({name: _in_dtype(stats, like[name]) for name, stats in found.items()})
            stats = self.comm.all_reduce(reduce(network.combine, measured))
            state = network.update(state, stats, hypers, self.donate)
            refused = {name: found.bad > 0 for name, found in stats.items()}
        if self.refreshed:
            state = network.refresh(state, hypers)
        whole = {name: reduce(concat, given) for name, given in records.items()} if network.needs_records else None
        solution = network.solve(state, grads, hypers, whole)
        direction = {name: _like_gradient(x, grads[name], like[name]) for name, x in solution.direction.items()}
        codes = {name: choose(bad, Code.NONFINITE, solution.code[name]) for name, bad in refused.items()}
        return replace(solution, direction=direction, code={**solution.code, **codes})


def _in_dtype(stats: Any, like: Array | None) -> Any:
    """Stats in the dtype of the state they will move."""
    if like is None or stats.bad.dtype == like.dtype:
        return stats
    return tree.map(lambda x: namespace(x).astype(x, like.dtype), stats)


def _like_gradient(direction: Array, grad: Any, like: Array | None) -> Array:
    """A direction in the dtype of its gradient, where the state's wider one was kept."""
    wanted = getattr(grad, "g", grad).dtype
    if like is None or direction.dtype == wanted or direction.dtype != like.dtype:
        return direction
    return namespace(like).astype(direction, wanted)


@contextmanager
def named(layer: str) -> Iterator[None]:
    """Adds the layer's name to whatever is raised inside, once."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in layer {layer!r}")
        raise
