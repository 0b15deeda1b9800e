"""A loss may write to its target and to its prediction: it is the loss that it would be if it made new ones."""

from __future__ import annotations

import warnings

import pytest

pytest.importorskip("torch")

import torch
import torch.nn.functional as F
from torch import nn

import kfaccore as kf
import kfaccore_torch as kt
from kfaccore_torch import kept


class Pure(kt.ExampleLoss):
    """Logistic in the target plus a weight, of the later outputs' exponentials; `n` counts rows below 9."""

    def each(self, f, target):
        f = torch.cat([f[:, :1], f[:, 1:].exp()], 1)
        y = target["y"] - 1
        y = torch.where(y > 9, torch.zeros_like(y), y)
        return (((y + 2) * F.softplus(f)) - y * f + 0.3 * f * f).sum(1)

    def labels(self, f, noise, target):
        return {"y": target["y"] + noise}

    def normaliser(self, f, target):
        return 1.0 * len(f)


class Writes(Pure):
    """The same, in place, in a container whose things are taken out."""

    def each(self, f, target):
        f[:, 1:].exp_()
        y = target["y"]
        y.sub_(1)
        y[y > 9] = 0
        target.pop("y")
        target["left"] = y
        return (((y + 2) * F.softplus(f)) - y * f + 0.3 * f * f).sum(1)

    def labels(self, f, noise, target):
        target["y"].add_(noise)
        f.zero_()
        return target


def _target(i):
    y = torch.full((6, 3), 3.0) + torch.arange(3)
    y[2] = 20.0 if i > 1 else 2.0  # written to where there is something to write, later
    return {"y": y}


def _trained(loss, fisher, optimizer, **settings):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    core = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), kf.Schedules(0.1, 0.5), step=kf.Fixed(0.05))
    if optimizer:
        core = None if fisher is not kf.empirical else core
    shell = (kt.Optimizer if optimizer else kt.Preconditioner)(model, loss, core, fisher=fisher, **settings)
    found = []
    for i in range(5):
        x, target = torch.randn(6, 4), _target(i)
        if optimizer:
            found.append(torch.as_tensor(float(shell.step(x, target))))
        else:
            model.zero_grad()
            with shell.capture():
                f = torch.sigmoid(model(x))  # keeps what it gives for the backward pass
            shell.loss(f, target).backward()
            shell.step()
            found.append(model.weight.grad.clone())
        assert ("left" in target) is isinstance(loss, Writes)
        if "left" in target:
            assert torch.equal(target["left"], (_target(i)["y"] - 1).where(_target(i)["y"] < 10, torch.zeros(())))
    return torch.stack([*found] if not optimizer else [*found, model.weight.sum()]), model.weight.detach()


@pytest.mark.parametrize("optimizer", [False, True])
@pytest.mark.parametrize("fisher", [kf.type2, kf.empirical, kf.monte_carlo])
def test_what_a_loss_writes_it_writes_once(torch_double, fisher, optimizer):
    settings = {"draws": 3} if fisher is kf.monte_carlo else {}
    right = _trained(Pure(), fisher, optimizer, **settings)
    found = _trained(Writes(), fisher, optimizer, **settings)
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


class Late(kt.ExampleLoss):
    def each(self, f, target):
        return (f.mul_(2) if target[0, 0] > 0 else f - target).pow(2).sum(1)


def test_a_prediction_that_is_written_to_late_is_named(torch_double):
    model = nn.Linear(4, 3)
    pre = kt.Preconditioner(model, Late(), fisher=kf.type2)
    for sign in (-1.0, 1.0):
        with pre.capture():
            f = model(torch.randn(6, 4))
        if sign > 0:
            with pytest.raises(ValueError, match=r"Late.value wrote to its prediction, \(6, 3\)"):
                pre.loss(f, torch.full((6, 3), sign))
        else:
            pre.loss(f, torch.full((6, 3), sign)).backward()
            pre.step()


class Seldom(Pure):
    """Writes to its target where that has a mark, and not the same again where it was written to."""

    def each(self, f, target):
        if bool((target > 9).any()):
            target[target > 9] *= 0.5
        return ((target + 2) * F.softplus(f) - target * f).sum(1)

    def labels(self, f, noise, target):
        return target + noise


class Never(Seldom):
    def each(self, f, target):
        return super().each(f, target.clone())


@pytest.mark.parametrize("fisher", [kf.type2, kf.empirical, kf.monte_carlo])
@pytest.mark.parametrize("first", range(7))
def test_the_first_write_to_a_target_is_seen_at_any_batch(torch_double, first, fisher):
    found = []
    for loss in (Seldom(), Never()):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        core = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), kf.Schedules(0.1, 0.5))
        pre = kt.Preconditioner(model, loss, core, fisher=fisher)
        for i in range(8):
            x, target = torch.randn(6, 4), torch.rand(6, 3)
            target[0, 0] = 50.0 if i == first else 1.0  # halved once, it is above 9 still
            model.zero_grad()
            with pre.capture():
                f = model(x)
            pre.loss(f, target).backward()
            pre.step()
            left = {True: 50.0 if type(loss) is Never else 25.0, False: 1.0}
            assert float(target[0, 0]) == left[i == first]
        found.append(model.weight.grad)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def test_a_first_write_to_a_large_target_is_named_and_seen_from_then_on(torch_double, monkeypatch):
    monkeypatch.setattr(kept, "_LARGE", 2)
    found = []
    for loss in (Seldom(), Never()):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        core = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), kf.Schedules(0.1, 0.0))
        pre = kt.Preconditioner(model, loss, core, fisher=kf.type2)
        for i in range(7):
            x, target = torch.randn(6, 4), torch.rand(6, 3)
            target[0, 0] = 50.0 if i in (2, 5, 6) else 1.0
            with pre.capture():
                f = model(x)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                value = pre.loss(f, target)
            assert len(told) == (i == 2 and type(loss) is Seldom)
            assert all("this loss has written to target, a large tensor" in str(one.message) for one in told)
            model.zero_grad()
            value.backward()
            pre.step()
        found.append(model.weight.grad)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)
