"""A GradScaler that is not unscaled by hand: the step comes before `scaler.step`, which still sees what overflows."""

import torch
from torch import nn

import kfaccore as kf
from kfaccore_torch import Optimizer, Preconditioner
from kfaccore_torch.examples.digits import data, mlp, right


def main(steps: int = 40, first: float = 2.0**60) -> tuple[float, float]:
    """Share of digits classified correctly, and the scale that is left of one that is far too high."""
    model = mlp()
    x, y = data()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=first, backoff_factor=2.0**-8)
    pre = Preconditioner(model, nn.CrossEntropyLoss(), kf.Preconditioner(kf.KFAC(), clocks=kf.Clocks(2, 10)))
    for _ in range(steps):
        rows = torch.randint(len(x), (256,))
        sgd.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            with pre.capture():
                f = model(x[rows])
            loss = pre.loss(f, y[rows])
        scaler.scale(loss).backward()
        pre.step()
        scaler.step(sgd)
        scaler.update()
    return right(model, x, y), scaler.get_scale()


def whole(steps: int = 20) -> float:
    """The same with the object that takes the whole step: the scaler is its own to use."""
    model, (x, y) = mlp(), data()
    optimizer = Optimizer(model, nn.CrossEntropyLoss(), scaler=torch.amp.GradScaler("cpu"))
    for _ in range(steps):
        rows = torch.randint(len(x), (256,))
        with torch.autocast("cpu", dtype=torch.float16):
            optimizer.step(x[rows], y[rows])
    return right(model, x, y)
