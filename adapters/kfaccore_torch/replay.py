"""A second look at a batch: the same random numbers, and all that the forward moved as it was."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from kfaccore_torch.held import as_it_was, held

Undo = Callable[[], Any]


def random_state(model: nn.Module, device: torch.device) -> list[Undo]:
    """What puts each random generator back to where it is now: those of torch on the CPU and on a CUDA device, of
    Python and NumPy, and the ones that modules hold."""
    found: list[Undo] = [
        partial(torch.set_rng_state, torch.get_rng_state()),
        partial(random.setstate, random.getstate()),
        partial(np.random.set_state, np.random.get_state()),
    ]
    if device.type == "cuda":
        found.append(partial(torch.cuda.set_rng_state, torch.cuda.get_rng_state(device), device))
    return found + [undo for x in held(model) if (undo := _generator(x)) is not None]


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
    model: nn.Module, before: list[Undo], device: torch.device, after: Sequence[Undo] = (), graph: bool = False
) -> Iterator[None]:
    """The same forward as one that found all as in `before`, with a graph where it asks for one; random generators and
    all that modules hold are as they were afterwards, and what `after` puts back."""
    now = [*random_state(model, device), *after]
    try:
        with as_it_was(model):
            for undo in before:
                undo()
            with torch.set_grad_enabled(graph or torch.is_grad_enabled()):
                yield
    finally:
        for undo in now:
            undo()
