"""Forwards that ask for their graph: a second look at the batch has one too, and is the same forward."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch
from torch import nn

import kfaccore as kf
import kfaccore_torch as kt

CE = nn.CrossEntropyLoss()
pytestmark = pytest.mark.usefixtures("torch_double")


class Net(nn.Module):
    """`asks(z)` is what the forward asks of its graph, and gives the factor that the logits have."""

    def __init__(self, asks):
        super().__init__()
        self.asks, self.u, self.o = asks, nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        z = torch.tanh(self.u(x))
        return self.o(z) * self.asks(z)


def hooked(z):
    z.register_hook(lambda g: g * 1.0)
    return 1.5


def retained(z):
    z.retain_grad()
    return 1.5


def differentiated(z):
    """A factor by the slope of an energy, without a graph of its own."""
    return 1.5 + 0 * torch.autograd.grad(z.sin().sum(), z, retain_graph=True)[0].detach().sum()


ASKS = {
    "hook": hooked,
    "hook of a node": lambda z: z.grad_fn.register_hook(lambda *_: None) and 1.5,
    "retained gradient": retained,
    "derivative": differentiated,
    "branch": lambda z: 1.5 if z.requires_grad else 30.0,
}


@pytest.mark.parametrize("rule", [kf.SelfTuning(), kf.LineSearch()])
@pytest.mark.parametrize("name", ASKS)
def test_a_step_is_judged_by_the_forward_that_it_was_made_of(name, rule):
    x, y = torch.randn(8, 3), torch.arange(8) % 3
    found = []
    for asks in (ASKS[name], lambda z: 1.5):
        torch.manual_seed(1)
        optimizer = kt.Optimizer(Net(asks), CE, kf.Preconditioner(kf.KFAC(), step=rule))
        found.append([float(optimizer.step(x, y)) for _ in range(6)])
    assert found[0] == pytest.approx(found[1], rel=1e-9)
