"""One loss that is differentiated more than once: its curvature counts once, and its gradients as they add up."""

from __future__ import annotations

import warnings

import pytest

pytest.importorskip("torch")

import torch
from torch import nn

import kfaccore as kf
import kfaccore_torch as kt

CE = nn.CrossEntropyLoss()
CORE = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), kf.Schedules(1e-2, 0.9))
pytestmark = pytest.mark.usefixtures("torch_double")


def batch():
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3


def taken(backward):
    """The directions of one step, whose losses `backward(pre, model, loss of a batch)` differentiates."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
    pre = kt.Preconditioner(model, CE, CORE, fisher=kf.type2)

    def loss(x, y):
        with pre.capture():
            f = model(x)
        return pre.loss(f, y)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "the loss was multiplied")  # as it is here by each
        backward(pre, model, loss)
        pre.step()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def looked_at(pre, model, loss):
    value = loss(*batch())
    torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
    (value / 4).backward()


def looked_at_after(pre, model, loss):
    value = loss(*batch())
    (value / 4).backward(retain_graph=True)
    torch.autograd.grad(value, list(model.parameters()))


def in_two_parts(pre, model, loss):
    value = loss(*batch())
    (value / 8).backward(retain_graph=True)
    (value / 8).backward()


def set_by_hand(pre, model, loss):
    for p, g in zip(model.parameters(), torch.autograd.grad(loss(*batch()), list(model.parameters())), strict=True):
        p.grad = g / 4


@pytest.mark.parametrize("backward", [looked_at, looked_at_after, in_two_parts, set_by_hand])
def test_one_loss(backward):
    once = taken(lambda pre, model, loss: (loss(*batch()) / 4).backward())
    torch.testing.assert_close(taken(backward), once, rtol=1e-10, atol=1e-14)


def test_adversarial_training_with_the_clean_loss_in_the_sum():
    x, y = batch()

    def adversarial(pre, model, loss):
        given = x.clone().requires_grad_()
        clean = loss(given, y)
        (slope,) = torch.autograd.grad(clean, given, retain_graph=True)
        (0.5 * (clean + loss((x + 0.1 * slope.sign()).detach(), y))).backward()

    def plain(pre, model, loss):
        given = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(CE(model(given), y), given)
        (0.5 * (loss(x, y) + loss((x + 0.1 * slope.sign()).detach(), y))).backward()

    torch.testing.assert_close(taken(adversarial), taken(plain), rtol=1e-10, atol=1e-14)


def test_a_head_without_labels_beside_one_that_has_some():
    x, y = batch()

    def two_heads(pre, model, loss):
        with pre.capture():
            f = model(x)
        none = pre.loss(f, torch.full((8,), -100))
        (none.nan_to_num() + 0.5 * pre.loss(f, y)).backward()

    once = taken(lambda pre, model, loss: (0.5 * loss(x, y)).backward())
    torch.testing.assert_close(taken(two_heads), once, rtol=1e-10, atol=1e-14)


def test_two_losses_of_which_one_is_differentiated_twice_are_told_their_sums():
    x, y = batch()

    def twice(pre, model, loss):
        with pre.capture():
            f = model(x)
        first, second = pre.loss(f, y), pre.loss(f, y.flip(0))
        first.backward(retain_graph=True)
        (0.5 * first + second).backward()

    with pytest.raises(ValueError, match=r"multiplied by \[1.5, 1.0\]"):
        taken(twice)
