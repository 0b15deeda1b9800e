"""Whether gradients that were set aside by `zero_grad` are in those of the step.

A loop that throws a gradient away and one that keeps a copy, to add it up with others by itself, do the same to `.grad`
until the step; there the gradients are what the last backward pass left, or they are made of those before too. What
they are made of is found from some of their elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kfaccore_torch.unusual import dense

if TYPE_CHECKING:
    from kfaccore_torch.formed import Arrived, Formed

_MOST = 64  # elements of a parameter
Sample = Mapping[torch.Tensor, torch.Tensor]  # parameter -> some elements of its gradient
Array = np.ndarray[Any, Any]


@dataclass
class Taken:
    """What is taken from a loss: backward passes, with what arrived at it, or layers alone."""

    loss: Formed
    passes: dict[int, Arrived]
    layers: frozenset[str] = frozenset()

    @classmethod
    def whole(cls, loss: Formed, before: float = math.inf) -> Taken:
        """All that went into `.grad`, `before` a pass."""
        passes = {number: arrived for number, arrived in loss.passes.items() if arrived.into and number < before}
        return cls(loss, passes)

    @classmethod
    def partly(cls, loss: Formed, gone: set[int]) -> Taken:
        """The layers whose parameters, by id, are all among those `gone`, of a loss that went into `.grad`."""
        into = any(arrived.into for arrived in loss.passes.values())
        layers = loss.layers.items() if into else ()
        names = (name for name, layer in layers if all(id(p) in gone for p in layer.parameters.values()))
        return cls(loss, {}, frozenset(names) - loss.without)

    def out(self) -> Taken:
        """It does not count, as if the loss had not been differentiated there."""
        for number in self.passes:
            self.loss.passes.pop(number, None)
        self.loss.without |= self.layers
        return self

    def back(self) -> None:
        """It counts after all, beside what the loss has been differentiated for since."""
        self.loss.passes.update(self.passes)
        self.loss.without -= self.layers


def moves(trained: Iterable[torch.Tensor]) -> int:
    """How often parameters have been written to, as far as autograd knows."""
    return sum(p._version for p in trained)


@dataclass
class Thrown:
    """What was taken from losses whose gradients were set aside together.

    sample  of the gradients; None where they were written over
    moves   how often parameters had been written to
    asked   whether the loop asked for them: they never were in `.grad`
    """

    taken: list[Taken]
    sample: Sample | None
    moves: int
    asked: bool = False

    def bring_back(self) -> None:
        """They count after all."""
        for one in self.taken:
            one.back()


class Sampler:
    """Elements of the gradients that a backward pass hands to who asked for them, which are in no `.grad`: by hooks,
    until it is closed."""

    def __init__(self, trained: Sequence[torch.Tensor]) -> None:
        self._found: dict[torch.Tensor, torch.Tensor] = {}
        self._handles = [p.register_hook(partial(self._note, p)) for p in trained if p.requires_grad]

    def _note(self, p: torch.Tensor, grad: torch.Tensor) -> None:
        self._found[p] = _spread(grad)

    def close(self) -> Sample:
        """What was seen."""
        for handle in self._handles:
            handle.remove()
        return self._found


def sampled(gradients: Iterable[tuple[torch.Tensor, torch.Tensor, int]]) -> Sample:
    """Elements that are spread over each gradient, copies; nothing waits for a device."""
    return {p: _spread(grad) for p, grad, _ in gradients}


def _spread(grad: torch.Tensor) -> torch.Tensor:
    flat = dense(grad.detach()).reshape(-1)
    return flat[:: max(1, len(flat) // _MOST)].clone()


def used(now: Sample, last: Sample, before: Sequence[Sample | None]) -> tuple[list[bool], bool]:
    """Whether the `last` gradients, and each of those `before`, are in those of `now`, which are sums of multiples of
    them, for the whole or by parameter, elements at a common bound apart; and whether that is so: else all that are
    finite may be.

    Those of the last alone are never longer: they were clipped, or unscaled.
    """
    known = [i for i, sample in enumerate(before) if sample is not None and _finite(sample)]
    columns = [last, *(before[i] or {} for i in known)]
    parts = [_columns(p, now[p], columns) for p in now]
    if not any(y.any() for _, y in parts):
        return [True] + [False] * len(before), True
    slack = max(max(16 * torch.finfo(g.dtype).eps for g in now.values()), 1e-10)
    together = [(np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts]))]
    for alone in (True, False):
        for groups in (together, parts):
            for clipped in (False, True):
                found = _made_of([(x[:, :1] if alone else x, y) for x, y in groups], clipped, slack)
                if found is None or (alone and not (np.abs(found[:, 0] - 0.5) <= 0.5 + slack).all()):
                    continue
                seen = np.abs(found[:, 1:]).max(0) > 10 * slack
                there = {known[i] for i, one in enumerate(seen[1:]) if one}
                return [bool(seen[0]), *(i in there for i in range(len(before)))], True
    return [True, *(sample is None or i in known for i, sample in enumerate(before))], False


def _finite(sample: Sample) -> bool:
    return all(bool(x.isfinite().all()) for x in sample.values())


def _columns(p: torch.Tensor, now: torch.Tensor, columns: Sequence[Sample]) -> tuple[Array, Array]:
    """(elements, gradients) and (elements,), those that are finite."""
    y = now.double().cpu().numpy()
    there = [s.get(p) for s in columns]
    x = np.stack([np.zeros_like(y) if g is None else g.double().cpu().numpy() for g in there], 1)
    rows = np.isfinite(y) & np.isfinite(x[:, 0])
    return x[rows], y[rows]


def _made_of(groups: list[tuple[Array, Array]], clipped: bool, slack: float) -> Array | None:
    """(groups, 1 + gradients): what the last one is multiplied by, and the part that each is of the whole. None where
    some group is no sum of them, or none has enough elements to tell."""
    found = []
    for x, y in groups:
        inside = np.abs(y) < np.abs(y).max(initial=0.0) if clipped else np.ones(len(y), bool)
        inside &= (x != 0).any(1) | (y != 0)
        x, y = x[inside], y[inside]
        if len(y) <= x.shape[1]:
            continue
        length = np.linalg.norm(x, axis=0)
        length[length == 0] = 1.0
        shares = np.linalg.lstsq(x / length, y, rcond=None)[0]
        whole = np.linalg.norm(y) + np.abs(shares).sum()
        if np.linalg.norm(x / length @ shares - y) > slack * whole:
            return None
        found.append(np.concatenate([shares[:1] / length[:1], shares / (whole or 1.0)]))
    return np.stack(found) if found else None
