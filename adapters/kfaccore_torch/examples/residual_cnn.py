"""A small residual network with batch norm on digits, trained by the optimizer that sets its own step."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.swa_utils import update_bn

from kfaccore_torch import Optimizer


class Residual(nn.Module):
    """x + convolutions(x)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.body(x))


def network(channels: int = 16) -> nn.Module:
    """8 x 8 digits to 10 classes."""
    stem = nn.Conv2d(1, channels, 3, padding=1)
    down = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
    head = (nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * channels, 10))
    return nn.Sequential(stem, nn.ReLU(), Residual(channels), down, nn.ReLU(), Residual(2 * channels), *head)


def main(steps: int = 30) -> float:
    """Share of digits classified correctly after `steps` batches of 256."""
    torch.manual_seed(0)
    images, y = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(y)
    model = network()
    optimizer = Optimizer(model, nn.CrossEntropyLoss())
    for _ in range(steps):
        rows = torch.randint(len(x), (256,))
        optimizer.step(x[rows], y[rows])
    # running variances begin at 1 and keep .9 of that a step: after few steps they are far from those of the model
    update_bn(x.split(256), model)
    return float((model.eval()(x).argmax(1) == y).float().mean())


if __name__ == "__main__":
    print(f"{main():.1%} of the digits")
