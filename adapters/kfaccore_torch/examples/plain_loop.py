"""A plain training loop on digits with K-FAC directions under SGD: the four lines marked `+` are all that is new."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import kfaccore as kf
from kfaccore_torch import Preconditioner


def main(steps: int = 60) -> float:
    """Share of digits classified correctly after `steps` batches of 256."""
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(inplace=True), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    core = kf.Preconditioner(kf.KFAC(), clocks=kf.Clocks(update=2, refresh=10))
    pre = Preconditioner(model, nn.CrossEntropyLoss(), core)  # +
    for _ in range(steps):
        rows = torch.randint(len(x), (256,))
        optimizer.zero_grad()
        with pre.capture():  # +
            f = model(x[rows])
        loss = pre.loss(f, y[rows])  # + in place of criterion(f, y)
        loss.backward()
        pre.step()  # +
        optimizer.step()
    return float((model(x).argmax(1) == y).float().mean())


if __name__ == "__main__":
    print(f"{main():.1%} of the digits")
