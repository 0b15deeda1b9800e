"""Gradient accumulation, clipping before and after the step, and a schedule of the rate."""

import torch
from torch import nn

import kfaccore as kf
from kfaccore_torch import Preconditioner
from kfaccore_torch.examples.digits import data, mlp, right


def main(steps: int = 40, parts: int = 4) -> float:
    """Share of digits classified correctly after `steps` batches of 256 in `parts` micro-batches."""
    model = mlp()
    x, y = data()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(sgd, 0.2, steps)
    pre = Preconditioner(model, nn.CrossEntropyLoss(), kf.Preconditioner(kf.KFAC(), clocks=kf.Clocks(2, 10)))
    for _ in range(steps):
        sgd.zero_grad()
        for rows in torch.randint(len(x), (256,)).chunk(parts):
            with pre.capture():  # a capture each; their statistics add
                f = model(x[rows])
            (pre.loss(f, y[rows]) / parts).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)  # bounds the gradient
        pre.step()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # bounds the direction
        sgd.step()
        schedule.step()
    return right(model, x, y)


if __name__ == "__main__":
    print(f"{main():.1%} of the digits")
