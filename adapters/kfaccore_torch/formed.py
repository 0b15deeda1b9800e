"""A loss that was formed on a captured forward: the layers it was measured for, and what it was multiplied with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd.graph import get_gradient_edge

from kfaccore.layers import Bias
from kfaccore_torch.settle import Layer
from kfaccore_torch.unread import read

if TYPE_CHECKING:
    from kfaccore_torch.plan import Plan
    from kfaccore_torch.shots import Shot
    from kfaccore_torch.step import Engine


@dataclass(eq=False)
class Formed:
    """One loss.

    found    layer -> its Records or Stats
    layers   those that they are of, as they were then
    trained  parameters whose `.grad` tells a backward of the training loss from another derivative
    value    its value times n of the forward, for rules that ask for it
    weight   that it was given
    passes   backward passes that differentiated it -> what arrived at it there; without those that failed, and those
             whose gradients were set aside
    without  layers whose gradients alone were set aside since
    void     whether no label counts in it, so that its gradients are zeros as its pass left them
    """

    found: Mapping[str, Any]
    layers: Mapping[str, Layer]
    trained: Sequence[torch.Tensor]
    value: float | None = None
    weight: float = 1.0
    passes: dict[int, Arrived] = field(default_factory=dict)
    without: frozenset[str] = frozenset()
    void: bool = False

    @property
    def counts(self) -> bool:
        """Whether it was differentiated, and its gradients were not thrown away since."""
        return bool(self.passes)

    @property
    def slope(self) -> torch.Tensor | None:
        """What arrived at it when it was differentiated into `.grad`: where that was twice, both together, as the
        gradients are. Where it never was, what arrived last, for loops that set `.grad` themselves."""
        into = [arrived.slope for arrived in self.passes.values() if arrived.into]
        asked = [arrived.slope for arrived in self.passes.values()][-1:]
        return sum(into[1:], into[0]) if into else asked[0] if asked else None

    @classmethod
    def on(cls, plan: Plan, found: Mapping[str, Any], value: float | None, weight: float, void: bool = False) -> Formed:
        """A loss whose statistics were taken under a plan."""
        return cls(found, {name: plan.layers[name] for name in found}, plan.trained, value, weight, void=void)

    def note(self, grad: torch.Tensor, follow: Callable[[Formed, bool], int]) -> bool:
        """It is differentiated, which a hook of it tells; whether by parameters. Another derivative, as an attack's by
        the inputs, is no part of the training.

        follow   called before a derivative counts, with whether it goes into `.grad`; the pass that it is of
        """
        reach = _reached(self.trained)
        if reach is Reach.NONE:
            return False
        number = follow(self, reach is Reach.GRADS)
        self.passes[number] = Arrived(grad.detach(), reach is Reach.GRADS)
        self.without = frozenset()
        return True


class Arrived(NamedTuple):
    """What arrived at a loss in a backward pass, and whether the gradients went into `.grad`."""

    slope: torch.Tensor
    into: bool


class Reach(Enum):
    """What a backward pass does with the derivatives by parameters."""

    GRADS = "adds them to .grad"
    ASKED = "hands them to who asked"
    NONE = "has no use for them"


def _reached(trained: Sequence[torch.Tensor]) -> Reach:
    """By the pass that is running."""
    try:
        nodes = (get_gradient_edge(p).node for p in trained if p.requires_grad)
        found = any(torch._C._will_engine_execute_node(node) for node in nodes)  # type: ignore[arg-type]
    except RuntimeError:  # `torch.autograd.grad` of parameters, of which it does not say
        return Reach.ASKED
    return Reach.GRADS if found else Reach.NONE


def stale(engine: Engine, shots: Sequence[Shot]) -> ValueError | None:
    """The model and the other ranks are followed before a step; what is to be raised where what waits for it is of a
    plan that is no more."""
    if engine.replan() and shots:
        return ValueError("the model's parameters changed between capture() and step(): capture the batch again")
    if engine.due and engine.core.comm.world > 1:  # one process has nobody to wait for, nor its device
        measured = {name for shot in shots for name in shot.found}
        engine.agree(measured, any(read(shot.n) > 0 for shot in shots), any(shot.part for shot in shots))
        engine.separate.check(engine)
    error = _two_ways([loss for shot in shots for loss in shot.losses], engine.plan.layers)
    if error is not None:
        engine.leave_word(error)
    return error


def _two_ways(losses: Sequence[Formed], now: Mapping[str, Layer]) -> ValueError | None:
    """What is to be raised where statistics are of layers that later forwards of the step have shown to be others."""
    measured = [pair for loss in losses if loss.slope is not None for pair in loss.layers.items()]
    others = {name: old for name, old in measured if not _same(old, now.get(name))}
    for name, old in others.items():
        paths = {*old.paths.values()}
        instead = [other for other, layer in now.items() if paths & {*layer.paths.values()}]
        if instead:  # else its parameters are in no layer any more
            shown = ", ".join(f"{other!r}, {_told(now[other])}" for other in instead)
            return ValueError(
                f"forwards of one step use {sorted(paths)} in different ways, which the first ones did not show: they "
                f"were measured as layer {name!r}, {_told(old)}, and are {shown}. The two do not add up, so no step "
                f"was taken: zero the gradients and take the whole step again, from its first forward. All that it "
                f"showed is known now"
            )
    return None


def _same(old: Layer, new: Layer | None) -> bool:
    """Whether statistics of one are statistics of the other: a gain is a bias with a slope of its own."""
    if new is None or new is old:
        return new is old
    biases = isinstance(old.kind, Bias) and isinstance(new.kind, Bias)
    kinds = old.kind.d == new.kind.d if biases else old.kind == new.kind
    return kinds and (old.paths, old.views) == (new.paths, new.views)


def _told(layer: Layer) -> str:
    kind: Any = layer.kind
    block = kind.block()
    sizes = f"{type(kind).__name__.lower()} of {block.d_out} x {block.d_in}"
    return sizes + (f" in {block.blocks} blocks" if block.blocks > 1 else "")
