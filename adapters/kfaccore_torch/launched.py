"""The plain step of a small model on CUDA as one launch: recorded as a graph, and played again while nothing but the
numbers in its arrays has changed.

Gradients are copied into the arrays that the graph reads, directions out of those it writes. Inverses that a refresh
made are copied into the ones it reads, which then are the state's own. What is recorded is a step that came twice in a
row with the same layers, shapes and numbers: one whose damping moves at every step stays as it is.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

import kfaccore as kf
from kfaccore_torch.collect import leaves, mapped

if TYPE_CHECKING:
    from kfaccore_torch.plan import Plan
    from kfaccore_torch.step import Engine

MOST_BYTES = 128 * 2**20  # of gradients: of more, the device has so much to do that launches hide behind it
METHODS = (kf.KFAC, kf.TKFAC, kf.EKFAC, kf.TEKFAC, kf.SINGD, kf.IKFAC, kf.Diagonal)  # nothing is read on the host
Given = Mapping[str, Mapping[str, torch.Tensor]]
Replay = Callable[[], None]
X = TypeVar("X")


@dataclass(frozen=True, eq=False)
class Same(Generic[X]):
    """An object as a key: equal to itself alone."""

    it: X

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.it is other.it

    def __hash__(self) -> int:
        return id(self.it)


@dataclass
class Recorded:
    """A step: what it reads, what it writes, and how it is taken again."""

    replay: Replay
    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]
    reads: list[Any]  # leaves of the state
    told: Callable[[], kf.Info]  # in arrays that the next one writes to


class Launch:
    """At most one recorded step of an engine."""

    def __init__(self) -> None:
        self._key: object = None  # of what is recorded, or was met last
        self.recorded: Recorded | None = None
        self._refused: list[object] = []  # keys of steps that cannot be recorded
        self._asked: tuple[object, bool] = None, False  # what was last asked of `_records`, and its answer

    def step(self, engine: Engine, given: Given) -> bool:
        """Whether gradients have become directions in one launch; the engine has moved on then."""
        key = _key(engine, given) if self._fits(engine, given) else None
        if key is None or key in self._refused:
            return False
        if key != self._key:
            self._key = key
            self.recorded = None
            return False
        if self.recorded is not None and not _follows(engine, self.recorded):
            self.recorded = None
        if self.recorded is None:
            self.recorded = _recorded(engine, given)
        if self.recorded is None:
            self._refused.append(key)
            return False
        _played(engine, self.recorded, _flat(given))
        return True

    def _fits(self, engine: Engine, given: Given) -> bool:
        question = Same(engine.core), Same(engine.plan), tuple(given)
        if question != self._asked[0]:
            self._asked = question, bool(given) and _records(engine.core, engine.plan, tuple(given))
        return self._asked[1]


def _key(engine: Engine, given: Given) -> object:
    """What a step was recorded for; None where it is not to be."""
    if engine.namespace != "torch" or not records_on(engine.device) or engine.new:
        return None
    if engine.core.due(engine.state, given) != kf.Due(False, False):
        return None
    hypers = engine.core.schedules.hypers(given, engine.state.step, lambda hyper: hyper)
    numbers = tuple((name, hyper.damping) for name, hyper in hypers.items())
    shapes = tuple((x.shape, x.stride(), x.dtype) for x in _flat(given))
    precision = engine.settings.precision or engine.observed_precision()
    return Same(engine.plan), Same(engine.core), numbers, shapes, precision


def _records(core: kf.Preconditioner, plan: Plan, names: tuple[str, ...]) -> bool:
    """Whether steps of these layers are small, and a function of gradients and inverses alone."""
    if core.comm.world > 1 or core.network is not None or core.rule.judges or core.rule.needs_records:
        return False
    layers = [plan.layers[name] for name in names]
    if any(layer.partial(role) for layer in layers for role in layer.parameters):
        return False
    size = sum(p.numel() * p.element_size() for layer in layers for p in layer.parameters.values())
    return size <= MOST_BYTES and all(type(core.assigned.of(name)) in METHODS for name in names)


def records_on(device: torch.device) -> bool:
    """Whether a device has graphs, and the caller is not recording one."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def _flat(given: Given) -> list[torch.Tensor]:
    return [x for roles in given.values() for x in roles.values()]


def _recorded(engine: Engine, given: Given) -> Recorded | None:
    """The step of these gradients, recorded; None where it leaves another state than it found, or cannot be."""
    inputs = [torch.empty_like(x) for x in _flat(given)]
    torch._foreach_copy_(inputs, _flat(given))
    source = iter(inputs)
    read = {name: {role: next(source) for role in roles} for name, roles in given.items()}
    before = engine.state
    told: list[tuple[kf.Info, Any]] = []

    def run() -> list[torch.Tensor]:
        updates, after, info = engine.core.do(kf.Due(False, False), before, None, engine.matrices(read))
        told[:] = [(info, after)]
        found = engine.tensors_of(updates)
        return [found[name][role] for name, roles in given.items() for role in roles]

    reads = list(leaves(before.layers))
    run()
    _, after = told[0]
    moved = list(leaves(after.layers))
    kept = len(moved) == len(reads) and all(new is old for new, old in zip(moved, reads, strict=True))
    if not kept or (after.motion is not before.motion and after.motion != {}):
        return None
    try:
        replay, outputs = graphed(run)
    except RuntimeError as error:
        warnings.warn(
            f"the plain step is taken launch by launch, as no graph could be made of it: {error}", RuntimeWarning, 2
        )
        return None
    return Recorded(replay, inputs, outputs, reads, lambda: engine.marked(told[0][0], given))


def graphed(run: Callable[[], list[torch.Tensor]]) -> tuple[Replay, list[torch.Tensor]]:
    """A function as a CUDA graph, and the arrays it writes."""
    graph = torch.cuda.CUDAGraph()
    # other threads, such as one that pins batches, may use the device meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = run()
    return graph.replay, outputs


def _played(engine: Engine, found: Recorded, gradients: list[torch.Tensor]) -> None:
    torch._foreach_copy_(found.inputs, gradients)
    found.replay()
    torch._foreach_copy_(gradients, found.outputs)
    engine.state = replace(engine.state, step=engine.state.step + 1)
    engine.tell(lambda: copy.deepcopy(found.told()))
    engine.called = set()


def _follows(engine: Engine, found: Recorded) -> bool:
    """Whether what the graph reads is what the state has, and the state's own: arrays are copied into it. False where a
    number, or a shape, is another."""
    now = list(leaves(engine.state.layers))
    if len(now) != len(found.reads):
        return False
    pairs = [(old, new) for old, new in zip(found.reads, now, strict=True) if old is not new]
    if not pairs:
        return True
    if not all(isinstance(old, torch.Tensor) and old.shape == new.shape for old, new in pairs):
        return False
    torch._foreach_copy_([old for old, _ in pairs], [new for _, new in pairs])
    source = iter(found.reads)
    engine.state = replace(engine.state, layers=mapped(lambda _, leaf: next(source), engine.state.layers))
    return True
