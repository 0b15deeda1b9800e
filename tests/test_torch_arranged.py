"""Parameters that a network takes in other arrangements than their own: covered as a matrix, or named."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch
import torch.nn.functional as F
from torch import nn

import kfaccore as kf
import kfaccore_torch as kt

CE = nn.CrossEntropyLoss()
CORE = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), kf.Schedules(0.1))
pytestmark = pytest.mark.usefixtures("torch_double")


def directions(model, x, y, **more):
    """Gradients, directions and the plan of one step."""
    pre = kt.Preconditioner(model, CE, CORE, fisher=kf.type2, **more)
    model.zero_grad()
    with pre.capture():
        f = model(x)
    pre.loss(f, y).backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    pre.step()
    return plain, {name: p.grad.clone() for name, p in model.named_parameters()}, pre.engine.plan


class Twice(nn.Module):
    """One weight through a called layer, and in another arrangement through an operation that only autograd shows."""

    def __init__(self, way):
        super().__init__()
        self.way, self.o = way, nn.Linear(4, 5)
        table = nn.Embedding(8, 4) if "table" in way else self.o
        self.w = nn.Conv1d(4, 4, 3, padding=1) if "convolution" in way else table

    def forward(self, x):
        w = self.w.weight
        if "table" in self.way:
            h = torch.tanh(self.w(x))
            h = h @ w[:5].T if self.way == "padded table" else torch.einsum("btd,vd->btv", h, w[:5])
            return h.mT + self.o(torch.tanh(self.w(x))).mT
        if "convolution" in self.way:
            return self.o(F.conv_transpose1d(torch.tanh(self.w(x.mT)), w, padding=1).mT).mT
        return self.o(torch.tanh(self.o(x) @ w)).mT


@pytest.mark.parametrize("way", ["padded table", "einsum of a table", "convolution transposed", "tied autoencoder"])
def test_a_weight_in_two_arrangements_is_left_uncovered_and_the_others_train(way):
    model = Twice(way)
    x = torch.randint(0, 8, (3, 6)) if "table" in way else torch.randn(3, 6, 4)
    y = torch.randint(0, 5, (3, 6))
    name = "o.weight" if model.w is model.o else "w.weight"
    plain, found, plan = directions(model, x, y)
    assert "different Kronecker structures" in plan.uncovered[name]
    assert torch.equal(found[name], plain[name])
    _, wanted, _ = directions(model, x, y, skip=(name,))
    for other in wanted:
        torch.testing.assert_close(found[other], wanted[other], rtol=1e-12, atol=1e-14)
        assert other == name or not torch.equal(found[other], plain[other])
    optimizer = kt.Optimizer(model, CE)
    losses = [float(optimizer.step(x, y)) for _ in range(5)]
    assert losses[-1] < losses[0]
