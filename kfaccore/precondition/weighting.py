"""Methods that share coefficients: when they need no records, and what the shell multiplies output gradients by.

A method that is `Resting` takes, in the steps it rests, a gradient whose output gradients went through its `weighted`;
it then needs no record. So does a network-level method, whose `weighted` is on dicts. Under a rule that needs records
and the true gradient none ever rests.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

from kfaccore.method import OwnGradients, Resting, State, declares
from kfaccore.precondition.assigned import Assigned
from kfaccore.precondition.schedule import Schedules
from kfaccore.xp.arrays import Array


class Stepped(Protocol):
    """What is asked of its state."""

    @property
    def step(self) -> int | Array: ...

    @property
    def layers(self) -> dict[str, State]: ...

    @property
    def network(self) -> object: ...


Q = TypeVar("Q", bound=Stepped, contravariant=True)


class Stepping(Protocol[Q]):
    """What is asked of a Preconditioner here."""

    @property
    def assigned(self) -> Assigned: ...

    @property
    def schedules(self) -> Schedules: ...

    def resting(self, state: Q) -> set[str]: ...


def own_gradients(pre: Stepping) -> bool:
    """Whether a method's records must hold the training loss's own output gradients, not sampled ones."""
    return any(declares(method, OwnGradients) for method in pre.assigned.every())


def weighted(pre: Stepping[Q], state: Q, g: dict[str, Array], ids: Array | None = None) -> dict[str, Array]:
    """Output gradients {layer: (batch, [positions,] d_out)} for the weight gradients of the step to come.

    A shell forms each layer's weight gradient from these and passes the unchanged ones on to earlier layers. They are
    `g` itself unless a layer's method rests. ids (batch,) are dataset positions, for methods that go by them.
    """
    at_rest = pre.resting(state) & g.keys()
    if not at_rest:
        return g
    hypers = {name: pre.schedules.hyper(name, state.step) for name in at_rest}
    found = dict(g)
    for name in at_rest & state.layers.keys():
        method = pre.assigned.of(name)
        assert declares(method, Resting)
        found[name] = method.weighted(state.layers[name], g[name], hypers[name], ids)
    together = {name: g[name] for name in at_rest - state.layers.keys()}
    if together:
        whole: Any = pre.assigned.network  # Resting on dicts
        found |= whole.weighted(state.network, together, hypers, ids)
    return found
