"""What a Preconditioner does with the layers of one call: each for itself, or all of a network-level method at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np

from kfaccore.method import Hyper
from kfaccore.precondition.comm import Communicator
from kfaccore.precondition.given import in_dtype, is_stats, like_gradient, named
from kfaccore.precondition.placement import exchanged, reduced, sent
from kfaccore.record.sharing import concat
from kfaccore.solution import Solution
from kfaccore.xp import Code, choose
from kfaccore.xp.arrays import Array, namespace


@dataclass(frozen=True)
class Turn:
    """What is due in one call, averages updated, inverses refreshed, and which ranks solve for which layer."""

    updated: bool
    refreshed: bool
    comm: Communicator
    work: Mapping[str, tuple[int, ...]]
    donate: bool

    def alone(
        self,
        methods: Mapping[str, Any],
        states: Mapping[str, Any],
        records: Mapping[str, Sequence],
        grads: Mapping[str, Any],
        hypers: Mapping[str, Hyper],
        rows: set[str],
    ) -> dict[str, Solution]:
        """Measure, update, refresh and solve each layer of `grads`; `rows` are those that solve with the records."""
        layers, refused = {name: states[name] for name in grads}, {}
        for name in (name for name in grads if self.updated and records.get(name)):
            with named(name), np.errstate(all="ignore"):  # what is not finite comes back as a code
                layers[name], refused[name] = self._update(methods[name], layers[name], records[name], hypers[name])
        if self.refreshed:
            for name in (name for name in layers if self.work[name][0] == self.comm.rank):
                with named(name), np.errstate(all="ignore"):
                    layers[name] = methods[name].refresh(layers[name], hypers[name])
            layers = exchanged(self.comm, layers, methods, dict(self.work))
        found = {}
        for name, grad in grads.items():
            with named(name), np.errstate(all="ignore"):
                whole = reduce(concat, records[name]) if name in rows and records.get(name) else None
                solution = self._solve(methods[name], layers[name], grad, hypers[name], whole, self.work[name])
            code = choose(refused[name], Code.NONFINITE, solution.code) if name in refused else solution.code
            found[name] = replace(solution, code=code)
        return found

    def _update(self, method: Any, state: Any, records: Sequence, hyper: Hyper) -> tuple[Any, Array]:
        """Statistics of one layer into its state, and where (blocks,) they were refused."""
        found = (r if is_stats(r) else method.measure(state, r, hyper) for r in records)
        measured = (in_dtype(stats, getattr(state, "weight", None)) for stats in found)
        stats = reduced(self.comm, reduce(method.combine, measured))
        return method.update(state, stats, hyper, self.donate), stats.bad > 0

    def _solve(self, method: Any, state: Any, grad: Any, hyper: Hyper, record: Any, ranks: tuple[int, ...]) -> Solution:
        """The direction of one layer, sent from its owner where this rank does not solve for it."""
        if self.comm.rank in ranks:
            solution = method.solve(state, grad, hyper, record)
        else:
            solution = Solution(namespace(grad).zeros_like(grad), state.code, state)
        direction = like_gradient(solution.direction, grad, getattr(state, "weight", None))
        return sent(self.comm, replace(solution, direction=direction), ranks)

    def together(
        self,
        network: Any,
        state: Any,
        records: Mapping[str, Sequence],
        grads: Mapping[str, Any],
        hypers: Mapping[str, Hyper],
    ) -> Solution:
        """The same for the layers of a network-level method; direction and code are dicts."""
        refused, like = {}, {name: getattr(layer, "weight", None) for name, layer in state.layers.items()}
        if records and self.updated:
            measured = []
            for batch in zip(*records.values(), strict=True):
                found = network.measure(state, dict(zip(records, batch, strict=True)), hypers)
                measured.append({name: in_dtype(stats, like[name]) for name, stats in found.items()})
            stats = reduce(network.combine, measured)
            state = network.update(state, stats, hypers, self.donate)
            refused = {name: found.bad > 0 for name, found in stats.items()}
        if self.refreshed:
            state = network.refresh(state, hypers)
        whole = {name: reduce(concat, given) for name, given in records.items()} if network.needs_records else {}
        solution = network.solve(state, grads, hypers, whole or None)
        direction = {name: like_gradient(x, grads[name], like[name]) for name, x in solution.direction.items()}
        codes = {name: choose(bad, Code.NONFINITE, solution.code[name]) for name, bad in refused.items()}
        return replace(solution, direction=direction, code={**solution.code, **codes})
