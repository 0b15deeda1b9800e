"""Refreshes in steps: where a method hands its matrices out, those of all layers are worked on together."""

from __future__ import annotations

from typing import ClassVar, Generic

from kfaccore.method import Hyper, Method, Refreshing, S, Stats, declares
from kfaccore.xp.asking import Asks, alone


class InSteps(Generic[S]):
    """Base of methods that write their refresh as `refreshing`; run alone it is `refresh`.

    A class that overrides `refresh` itself no longer declares `Refreshing`, so that what it says is what is done.
    """

    in_steps: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.in_steps = cls.refresh is InSteps.refresh

    def refreshing(self, state: S, hyper: Hyper) -> Asks[S]:
        """The state after a refresh: a generator that yields what it asks for and is sent the answers."""
        raise NotImplementedError

    def refresh(self, state: S, hyper: Hyper) -> S:
        """Refresh clock: inverses from averages; writes `code` into the state."""
        return alone(self.refreshing(state, hyper))


def steps(method: Method[S, Stats], state: S, hyper: Hyper) -> Asks[S]:
    """A method's refresh as a caller of `lockstep`, which asks for nothing where the method does not hand out."""
    if declares(method, Refreshing):
        return (yield from method.refreshing(state, hyper))
    return method.refresh(state, hyper)
