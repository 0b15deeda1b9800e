"""A second look at a batch: the same random numbers, and running statistics as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from kfaccore_torch.plan import unwrapped


def random_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Torch's generators, of the CPU and of a CUDA device."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def replayed(model: nn.Module, random: tuple, device: torch.device) -> Iterator[None]:
    """The same dropout as in the step's own forward; running statistics are as they were afterwards."""
    buffers = [(b, b.detach().clone()) for b in unwrapped(model).buffers()]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.set_rng_state(random[0])
        if random[1] is not None:
            torch.cuda.set_rng_state(random[1], device)
        yield
    for buffer, kept in buffers:
        buffer.copy_(kept)
