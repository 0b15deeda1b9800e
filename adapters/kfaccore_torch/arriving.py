"""Statistics of a draw the moment its output gradients exist, inside its own backward, which lets go of each.

Calls on the way to others are seen by a hook before the node of their output; of the others, which nothing lies
behind, autograd hands the gradients over. Small records wait for their like, within bounds, to be measured in one call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import torch

import kfaccore as kf
from kfaccore_torch.calls import Call
from kfaccore_torch.collect import kept
from kfaccore_torch.elementwise import Slope
from kfaccore_torch.observe import Observed, wakes
from kfaccore_torch.passes import passing
from kfaccore_torch.pulled import lowered, raised
from kfaccore_torch.unusual import dense

if TYPE_CHECKING:
    from kfaccore_torch.step import Engine

_ROOM = 1 << 22  # numbers of small records that wait for their like
_SMALL = 2  # a small one is at most this part of them
_SHARE = 32  # and at most this part of all calls' outputs
Made = Callable[..., kf.Record]  # of what was observed, a layer, {call's number: its draws}, and a record it is like


class Measured:
    """What waits for the step, by layer, made of records as they come."""

    def __init__(self, engine: Engine, room: int, copies: bool) -> None:
        self.engine = engine
        self.room = room
        self.copies = copies
        self.found: dict[str, Any] = {}
        self._pending: dict[str, kf.Record] = {}
        self._held = 0

    def take(self, name: str, record: kf.Record) -> None:
        """Measure a record, now or beside the next ones of its shape."""
        size = prod(record.g.shape)
        plain = record.mask is None and not isinstance(record.a, kf.Ids | kf.Patches)
        if not plain or size > self.room // _SMALL:
            self._measure({name: record})
            return
        if self._held + size > self.room:
            self.flush()
        self._pending[name] = record
        self._held += size

    def flush(self) -> None:
        """Measure what waits for its like."""
        self._measure(self._pending)
        self._pending = {}
        self._held = 0

    def _measure(self, records: dict[str, kf.Record]) -> None:
        """Stats, or copies of rows where the step needs rows."""
        engine = self.engine
        with torch.no_grad(), engine.working():
            for name, stats in kf.measured_together(engine.core, engine.state, records).items():
                record = records[name]
                waits = record if stats is None else stats
                self.found[name] = kept(waits, record) if self.copies or stats is not None else waits


def waiting(engine: Engine, records: dict[str, kf.Record], copies: bool = True) -> dict[str, Any]:
    """What is kept of records until the step: Stats, or rows, copied if `copies`, where the step needs rows."""
    found = Measured(engine, _ROOM, copies)
    for name, record in records.items():
        found.take(name, record)
    found.flush()
    return found.found


class _Arrivals:
    """Gradients of one draw on their way to records of their layers, each complete once all of its calls have come."""

    def __init__(self, observed: Observed, layers: dict[str, Any], made: Made, measured: Measured) -> None:
        self.observed = observed
        self.layers = layers
        self.made = made
        self.measured = measured
        self.left = Counter(name for name, _ in observed.calls)
        self.waiting: dict[str, dict[int, torch.Tensor]] = {}
        self.awake: set[str] = set()  # layers with rows that no draw had moved before

    def take(self, i: int, g: torch.Tensor | None) -> None:
        """The gradient of a call's output."""
        g = raised(self.observed, g)
        if g is None:
            return
        name = self.observed.calls[i][0]
        one = self.observed.calls[i][1].of_parameter(dense(g.detach())[None])
        if wakes(self.observed, self.layers, i, one):
            self.awake.add(name)
        self.waiting.setdefault(name, {})[i] = one
        self.left[name] -= 1
        if not self.left[name] and name not in self.awake:
            self.measured.take(name, self.made(self.observed, name, self.waiting.pop(name)))

    def seen(self, places: Sequence[tuple[int, int]], grads: Sequence[torch.Tensor | None]) -> None:
        """A hook before a node: (call's number, which of the node's outputs) of each call of it."""
        for i, output in places:
            self.take(i, grads[output])


def arriving(
    engine: Engine, observed: Observed, heads: list[torch.Tensor], v: Sequence[torch.Tensor], made: Made, copies: bool
) -> tuple[dict[str, Any], Observed]:
    """What waits for the step of one draw `v` at the heads, by layer that it reached, and what was observed."""
    layers = engine.plan.layers
    with observed.quiet.around():
        observed = _ready(observed)
    outputs = sum(prod(call.shape) for _, call in observed.calls)
    measured = Measured(engine, min(_ROOM, outputs // _SHARE), copies)
    arrivals = _Arrivals(observed, layers, made, measured)
    last = _last([call for _, call in observed.calls])
    hooked: dict[Any, list[tuple[int, int]]] = {}
    for i, (_, call) in enumerate(observed.calls):
        if i not in last:
            hooked.setdefault(call.node, []).append((i, call.edge.output_nr))
    with ExitStack() as hooks:
        for node, places in hooked.items():
            hooks.callback(node.register_prehook(partial(arrivals.seen, places)).remove)
        given = [x.to(f) for x, f in zip(lowered(observed, v), heads, strict=True)]
        edges = [observed.calls[i][1].edge for i in last]
        with passing(observed.quiet):
            found = torch.autograd.grad(heads, edges, given, retain_graph=True, allow_unused=True)
    for i, g in zip(last, found, strict=True):
        arrivals.take(i, g)
    grads = [arrivals.waiting.get(name, {}).get(i) for i, (name, _) in enumerate(observed.calls)]
    observed = engine.observer.again(observed, layers, heads, grads)
    for name, parts in arrivals.waiting.items():
        measured.take(name, made(observed, name, parts))
    measured.flush()
    return measured.found, observed


def _ready(observed: Observed) -> Observed:
    """With the slopes that autograd tells: inside the draw's backward their nodes know only what that one asks for, and
    what a checkpoint kept can be looked at once."""
    calls = []
    for name, call in observed.calls:
        slope = call.normalised
        calls.append((name, replace(call, normalised=partial(_same, slope())) if isinstance(slope, Slope) else call))
    return replace(observed, calls=tuple(calls))


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def _last(calls: Sequence[Call]) -> list[int]:
    """The calls from whose output a backward reaches no other call: gradients there are asked for, and pass all
    others on their way."""
    nodes = {call.node for call in calls}
    reaches: dict[Any, bool] = {}
    for node in nodes:
        waiting = [(node, False)]
        while waiting:
            here, done = waiting.pop()
            children = [child for child, _ in here.next_functions if child is not None]
            if done:
                reaches[here] = any(child in nodes or reaches[child] for child in children)
            elif here not in reaches:
                reaches[here] = False  # graphs have no circles: set before its children are done, never read before
                waiting.append((here, True))
                waiting.extend((child, False) for child in children if child not in reaches and child not in nodes)
    return [i for i, call in enumerate(calls) if not reaches[call.node]]
