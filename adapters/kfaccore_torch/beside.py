"""What a backward pass moves beside its gradients: a checkpoint's second forward counts the batch once more in running
averages, and a function written by hand may add to what a parameter holds. Draws leave all of that as it was.

Only graphs that may do so are watched: those with functions written by hand or hooks of tensors, and forwards whose
tensors hooks keep. What their draws move is found at the first, second, fourth, eighth and so on of each, and put back
at every one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from kfaccore_torch.graph import Behind
from kfaccore_torch.held import as_it_was, walked
from kfaccore_torch.plan import unwrapped
from kfaccore_torch.replay import random_state
from kfaccore_torch.spans import Span

_MOST = 256  # ways of graphs that are remembered
_SINK = "_DDPSinkBackward"
_REDUCED = "_static_graph_delay_allreduce_enqueued"


@dataclass(frozen=True)
class Quiet:
    """What passes through a user's graph leave as it is.

    retaining   tensors whose `.grad` no draw may add to
    around      makes what is entered around a pass, or a look at what autograd kept
    """

    retaining: tuple[torch.Tensor, ...] = ()
    around: Callable[[], AbstractContextManager] = nullcontext


class Beside:
    """Of one model, what passes through each kind of graph have moved, by the graph's key."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.turns: dict[Any, int] = {}
        self.moved: dict[Any, set[str]] = {}

    def quiet(self, graph: Behind, span: Span, retaining: tuple[torch.Tensor, ...]) -> Quiet:
        """For passes through a graph that a forward made."""
        functions = [node for node in graph.nodes if isinstance(node, torch.autograd.function.BackwardCFunction)]
        sinks = [node for node in functions if node.name() == _SINK]
        written = span.listened or len(functions) > len(sinks)
        if not (written or span.kept):
            return Quiet(retaining, partial(_past, sinks) if sinks else nullcontext)
        key = graph.key, written, span.kept
        if key not in self.turns and len(self.turns) >= _MOST:
            oldest = next(iter(self.turns))
            del self.turns[oldest], self.moved[oldest]
        turn = self.turns[key] = self.turns.get(key, 0) + 1
        moved = self.moved.setdefault(key, set())
        around = partial(self._around, sinks, written, moved, turn & (turn - 1) == 0)
        return Quiet(retaining, around)

    @contextmanager
    def looking(self, span: Span) -> Iterator[None]:
        """While what autograd kept of a forward is read, of which a checkpoint makes it a second time."""
        with ExitStack() as stack:
            if span.kept:
                for undo in random_state([], self.device):
                    stack.callback(undo)
                stack.enter_context(as_it_was(self.model))
            yield

    @contextmanager
    def _around(self, sinks: Sequence[Any], written: bool, moved: set[str], watch: bool) -> Iterator[None]:
        """What is `moved` is put back, and where it is to `watch` all that can be, what moves joins it. `written` by
        hand: functions may write to what parameters hold."""
        with ExitStack() as stack:
            stack.enter_context(_past(sinks))
            for undo in random_state([], self.device):
                stack.callback(undo)
            stack.enter_context(_bound(self.model if written else None))
            if watch or moved:
                things = list(walked(unwrapped(self.model)))
                own = list(_of_parameters(self.model)) if written else []
                if not watch:
                    things = [(path, x) for path, x in things if path in moved]
                    own = [(path, x) for path, x in own if path in moved]
                stack.enter_context(as_it_was(self.model, things, own, moved.update if watch else None))
            yield


def _of_parameters(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Gradients and attributes of parameters, such as the sums that a fused backward adds to."""
    for name, p in model.named_parameters():
        yield name, vars(p)
        for key, x in (("grad", p.grad), *vars(p).items()):
            if isinstance(x, torch.Tensor) and x.layout is torch.strided:
                yield f"{name}.{key}", x


@contextmanager
def _bound(model: nn.Module | None) -> Iterator[None]:
    """Parameters have the `.grad` afterwards that they had before."""
    before = [(p, p.grad) for p in model.parameters()] if model is not None else []
    try:
        yield
    finally:
        for p, grad in before:
            if p.grad is not grad:
                p.grad = grad


@contextmanager
def _past(sinks: Sequence[Any]) -> Iterator[None]:
    """DistributedDataParallel with a static graph waits for the first backward pass through its output, to sum
    gradients at the end of that: here it takes the pass for a later one, and goes on to wait."""
    waiting = {id(ddp): ddp for node in sinks if (ddp := node.ddp_weakref()) is not None and ddp.static_graph}
    if any(_REDUCED not in vars(ddp) for ddp in waiting.values()):
        raise ValueError(
            "the model is under DistributedDataParallel(static_graph=True), whose first backward pass this version of "
            "torch counts in a way that is not known here, and draws would be taken for it: pass static_graph=False"
        )
    before = [(ddp, vars(ddp)[_REDUCED]) for ddp in waiting.values()]
    for ddp, _ in before:
        setattr(ddp, _REDUCED, True)
    try:
        yield
    finally:
        for ddp, reduced in before:
            setattr(ddp, _REDUCED, reduced)
