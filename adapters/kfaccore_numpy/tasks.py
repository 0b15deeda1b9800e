"""Tasks of the command line: real digits, and generated curves as a stand-in for the CURVES set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kfaccore import Gaussian, SoftmaxCrossEntropy, Window
from kfaccore_numpy.activations import ReLU, Tanh
from kfaccore_numpy.conv import Conv2d
from kfaccore_numpy.dense import Dense, Flatten
from kfaccore_numpy.network import Sequential

Data = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Task:
    """A network, its loss and data: `load()` gives (training, evaluation) pairs of inputs and targets.

    rates   tuned constant rates of the baselines, the best of their grids
    """

    network: Sequential
    loss: Any
    load: Callable[[], tuple[Data, Data]]
    batch: int
    steps: int
    rates: dict[str, float]


def autoencoder(sizes: tuple[int, ...]) -> Sequential:
    """Dense layers with tanh between them; the last is linear."""
    layers = [layer for size in sizes[1:-1] for layer in (Dense(size), Tanh())]
    return Sequential((sizes[0],), (*layers, Dense(sizes[-1])))


def digits() -> tuple[np.ndarray, np.ndarray]:
    """1,797 images of 8 x 8 in [0, 1] as rows of 64, and their labels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install 'kfaccore[demo]'") from error
    found: Any = load_digits()
    return (found.data / 16.0).astype(np.float32), found.target.astype(np.int64)


def curves(count: int = 2000, size: int = 28, seed: int = 0) -> np.ndarray:
    """Images of random cubic Bezier curves drawn with a soft pen, as rows of size^2 in [0, 1]. A stand-in."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(3, size - 4, (count, 4, 2))
    t = np.linspace(0, 1, 40)[:, None]
    basis = np.concatenate([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], axis=1)
    path = basis @ points
    grid = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij"), axis=-1).reshape(-1, 2)
    nearest = np.stack([((grid[:, None, :] - p[None]) ** 2).sum(-1).min(1) for p in path])
    return np.exp(-nearest / 1.2).astype(np.float32)


def _same(x: np.ndarray) -> tuple[Data, Data]:
    return (x, x), (x, x)


def _split(images: bool) -> tuple[Data, Data]:
    x, y = digits()
    x = x.reshape(-1, 8, 8, 1) if images else x
    order = np.random.default_rng(0).permutation(len(x))
    train = order[:1437]
    test = order[1437:]
    return (x[train], y[train]), (x[test], y[test])


TASKS = {
    "digits-autoencoder": Task(
        network=autoencoder((64, 128, 64, 32, 10, 32, 64, 128, 64)),
        loss=Gaussian(),
        load=lambda: _same(digits()[0]),
        batch=512,
        steps=400,
        rates={"adam": 6e-3, "sgd": 3e-2},
    ),
    "digits-classifier": Task(
        network=Sequential((64,), (Dense(128), ReLU(), Dense(64), ReLU(), Dense(10))),
        loss=SoftmaxCrossEntropy(),
        load=lambda: _split(False),
        batch=256,
        steps=100,
        rates={"adam": 1e-2, "sgd": 1e-1},
    ),
    "digits-cnn": Task(
        network=Sequential(
            (8, 8, 1),
            (
                Conv2d(16, Window((3, 3), padding=1)),
                ReLU(),
                Conv2d(32, Window((3, 3), stride=2, padding=1)),
                ReLU(),
                Flatten(),
                Dense(10),
            ),
        ),
        loss=SoftmaxCrossEntropy(),
        load=lambda: _split(True),
        batch=256,
        steps=100,
        rates={"adam": 1e-2, "sgd": 1e-1},
    ),
    "curves-autoencoder": Task(
        network=autoencoder((784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784)),
        loss=Gaussian(),
        load=lambda: _same(curves()),
        batch=512,
        steps=200,
        rates={"adam": 3e-3, "sgd": 1e-3},
    ),
}
