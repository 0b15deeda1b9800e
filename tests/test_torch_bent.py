"""Backward passes that are not linear: hooks that clip gradients on the way do not clip draws, and others are named."""

from __future__ import annotations

import warnings
from functools import partial

import numpy as np
import pytest

import kfaccore as kf

torch = pytest.importorskip("torch")
nn = torch.nn

import kfaccore_torch as kt  # noqa: E402

pytestmark = pytest.mark.usefixtures("torch_double")


class Clip(torch.autograd.Function):
    """The identity, whose gradient is bounded in norm, an example each."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * (0.05 / g.norm(dim=-1, keepdim=True).clamp(min=0.05))


def clamped(h, most=0.05):
    if h.requires_grad:  # not in a second look
        h.register_hook(lambda g: g.clamp(-most, most))
    return h


def signed(h):
    h.register_hook(torch.sign)
    return h


def noisy(h):
    h.register_hook(lambda g: g + 0.1)
    return h


class Net(nn.Module):
    """A perceptron, or a recurrent network of three steps, with something on the way back of every hidden state."""

    def __init__(self, way, steps, mixes=False):
        super().__init__()
        torch.manual_seed(1)
        self.way, self.steps = way, steps
        self.a, self.r, self.o = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.n = nn.BatchNorm1d(5, track_running_stats=False) if mixes else nn.Identity()

    def forward(self, x):
        h = self.way(self.n(self.a(x)).tanh())
        for _ in range(self.steps):
            h = self.way((self.a(x) + self.r(h)).tanh())
        return self.o(h)


def data(examples):
    rng = torch.Generator().manual_seed(0)
    return torch.randn(examples, 3, generator=rng), torch.arange(examples) % 3, torch.randn(examples, 3, generator=rng)


def directions(way, loss, examples, steps=1, batches=3, mixes=False, **how):
    """Of all steps, each with the gradient of the network without anything on the way."""
    x, labels, numbers = data(examples)
    model = Net(way, steps, mixes)
    core = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), kf.Schedules(1e-2, 0.9))
    pre = kt.Preconditioner(model, loss, core, **{"fisher": kf.type2, **how})
    plain = Net(nn.Identity(), steps, mixes)
    plain.load_state_dict(model.state_dict())
    y = numbers if isinstance(loss, nn.MSELoss) else labels
    loss(plain(x), y).backward()
    found = []
    for _ in range(batches):
        model.zero_grad()
        with pre.capture():
            f = model(x)
        pre.loss(f, y).backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            p.grad = None if q.grad is None else q.grad.clone()
        pre.step()
        found.append(np.concatenate([p.grad.numpy().ravel() for p in model.parameters() if p.grad is not None]))
    return np.stack(found), pre


LOSSES = {"labels": nn.CrossEntropyLoss(), "sum": nn.CrossEntropyLoss(reduction="sum"), "numbers": nn.MSELoss()}


@pytest.mark.parametrize("examples", [1, 2, 5, 40])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("way", [clamped, Clip.apply], ids=["clamped", "bounded"])
@pytest.mark.parametrize("steps", [0, 2])
def test_draws_are_not_clipped(steps, way, loss, examples):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, pre = directions(way, LOSSES[loss], examples, steps)
    wanted, plain = directions(nn.Identity(), LOSSES[loss], examples, steps)
    np.testing.assert_allclose(found, wanted, rtol=1e-8, atol=1e-12)
    assert pre.engine.mixing == plain.engine.mixing == set()


@pytest.mark.parametrize("fisher", [kf.monte_carlo, kf.empirical])
def test_whatever_the_draws(fisher):
    """Draws of one are measured on their way, and those of Monte-Carlo are asked for with random numbers here."""
    how = {"fisher": fisher, "seed": 3}
    found, _ = directions(clamped, nn.MSELoss(), 6, **how)
    wanted, _ = directions(nn.Identity(), nn.MSELoss(), 6, **how)
    np.testing.assert_allclose(found, wanted, rtol=1e-8, atol=1e-12)


def test_rows_that_mix_examples_and_are_clipped():
    found, pre = directions(clamped, LOSSES["labels"], 6, mixes=True)
    wanted, plain = directions(nn.Identity(), LOSSES["labels"], 6, mixes=True)
    np.testing.assert_allclose(found, wanted, rtol=1e-8, atol=1e-12)
    assert pre.engine.mixing == plain.engine.mixing == {"a"}


@pytest.mark.parametrize("way", [signed, noisy])
def test_what_is_linear_for_no_draw_is_named_once(way):
    with pytest.warns(UserWarning, match=r"layers \['a', 'r'\] in a way that is not linear") as told:
        directions(way, LOSSES["labels"], 6, batches=5)
    assert len(told) == 1


def test_a_rule_that_judges_its_step():
    """Clipping beyond all gradients of the loss changes nothing of a run, though draws are larger."""
    losses = []
    for way in (nn.Identity(), partial(clamped, most=0.2)):
        x, y, _ = data(12)
        optimizer = kt.Optimizer(Net(way, 1), nn.CrossEntropyLoss())
        losses.append([optimizer.step(x, y) for _ in range(4)])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-9)
