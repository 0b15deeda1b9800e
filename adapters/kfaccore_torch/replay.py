"""A second look at a batch: the same random numbers, and all that the forward moved as it was."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from kfaccore_torch.held import Undo, as_found, as_it_was, walked
from kfaccore_torch.plan import unwrapped

Things = list[tuple[str, Any]]
_NO_GENERATORS = frozenset({dict, list, tuple, OrderedDict, torch.Tensor})  # what modules hold most of


def found(model: nn.Module, device: torch.device, known: dict[str, bool]) -> list[Undo]:
    """What puts all that a forward may move back as it is now, for another look: random generators and what modules
    hold. `known` as of `as_found`."""
    things = list(walked(unwrapped(model)))
    return [*random_state(things, device), *as_found(model, things, known)]


def random_state(things: Things, device: torch.device) -> list[Undo]:
    """What puts each random generator back to where it is now: those of torch on the CPU and on a CUDA device, of
    Python and NumPy, and the ones among the `things` that modules hold."""
    state: list[Undo] = [
        partial(torch.set_rng_state, torch.get_rng_state()),
        partial(random.setstate, random.getstate()),
        partial(np.random.set_state, np.random.get_state()),
    ]
    if device.type == "cuda":
        state.append(partial(torch.cuda.set_rng_state, torch.cuda.get_rng_state(device), device))
    others = (x for _, x in things if type(x) not in _NO_GENERATORS)
    return state + [undo for x in others if (undo := _generator(x)) is not None]


def _generator(x: Any) -> Undo | None:
    if isinstance(x, torch.Generator):
        return partial(x.set_state, x.get_state())
    if isinstance(x, random.Random):
        return partial(x.setstate, x.getstate())
    if isinstance(x, np.random.RandomState):
        return partial(x.set_state, x.get_state())
    if isinstance(x, np.random.Generator):
        return partial(setattr, x.bit_generator, "state", x.bit_generator.state)
    return None


@contextmanager
def replayed(
    model: nn.Module,
    before: list[Undo],
    device: torch.device,
    after: Sequence[Undo] = (),
    graph: bool = False,
    left: bool = False,
) -> Iterator[None]:
    """The same forward as one that found all as in `before`, with a graph where it asks for one; random generators and
    all that modules hold are as they were afterwards, and what `after` puts back.

    left   whether modules begin with what they hold now
    """
    things = list(walked(unwrapped(model)))
    now = [*random_state(things, device), *after]
    try:
        with as_it_was(model, things) as held:
            for undo in (*before, *(held if left else ())):
                undo()
            with torch.set_grad_enabled(graph or torch.is_grad_enabled()):
                yield
    finally:
        for undo in now:
            undo()
