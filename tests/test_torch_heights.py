"""Losses of torch with no end at 0: a constant changes no step, whatever sign the value has."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf

torch = pytest.importorskip("torch")
kt = pytest.importorskip("kfaccore_torch")
nn = torch.nn


class Poisson(kt.ExampleLoss):
    shift = 0.0

    def each(self, f, target):
        return (f.exp() - target * f).sum(1) + self.shift

    def labels(self, f, noise, target):
        k = torch.arange(60)
        below = (k * f[..., None] - f[..., None].exp() - torch.lgamma(k + 1.0)).exp().cumsum(-1)
        return (noise[..., None] > below).sum(-1)


class GaussianNLL(kt.ExampleLoss):
    """f = (mean, log of the deviation)."""

    shift = 0.0

    def each(self, f, y):
        return 0.5 * ((y[:, 0] - f[:, 0]) * (-f[:, 1]).exp()) ** 2 + f[:, 1] + self.shift

    def labels(self, f, noise, y):
        return f[:, :1] + f[:, 1:].exp() * torch.special.ndtri(noise[:, :1])


def targets(kind, x, rng):
    if kind is Poisson:
        return torch.poisson((x[:, :1] + 1).exp(), generator=rng)
    return 0.01 * torch.sin(2 * x[:, :1])


def trained(kind, shift, steps=30, resumed=None):
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=rng, dtype=torch.float64)
    y = targets(kind, x, rng)
    outputs = 1 if kind is Poisson else 2

    def made():
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, outputs)).double()
        loss = kind()
        loss.shift = shift
        return model, kt.Optimizer(model, loss, fisher=kf.monte_carlo)

    model, optimizer = made()
    losses = []
    for k in range(steps):
        losses.append(optimizer.step(x, y) - shift)
        if k == resumed:
            kept, state = model.state_dict(), optimizer.state_dict()
            model, optimizer = made()
            model.load_state_dict(kept)
            optimizer.load_state_dict(state)
    return np.array(losses)


@pytest.mark.parametrize("kind", [Poisson, GaussianNLL])
def test_a_constant_changes_no_step(kind):
    plain = trained(kind, 0.0)
    assert plain[-1] < min(0, plain[0])
    for shift in (-20.0, 20.0):
        np.testing.assert_allclose(trained(kind, shift), plain, rtol=1e-6, atol=1e-9)


def test_the_run_resumes_below_0():
    np.testing.assert_array_equal(trained(Poisson, 0.0, resumed=15), trained(Poisson, 0.0))


def test_what_losses_say_of_their_end():
    def said(loss, target=None):
        return kt.Optimizer(nn.Linear(2, 3), loss).engine.objective.nonnegative(target)

    hard, soft = torch.tensor([0, 1]), torch.rand(2, 3)
    cross, signs = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(torch.tensor([1.0, -1.0, 1.0]))
    assert [said(cross, hard), said(cross, soft), said(signs, hard)] == [True, None, False]
    assert [said(nn.MSELoss()), said(nn.BCEWithLogitsLoss())] == [True, True]
    assert said(nn.BCEWithLogitsLoss(pos_weight=torch.ones(3))) is None
    assert [said(Poisson()), said(kf.Gaussian())] == [False, True]
    assert said(kf.Joint({"a": nn.MSELoss(), "b": Poisson()}), {"a": soft, "b": soft}) is False


def test_soft_labels_of_both_signs_go_below_0():
    """Advantages times one-hot actions."""
    torch.manual_seed(0)
    x = torch.randn(128, 4, dtype=torch.float64)
    best = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    action = torch.randint(3, (128,))
    advantage = torch.where(action == best, 1.0, -0.3).double()
    target = nn.functional.one_hot(action, 3) * advantage[:, None]
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    optimizer = kt.Optimizer(model, nn.CrossEntropyLoss())
    losses = [optimizer.step(x, target) for _ in range(60)]
    assert losses[-1] < -0.5
