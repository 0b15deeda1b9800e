"""Whether a method has begun to move its averages in their own buffers: what fails from there on leaves neither the old
ones nor the new."""

from __future__ import annotations

from contextvars import ContextVar

_MOVES = ContextVar("moves", default=False)  # in this thread


def still() -> None:
    """A group of layers is begun."""
    _MOVES.set(False)


def moves(donate: bool) -> None:
    """A method's update is called, which may reuse its state's buffers if `donate`."""
    if donate:
        _MOVES.set(True)


def moved() -> bool:
    """Whether that has been, of the group that was begun last."""
    return _MOVES.get()
