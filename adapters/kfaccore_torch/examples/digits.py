"""What the loops beside this file train on: handwritten digits, and two small networks."""

import torch
from sklearn.datasets import load_digits
from torch import nn


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """1,797 images as 64 numbers between 0 and 1, and their digits."""
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)


def mlp() -> nn.Sequential:
    """64 numbers to 10 classes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(inplace=True), nn.Linear(64, 10))


def cnn() -> nn.Sequential:
    """Images of 8 x 8 to 10 classes."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 10),
    )


def right(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Share of digits classified correctly."""
    model.eval()
    with torch.no_grad():
        share = float((model(x).argmax(1) == y).float().mean())
    model.train()
    return share
