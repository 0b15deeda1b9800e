"""Tasks for torch optimizers, each with a target: digits, curves and a language of characters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from sklearn.datasets import load_digits
from torch import nn

from kfaccore_numpy.tasks import curves
from kfaccore_torch.examples.char_transformer import Transformer, text


@dataclass(frozen=True)
class Task:
    """model() -> network; batch(generator) -> (x, y); figure(model) -> what is looked at, reached at `target` or below.

    A task without a target, None, is `steps` long and compared by its last figure.
    """

    model: Callable[[], nn.Module]
    loss: nn.Module
    batch: Callable[[torch.Generator], tuple]
    figure: Callable[[nn.Module], float]
    target: float | None
    steps: int
    every: int = 5


class ViT(nn.Module):
    """8 x 8 digits as 16 patches of 2 x 2."""

    def __init__(self, d: int = 48) -> None:
        super().__init__()
        self.patches, self.places = nn.Linear(4, d), nn.Embedding(16, d)
        block = nn.TransformerEncoderLayer(d, 4, 2 * d, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.reshape(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        return self.head(self.norm(self.blocks(self.patches(x) + self.places(torch.arange(16)))).mean(1))


def autoencoder(sizes: tuple[int, ...]) -> nn.Module:
    layers = [x for i, o in pairwise(sizes) for x in (nn.Linear(i, o), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


DIGITS = (64, 128, 64, 32, 10, 32, 64, 128, 64)
CURVES = (784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784)


def cnn() -> nn.Module:
    convs = (nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU())
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *convs, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10))


def _chosen(rows: torch.Tensor, size: int, x: torch.Tensor, y: torch.Tensor) -> Callable:
    """Batches of `size` among `rows`."""

    def batch(rng: torch.Generator) -> tuple:
        chosen = rows[torch.randint(len(rows), (size,), generator=rng)]
        return x[chosen], y[chosen]

    return batch


def _half_squares(x: torch.Tensor) -> Callable:
    """Half the squared error an example, of all of them."""
    return lambda model: float(((model(x) - x) ** 2).sum() / len(x) / 2)


def digits() -> dict[str, Task]:
    """Autoencoders of four batch sizes to 0.23, a CNN to 98 and 99 % and a ViT to 97 % test accuracy."""
    found = load_digits(return_X_y=True)
    x = torch.tensor(found[0], dtype=torch.float32) / 16
    y = torch.tensor(found[1])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train = order[:1437]
    test = order[1437:]

    def wrong(model: nn.Module) -> float:
        return float((model(x[test]).argmax(1) != y[test]).float().mean())

    hard = nn.CrossEntropyLoss()
    every = torch.arange(len(x))
    half = _half_squares(x)
    ae = {64: 800, 128: 600, 512: 2500}
    tasks = {
        f"autoencoder, {size}": Task(
            lambda: autoencoder(DIGITS), nn.MSELoss(), _chosen(every, size, x, x), half, 0.23, steps
        )
        for size, steps in ae.items()
    }
    tasks["autoencoder, full"] = Task(lambda: autoencoder(DIGITS), nn.MSELoss(), lambda rng: (x, x), half, 0.23, 200)
    images = _chosen(train, 256, x, y)
    tasks["cnn"] = Task(cnn, hard, images, wrong, 0.02, 300)
    tasks["cnn, 99 %"] = Task(cnn, hard, images, wrong, 0.01, 1000)
    tasks["vit"] = Task(ViT, hard, images, wrong, 0.03, 600)
    return tasks


def language() -> dict[str, Task]:
    """A character transformer: held-out nats of 2.4 with 16 rows of 64, of 2.2 and 1.7 with 64 rows."""
    data, characters = text()
    held = data[-8192:].reshape(128, 64)
    data = data[:-8192]

    def rows(size: int) -> Callable:
        def batch(rng: torch.Generator) -> tuple:
            found = data[torch.randint(len(data) - 65, (size, 1), generator=rng) + torch.arange(65)]
            return found[:, :-1], found[:, 1:]

        return batch

    def nats(model: nn.Module) -> float:
        return float(nn.functional.cross_entropy(model(held[:, :-1]), held[:, 1:]))

    def task(size: int, target: float, steps: int) -> Task:
        return Task(lambda: Transformer(characters), nn.CrossEntropyLoss(), rows(size), nats, target, steps)

    return {
        "transformer, 16 rows": task(16, 2.4, 300),
        "transformer": task(64, 2.2, 200),
        "transformer, 1.7 nats": task(64, 1.7, 800),
    }


def curved() -> dict[str, Task]:
    """The curves stand-in, batch 512: the loss after 200 steps."""
    x = torch.tensor(curves())
    batch = _chosen(torch.arange(len(x)), 512, x, x)
    return {"curves": Task(lambda: autoencoder(CURVES), nn.MSELoss(), batch, _half_squares(x), None, 200)}
