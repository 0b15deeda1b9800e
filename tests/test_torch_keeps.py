"""A loss that keeps something moves it once a step, and is one loss in its value, its draws and the look back."""

from __future__ import annotations

import copy
from collections import deque

import pytest
import torch
from torch import nn

import kfaccore as kf
import kfaccore_torch as kt


class Centred(kt.ExampleLoss):
    """Cross-entropy with a teacher's outputs less their centre, which the loop hands over beside them."""

    def each(self, f, target):
        t, centre = target[:, :4], target[:, 4:]
        return -((t - centre).softmax(-1) * (f / 0.5).log_softmax(-1)).sum(-1)

    def labels(self, f, noise, target):
        chosen = ((f / 0.5).softmax(-1).cumsum(-1) < noise[..., :1]).sum(-1).clamp(max=3)
        t = 5.0 * nn.functional.one_hot(chosen, 4).to(f)
        return torch.cat([t, target[:, 4:]], 1)


class Keeps(nn.Module, kt.ExampleLoss):
    """The same, with a centre of its own, kept in one way or another."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.calls = 0
        self.past = deque([torch.zeros(4, dtype=torch.float64)], maxlen=1)
        self.register_buffer("centre", torch.zeros(4, dtype=torch.float64))
        self.generator = torch.Generator().manual_seed(5)

    def now(self):
        if self.way == "random":
            return torch.rand(4, dtype=torch.float64)
        if self.way == "generator":
            return torch.rand(4, dtype=torch.float64, generator=self.generator)
        return self.past[0] if self.way == "queue" else self.centre.clone()

    def each(self, f, target):
        centre = self.now()
        self.calls += 1
        new = centre * 0.9 + target.detach().mean(0) * 0.1
        if self.way == "buffer":
            self.centre = new
        elif self.way == "in place":
            self.centre.copy_(new)
        elif self.way == "queue":
            self.past.append(new)
        return Centred().each(f, torch.cat([target, centre.expand(len(f), 4)], 1))

    def labels(self, f, noise, target):
        return Centred().labels(f, noise, torch.zeros(len(f), 8, dtype=torch.float64))[:, :4]


WAYS = ["buffer", "in place", "queue", "random", "generator"]


def batches(steps=5):
    rng = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(5, 3, generator=rng, dtype=torch.float64)
        yield x, torch.randn(5, 4, generator=rng, dtype=torch.float64) + 1


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def preconditioned(net, loss, fisher, joint):
    core = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1))
    pre = kt.Preconditioner(net, kf.Joint({"f": loss}) if joint else loss, core, fisher=fisher)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)

    def step(x, y):
        optimizer.zero_grad()
        with pre.capture():
            f = net(x)
        value = pre.loss({"f": f}, {"f": y}) if joint else pre.loss(f, y)
        value.backward()
        pre.step()
        optimizer.step()
        return value.item()

    return step


SHELLS = {
    "optimizer": lambda net, loss: kt.Optimizer(net, loss).step,
    "fixed": lambda net, loss: kt.Optimizer(net, loss, kf.Preconditioner(kf.KFAC(), step=kf.Fixed(0.1))).step,
    "monte carlo": lambda net, loss: preconditioned(net, loss, kf.monte_carlo, False),
    "empirical": lambda net, loss: preconditioned(net, loss, kf.empirical, False),
    "joint": lambda net, loss: preconditioned(net, loss, kf.type2, True),
}


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("way", WAYS)
def test_steps_are_those_of_a_loss_that_is_given_what_it_would_keep(way, shell):
    """With the same random numbers after each step, too."""
    nets = model(), model()
    kept = Keeps(way)
    steps = SHELLS[shell](nets[0], kept), SHELLS[shell](nets[1], Centred())
    mirror = copy.deepcopy(kept)
    for i, (x, y) in enumerate(batches()):
        torch.manual_seed(10 + i)
        value = steps[0](x, y)
        after = torch.get_rng_state()
        torch.manual_seed(10 + i)
        centre = mirror.now()
        assert torch.equal(after, torch.get_rng_state())
        mirror.centre = centre * 0.9 + y.mean(0) * 0.1
        mirror.past[0] = mirror.centre
        assert steps[1](x, torch.cat([y, centre.expand(5, 4)], 1)) == pytest.approx(value, rel=1e-12)
        for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    assert kept.calls == 5
    if way in ("buffer", "in place"):
        torch.testing.assert_close(kept.centre, mirror.centre)


def test_a_copy_of_a_shell_has_its_loss():
    loss = Keeps("buffer")
    optimizer = kt.Optimizer(model(), loss)
    for x, y in batches(2):
        optimizer.step(x, y)
    other = copy.deepcopy(optimizer)
    (x, y), *_ = batches(1)
    assert other.step(x, y) == optimizer.step(x, y)
