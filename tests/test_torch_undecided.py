"""Rows without a gradient so far are of no example yet, not of several; and what is seen to mix is so while it does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kfaccore as kf
import kfaccore_torch as kt

CE = nn.CrossEntropyLoss()


class Bags(nn.Module):
    """Sets of any sizes, one call each or all in one."""

    def __init__(self, whole=False):
        super().__init__()
        self.a, self.o, self.whole = nn.Linear(3, 8), nn.Linear(8, 3), whole
        self.a.weight.data.abs_()

    def forward(self, *bags):
        if not self.whole:
            return torch.stack([self.o(torch.relu(self.a(x)).mean(0)) for x in bags])
        h = torch.relu(self.a(torch.cat(bags))).split([len(x) for x in bags])
        return self.o(torch.stack([x.mean(0) for x in h]))


class Chunks(nn.Module):
    """Rays of points, run through the layer in chunks of 5 points whatever ray they are of."""

    def __init__(self, whole=False):
        super().__init__()
        self.a, self.o, self.whole = nn.Linear(3, 8), nn.Linear(8, 3), whole
        self.a.weight.data.abs_()

    def forward(self, *rays):
        x = torch.cat(rays)
        h = torch.cat([torch.relu(self.a(part)) for part in x.split(len(x) if self.whole else 5)])
        return self.o(torch.stack([part.mean(0) for part in h.split([len(ray) for ray in rays])]))


def batches(dead, steps=3):
    rng = torch.Generator().manual_seed(1)
    for i in range(steps):
        bags = [torch.randn(n, 3, generator=rng, dtype=torch.float64) for n in (3, 10, 4, 7)]
        if i < dead:
            bags[1] = bags[1].abs() * -50
        yield bags, torch.randint(0, 3, (4,), generator=rng)


def after(model, core, dead, **settings):
    """Gradients turned into directions, batch by batch, and the preconditioner."""
    pre = kt.Preconditioner(model, CE, core, **settings)
    found = []
    for bags, y in batches(dead):
        model.zero_grad()
        owner = torch.repeat_interleave(torch.tensor([len(x) for x in bags]))
        with pre.capture(examples={"a": owner} if model.whole else None):
            f = model(*bags)
        pre.loss(f, y).backward()
        pre.step()
        found.append(model.a.weight.grad.clone())
    return found, pre.engine


@pytest.mark.parametrize("make", [Bags, Chunks])
@pytest.mark.parametrize("sharing", [None, kf.expand, kf.reduce], ids=["exact", "expand", "reduce"])
def test_a_call_without_a_gradient_mixes_nothing(make, sharing):
    """The direction is that of all rows in one call with their examples told, with a dead call and after it."""
    method = kf.Exact() if sharing is None else kf.KFAC(sharing=sharing)
    core = kf.Preconditioner(method, kf.Clocks(1, 1), kf.Schedules(0.01, 0.0))
    results = []
    for whole in (False, True):
        torch.manual_seed(0)
        results.append(after(make(whole).double(), core, 2, fisher=kf.type2))
    (found, engine), (wanted, _) = results
    compared = slice(2, None) if make is Chunks and sharing is kf.reduce else slice(None)  # whose, no gradient says
    for x, y in zip(found[compared], wanted[compared], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)
    assert engine.mixing == set()


class Pairs(nn.Module):
    """Rows beside each other, of one example or of two as an index says."""

    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x, index):
        h = torch.tanh(self.a(x))
        return self.o(h + h[index])


@pytest.mark.parametrize("shell", ["optimizer", "preconditioner"])
def test_what_mixed_once_has_own_shares_when_it_does_not(shell, monkeypatch):
    """The mark is that of the newest step, of all its losses."""
    torch.manual_seed(0)
    model = Pairs().double()
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    straight, crossed = torch.arange(4), torch.tensor([1, 0, 3, 2])
    optimizer = kt.Optimizer(model, CE)
    core = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1))
    pre = kt.Preconditioner(model, CE, core, fisher=kf.monte_carlo)
    engine = optimizer.engine if shell == "optimizer" else pre.engine
    seen = []
    for indices in ([crossed], [straight], [crossed, straight], [straight, straight]):
        if shell == "optimizer":
            optimizer.step((x, indices[0]), y)
        else:
            for index in indices:
                with pre.capture():
                    f = model(x, index)
                pre.loss(f, y).backward()
            pre.step()
            model.zero_grad()
        seen.append(sorted(engine.mixing))
    assert seen == [["a"], [], ["a"], []]
    assert engine.info.layers["a"].get("mixes", False) is False
