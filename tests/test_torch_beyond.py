"""Parameters that the loss uses and no prediction does: plain gradients, said once, or an optimizer of their own."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import kfaccore as kf
import kfaccore_torch as kt


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(3, 6), nn.Linear(6, 2)
        self.log_var = nn.Parameter(torch.zeros(2))
        self.head = nn.Linear(2, 1)  # for a loss alone

    def forward(self, x):
        return self.o(torch.tanh(self.a(x)))


class Uncertain(kt.ExampleLoss):
    """A learned variance, and a layer that weighs the errors."""

    def __init__(self, model):
        self.model = model

    def each(self, f, target):
        s = self.model.log_var
        return (0.5 * torch.exp(-s) * (f - target) ** 2 + 0.5 * s).sum(-1) + self.model.head(target)[:, 0].square()


def made():
    torch.manual_seed(0)
    return Net().double(), torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)


def stepped(way, clocks=None):
    """Gradients before and after of each of three steps, and what was said."""
    model, x, y = made()
    core = kf.Preconditioner(kf.KFAC(), clocks or kf.Clocks(1, 1))
    pre = kt.Preconditioner(model, Uncertain(model), core, fisher=kf.type2, uncovered=kf.Diagonal())
    found = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            model.zero_grad()
            with pre.capture():
                f = model(x)
            if way == "loss":
                loss = pre.loss(f, y)
            else:  # a term that was declared has them
                more = model.log_var.square().sum() + model.head(y).mean()
                with pre.capture():
                    pass
                loss = pre.attach(((f - y) ** 2).sum(-1).mean(), f, y) + pre.extra(more)
            loss.backward()
            before = {name: p.grad.clone() for name, p in model.named_parameters()}
            pre.step()
            found.append((before, {name: p.grad.clone() for name, p in model.named_parameters()}))
    return found, [str(one.message) for one in said if "behind no prediction" in str(one.message)]


@pytest.mark.parametrize("clocks", [kf.Clocks(1, 1), kf.Clocks(2, 2)], ids=["every step", "every other"])
@pytest.mark.parametrize("way", ["loss", "term"])
def test_they_keep_their_gradients_and_are_named_once(way, clocks):
    found, said = stepped(way, clocks)
    for before, after in found:
        for name in ("log_var", "head.weight", "head.bias"):
            assert torch.equal(before[name], after[name])
        assert not torch.allclose(before["a.weight"], after["a.weight"])
    assert len(said) == 1
    assert "log_var" in said[0]
    assert "head.weight" in said[0]


def test_an_optimizer_trains_them_by_rest_and_asks_for_it():
    model, x, y = made()
    before = [p.detach().clone() for p in (model.log_var, model.head.weight)]
    with pytest.raises(ValueError, match=r"used by the loss.*rest=torch.optim.Adam, skip="):
        kt.Optimizer(model, Uncertain(model), fisher=kf.type2).step(x, y)
    assert torch.equal(before[0], model.log_var)
    names = ("head.bias", "head.weight", "log_var")
    optimizer = kt.Optimizer(model, Uncertain(model), fisher=kf.type2, rest=torch.optim.Adam, skip=names)
    losses = [optimizer.step(x, y) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, old) for p, old in zip((model.log_var, model.head.weight), before, strict=True))


@pytest.mark.parametrize("name", ["a", "log_var"])
def test_calls_that_were_not_captured_are_named_all_the_same(name):
    """A layer before the captured part of a forward, and a term that nobody declared."""
    model, x, y = made()
    pre = kt.Preconditioner(model, nn.MSELoss(), fisher=kf.type2, uncovered=kf.Diagonal())
    h = torch.tanh(model.a(x)) if name == "a" else x[:, :1].expand(8, 6)
    with pre.capture():
        f = model.o(h.detach())
    loss = pre.loss(f, y) + (h.square().mean() if name == "a" else model.log_var.square().sum() + model.log_var.sum())
    loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=rf"'{name}.*has a gradient but none of its calls was captured"):
            pre.step()
