"""A user's loss that keeps something: a centre of what it has seen, a count, random numbers that it draws.

The training value moves it, once a step. The loss is asked more often than that: for n, for draws, for the loss after
the step. What is asked at a prediction finds all as the training value at it did, and leaves all as it was. So it is
with the target, which a loss may write to; but that n is of the target that the value left, as the value's own is.

What a loss moves is found at its first, second, fourth, eighth and so on value; only that is copied at the others, and
the target, which it may first write to in any batch.
"""

from __future__ import annotations

import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from kfaccore_torch.contents import CONTAINERS, changed, kept_as_is, written
from kfaccore_torch.handed import version
from kfaccore_torch.held import walked
from kfaccore_torch.losses import Joined
from kfaccore_torch.own_objective import Own
from kfaccore_torch.replay import random_state
from kfaccore_torch.split import Split

_RANDOM = "random numbers"
_TARGET = "target"
_LARGE = 1 << 20  # numbers of a target that is copied only where it was written to before


def keeping(objective: Any) -> Any:
    """The same objective, of whose losses those that a user wrote move what they keep once a step."""
    parts = objective.parts.values() if isinstance(objective, Joined) else [objective]
    own = [part.loss for part in parts if isinstance(part, Own)]
    return Keeping(objective, own) if own else objective


def again(objective: Any, f: Any, target: Any) -> torch.Tensor:
    """The training loss, of a second look."""
    return objective.again(f, target) if isinstance(objective, Keeping) else objective.value(f, target)


class Keeping:
    """An objective, and what the `losses` in it keep."""

    def __init__(self, of: Any, losses: Sequence[Any]) -> None:
        self.of = of
        self.losses = list(losses)
        self.turn = 0
        self.moved: set[str] = set()
        self._first: list[
            tuple[str, Callable]
        ] = []  # what puts all that moves back to where the last training value found it
        self._at: Any = None  # the prediction of that

    @property
    def total(self) -> bool:
        """Whether the loss is a sum, whose n does not grow with the batch."""
        return self.of.total

    def nonnegative(self, target: Any) -> bool | None:
        """Whether the loss cannot be below 0, None where that is not known."""
        return self.of.nonnegative(target)

    def heads(self, f: Any) -> list[torch.Tensor]:
        """The tensors of a prediction."""
        return self.of.heads(f)

    def value(self, f: Any, target: Any) -> torch.Tensor:
        """The training loss: what it moves stays moved."""
        self.turn += 1
        head = self.of.heads(f)[0]
        before = self._copies(head.device, target, first=True)
        value = self.of.value(f, target)
        self._note(before)
        self._first = [(path, put) for path, put, _ in before if path in self.moved]
        self._at = weakref.ref(head)
        return value

    def again(self, f: Any, target: Any) -> torch.Tensor:
        """The training loss, of a second look at the batch of the last `value`, by who puts back the batch."""
        with self._aside(self.of.heads(f)[0].device, None, True, False):
            return self.of.value(f, target)

    def share(self, f: Any, target: Any) -> float:
        """n of a record of this batch."""
        with self._beside(f, target, False):
            return self.of.share(f, target)

    def unread_share(self, f: Any, target: Any) -> torch.Tensor | None:
        """`share` as a number on the device; None where the host knows it."""
        with self._beside(f, target, False):
            return self.of.unread_share(f, target)

    def draws(
        self, fisher: Callable, count: int, f: Any, target: Any, rng: Any, split: Split | None = None
    ) -> torch.Tensor | list[torch.Tensor]:
        """Of the loss that the training value at this prediction was of."""
        with self._beside(f, target, True):
            return self.of.draws(fisher, count, f, target, rng, split)

    def _beside(self, f: Any, target: Any, back: bool) -> Any:
        """Around a question at a prediction; `back` to the target as it was before the value."""
        head = self.of.heads(f)[0]
        return self._aside(head.device, target, self._at is not None and self._at() is head, back)

    @contextmanager
    def _aside(self, device: torch.device, target: Any, first: bool, back: bool) -> Iterator[None]:
        """All is as it was afterwards; it begins as the `first` look found it where that is wanted, the target too if
        that has to go `back`."""
        before = self._copies(device, target)
        with ExitStack() as versions:
            for _, put, _ in before:  # the value's graph may hold what is written to here, and put back
                written_to = [x for x in put.args[:1] if isinstance(x, torch.Tensor) and not x.is_inference()]
                for x in written_to:
                    versions.enter_context(torch.autograd._unsafe_preserve_version_counter(x))
            if first:
                with torch.no_grad():
                    for path, put in self._first:
                        if back or not path.startswith(_TARGET):
                            put()
            try:
                yield
            finally:
                self._note(before)
                with torch.no_grad():
                    for path, put, _ in before:
                        if path in self.moved:
                            put()

    @property
    def _watch(self) -> bool:
        return self.turn & (self.turn - 1) == 0

    def _copies(
        self, device: torch.device, target: Any, first: bool = False
    ) -> list[tuple[str, partial, Callable[[], bool]]]:
        """(path, what puts it back, whether it has changed), of all that may move, or of what is known to; of all of
        the target if it is looked at `first`."""
        if not (self._watch or self.moved or first):
            return []
        things = list(walked(self.losses)) if self._watch or self.moved else []
        copies: list[tuple[str, partial, Callable[[], bool]]] = []
        for path, x in (*things, *walked({_TARGET: target})):
            known = self._watch or path in self.moved
            told = path.startswith(_TARGET)
            if not (known or (told and first)):
                continue
            if isinstance(x, torch.Tensor) and not isinstance(x, nn.Parameter):
                kept = known or x.numel() <= _LARGE
                put = partial(written, x, x.detach().clone()) if kept else partial(_late, path)
            elif isinstance(x, np.ndarray | CONTAINERS):
                put = kept_as_is(x)
            else:
                continue
            told = told and isinstance(x, torch.Tensor)  # y[y == 255] = -100 may find none today
            copies.append((path, put, partial(_written, x, version(x)) if told else partial(changed, *put.args)))
        if self._watch or _RANDOM in self.moved:
            puts = random_state(things, device)
            state = _pickled(puts) if self._watch else None
            copies.append((_RANDOM, partial(_all, puts), lambda: _pickled(random_state(things, device)) != state))
        return copies

    def _note(self, before: Sequence[tuple[str, partial, Callable[[], bool]]]) -> None:
        fresh = [one for one in before if one[0] not in self.moved]
        self.moved |= {path for path, _, moves in fresh if (self._watch or path.startswith(_TARGET)) and moves()}

    def __getstate__(self) -> dict[str, Any]:
        """Without the last look."""
        return {**self.__dict__, "_first": [], "_at": None}


def _late(path: str) -> None:
    warnings.warn(
        f"this loss has written to {path}, a large tensor, as in no batch before: draws of this batch are of what it "
        f"left there. From now on a copy is made. Write to a tensor of the loss's own, target = target.clone()",
        stacklevel=2,
    )


def _written(x: torch.Tensor, before: int) -> bool:
    return version(x) != before


def _pickled(puts: Sequence[Any]) -> list[bytes]:
    """The states of generators, as they are now."""
    return [pickle.dumps(put.args) for put in puts]


def _all(puts: Sequence[Callable]) -> None:
    for put in puts:
        put()
