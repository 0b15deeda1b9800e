"""Autocast and a GradScaler around K-FAC: unscale, then step; factors stay in float32."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import kfaccore as kf
from kfaccore_torch import Preconditioner


def main(steps: int = 60, dtype: torch.dtype = torch.bfloat16) -> float:
    """Share of digits classified correctly after `steps` batches of 256."""
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    pre = Preconditioner(model, nn.CrossEntropyLoss(), kf.Preconditioner(kf.KFAC(), clocks=kf.Clocks(2, 10)))
    for _ in range(steps):
        rows = torch.randint(len(x), (256,))
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            with pre.capture():
                f = model(x[rows])
            loss = pre.loss(f, y[rows])
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        pre.step()
        scaler.step(optimizer)
        scaler.update()
    return float((model(x).argmax(1) == y).float().mean())


if __name__ == "__main__":
    print(f"{main():.1%} of the digits")
