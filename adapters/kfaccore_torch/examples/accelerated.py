"""Hugging Face Accelerate with K-FAC: prepare as ever, hand the prepared model over, step where gradients are whole."""

import torch
from accelerate import Accelerator
from torch import nn

import kfaccore as kf
from kfaccore_torch import Preconditioner
from kfaccore_torch.examples.toys import loader, points


def main(epochs: int = 6, accumulation: int = 2) -> float:
    """Share of points classified correctly."""
    x, y = points()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    model, optimizer, batches = accelerator.prepare(net, sgd, loader(64 // accumulation))
    core = kf.Preconditioner(kf.KFAC(), clocks=kf.Clocks(update=2, refresh=10))
    pre = Preconditioner(model, nn.CrossEntropyLoss(), core)
    for _ in range(epochs):
        for inputs, labels in batches:
            with accelerator.accumulate(model):
                with pre.capture():
                    f = model(inputs)
                accelerator.backward(pre.loss(f, labels))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    pre.step()
                optimizer.step()
                optimizer.zero_grad()
    return float((net(x).argmax(1) == y).float().mean())


if __name__ == "__main__":
    print(f"{main():.1%} of the points")
