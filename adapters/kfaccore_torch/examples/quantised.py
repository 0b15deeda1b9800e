"""Quantising a trained MLP to a few levels a weight: rounding alone, and with its errors made up for (GPTQ)."""

import numpy as np
import torch
from torch import nn

import kfaccore as kf
import kfaccore_torch as kt
from kfaccore.posterior import quantise


def main(steps: int = 200, levels: int = 3) -> list[float]:
    torch.manual_seed(0)
    x = torch.randn(500, 16) @ torch.randn(16, 16) / 4  # correlated inputs
    y = (x @ torch.randn(16, 4)).argmax(1)
    model, loss = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    mean = kt.matrices(model)
    found = {}
    for name, records in next(iter(kt.Stream(model, loss, [(x, y)], fisher=kf.forward_only))).items():
        W, a = np.asarray(mean[name]).reshape(records.d_out, records.d_in), records.rows()[0, :, 0]
        step = 2 * np.abs(W).max(1) / (2**levels - 1)
        grid = lambda column, step=step: np.round(column / step) * step  # noqa: E731
        A = a.T @ a / len(a) + 1e-2 * np.eye(W.shape[1], dtype=W.dtype)
        found[name] = (grid(W.T).T, quantise(W, A, grid))
    accuracies = [float((model(x).argmax(1) == y).float().mean())]
    for which in (0, 1):
        kt.assign(model, {name: pair[which] for name, pair in found.items()})
        accuracies.append(float((model(x).argmax(1) == y).float().mean()))
    print("accuracy: trained {:.3f}, rounded {:.3f}, compensated {:.3f}".format(*accuracies))
    return accuracies


if __name__ == "__main__":
    main()
