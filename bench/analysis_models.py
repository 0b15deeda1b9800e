"""Networks that the analysis is tried on: random weights trained a little, the records of one batch in a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import kfaccore_torch as kt


class Detector(nn.Sequential):
    """A CNN with PReLU of 100,000 parameters, on crops of 24 by 24."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(3, 28, 3), nn.PReLU(28), nn.MaxPool2d(3, 2, ceil_mode=True)),
            *(nn.Conv2d(28, 48, 3), nn.PReLU(48), nn.MaxPool2d(3, 2, ceil_mode=True)),
            *(nn.Conv2d(48, 64, 2), nn.PReLU(64), nn.Flatten()),
            *(nn.Linear(576, 128), nn.PReLU(128), nn.Linear(128, 2)),
        )


class Recurrent(nn.Module):
    """A GRU made of Linear, over 256 words, that says the next one."""

    def __init__(self, words: int = 1000, width: int = 128) -> None:
        super().__init__()
        self.table = nn.Embedding(words, width)
        self.gates = nn.ModuleDict({name: nn.Linear(2 * width, width) for name in ("r", "z", "n")})
        self.head = nn.Linear(width, words)
        self.width = width

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        h = x.new_zeros(len(ids), self.width)
        found = []
        for t in range(ids.shape[1]):
            both = torch.cat([x[:, t], h], 1)
            reset = torch.sigmoid(self.gates["r"](both))
            update = torch.sigmoid(self.gates["z"](both))
            new = torch.tanh(self.gates["n"](torch.cat([x[:, t], reset * h], 1)))
            h = (1 - update) * new + update * h
            found.append(h)
        return self.head(torch.stack(found, 1)).transpose(1, 2)  # classes second, as torch's loss has them


class Shared(nn.Module):
    """A transformer whose one block is passed 12 times, as ALBERT's."""

    def __init__(self, words: int = 1000, small: int = 128, width: int = 768, heads: int = 12) -> None:
        super().__init__()
        self.heads = heads
        self.table = nn.Embedding(words, small)
        self.up = nn.Linear(small, width)
        self.projections = nn.ModuleDict({name: nn.Linear(width, width) for name in ("q", "k", "v", "out")})
        self.first = nn.Linear(width, 4 * width)
        self.second = nn.Linear(4 * width, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.head = nn.Linear(width, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.up(self.table(ids))
        for _ in range(12):
            q, k, v = (self._split(self.projections[name](x)) for name in ("q", "k", "v"))
            mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = self.norms[0](x + self.projections["out"](mixed))
            x = self.norms[1](x + self.second(nn.functional.gelu(self.first(x))))
        return self.head(x[:, 0])

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class Deep(nn.Sequential):
    """A CNN of 12 layers with 1.2 GB of factors and their inverses in float32."""

    def __init__(self) -> None:
        widths = (64, 64, 128, 128, 256, 512, 512, 512, 512, 512, 512)
        layers: list[nn.Module] = []
        last = 3
        for index, width in enumerate(widths):
            layers += [nn.Conv2d(last, width, 3, padding=1), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if index in (1, 3, 5, 7) else []
            last = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, 10))


def words(examples: int, length: int) -> torch.Tensor:
    return torch.randint(0, 1000, (examples, length))


def image_task(model: nn.Module, size: int, classes: int, examples: int) -> tuple[Any, ...]:
    return model, torch.randn(examples, 3, size, size), torch.randint(0, classes, (examples,))


def language_task() -> tuple[Any, ...]:
    ids = words(4, 257)
    return Recurrent(), ids[:, :-1], ids[:, 1:]


NETWORKS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "detector": lambda: image_task(Detector(), 24, 2, 32),
    "recurrent": language_task,
    "shared": lambda: (Shared(), words(4, 32), torch.randint(0, 3, (4,))),
    "deep": lambda: image_task(Deep(), 32, 10, 16),
}


def write(name: str, folder: Path, steps: int = 10) -> Path:
    """The file of one network after a few steps of Adam."""
    torch.manual_seed(0)
    model, x, y = NETWORKS[name]()
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    path = folder / f"{name}.safetensors"
    kt.save_records(path, model, nn.CrossEntropyLoss(), x, y)
    return path
