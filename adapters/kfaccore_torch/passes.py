"""Backward passes through the user's graph that are not the user's: of draws, and of what is asked of autograd.

The hooks of the graph run in them. Tensors that retain their gradient (`retain_grad`) have the one they had afterwards;
a hook that notes gradients can ask `drawing()`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from kfaccore_torch.beside import Quiet

_LOCK = threading.Lock()
_RUNNING = [0]  # passes in progress: a device runs hooks in threads of its own


def drawing() -> bool:
    """Whether a backward pass in progress is one of kfaccore's own, of a draw or a question: for hooks on tensors and
    modules, whose gradient then is not the loss's. One answer for all threads of a process."""
    return _RUNNING[0] > 0


@contextmanager
def passing(quiet: Quiet) -> Iterator[None]:
    """Around such a pass; `.grad` of tensors that retain it is put back, and what the pass would move beside."""
    before = [(x, x.grad) for x in quiet.retaining]
    with _LOCK:
        _RUNNING[0] += 1
    try:
        with quiet.around():
            yield
    finally:
        with _LOCK:
            _RUNNING[0] -= 1
        for x, grad in before:
            x.grad = grad


class Made:
    """Tensors with a graph that a forward made, for as long as somebody holds them."""

    def __init__(self) -> None:
        self._seen: list[weakref.ref] = []

    def note(self, values: Iterable[Any]) -> None:
        """Arguments and outputs of an operation."""
        self._seen += [weakref.ref(x) for x in values if isinstance(x, torch.Tensor) and x.requires_grad]

    def held(self) -> list[torch.Tensor]:
        """Those that are still there."""
        return [x for x in (ref() for ref in self._seen) if x is not None]

    def retaining(self, heads: Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Those of them, and of `heads`, that retain their gradient."""
        held = [x for x in (*self.held(), *heads) if x.retains_grad]
        return tuple({id(x): x for x in held}.values())


def flat(values: Iterable[Any]) -> Iterator[Any]:
    """Arguments, those inside lists and tuples too."""
    for x in values:
        if isinstance(x, list | tuple):
            yield from flat(x)
        else:
            yield x
