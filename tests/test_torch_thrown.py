"""Statistics go with the gradients that they are of: thrown away together, kept together."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf

torch = pytest.importorskip("torch")
nn = torch.nn

import kfaccore_torch as kt  # noqa: E402

CE = nn.CrossEntropyLoss()
pytestmark = pytest.mark.usefixtures("torch_double")


class Loop:
    """A model of fixed start, its preconditioner, and one batch."""

    def __init__(self):
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
        core = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), kf.Schedules(1e-2, 0.9))
        self.pre = kt.Preconditioner(self.model, CE, core, fisher=kf.type2)
        self.x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
        self.y = torch.arange(8) % 3

    def formed(self, x, y=None):
        with self.pre.capture():
            f = self.model(x)
        return self.pre.loss(f, self.y if y is None else y)

    def directions(self):
        self.pre.step()
        return torch.cat([p.grad.flatten() for p in self.model.parameters()]).numpy()


def plain(x=None, y=None):
    loop = Loop()
    loop.formed(loop.x if x is None else x, y).backward()
    return loop.directions()


@pytest.mark.parametrize("none", [True, False], ids=["none", "zeros"])
@pytest.mark.parametrize("late", [False, True], ids=["at once", "before backward"])
@pytest.mark.parametrize("value", [30.0, float("nan")], ids=["far", "nan"])
def test_a_batch_that_was_skipped(value, late, none):
    loop = Loop()
    loop.formed(value * loop.x).backward()
    nn.utils.clip_grad_norm_(loop.model.parameters(), 1.0)
    if not late:
        loop.model.zero_grad(set_to_none=none)
    loss = loop.formed(loop.x)
    if late:
        loop.model.zero_grad(set_to_none=none)
    loss.backward()
    np.testing.assert_allclose(loop.directions(), plain(), rtol=1e-12)


def test_the_first_pass_of_sharpness_aware_minimisation():
    loop = Loop()
    loop.formed(loop.x).backward()
    old = [p.detach().clone() for p in loop.model.parameters()]
    with torch.no_grad():
        for p in loop.model.parameters():
            p.add_(0.1 * p.grad)
    loop.model.zero_grad()
    there = Loop()
    there.model.load_state_dict(loop.model.state_dict())
    for one in (loop, there):
        one.formed(one.x).backward()
    with torch.no_grad():
        for p, kept in zip(loop.model.parameters(), old, strict=True):
            p.copy_(kept)
    np.testing.assert_allclose(loop.directions(), there.directions(), rtol=1e-12)


@pytest.mark.parametrize("retain", [False, True])
def test_a_derivative_by_inputs_is_no_training(retain):
    loop = Loop()
    attacked = loop.x.clone().requires_grad_()
    loss = loop.formed(attacked)
    (slope,) = torch.autograd.grad(loss, attacked, retain_graph=retain)
    if retain:  # then the loss is trained on too
        loss.backward()
        wanted = plain()
    else:
        x = loop.x + 0.1 * slope.sign()
        loop.formed(x).backward()
        wanted = plain(x)
    np.testing.assert_allclose(loop.directions(), wanted, rtol=1e-12)


@pytest.mark.parametrize("between", ["nothing", "clipped", "replaced"])
def test_micro_batches_are_kept(between):
    loop = Loop()
    for part in (slice(0, 4), slice(4, 8)):
        (loop.formed(loop.x[part], loop.y[part]) / 2).backward()
        for p in loop.model.parameters():
            if between == "clipped":
                p.grad.clamp_(-1e3, 1e3)
            elif between == "replaced":
                p.grad = p.grad.clone()
    np.testing.assert_allclose(loop.directions(), plain(), rtol=1e-11)


def test_gradients_that_the_loop_asks_for_are_kept():
    loop = Loop()
    parameters = list(loop.model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for part in (slice(0, 4), slice(4, 8)):
        found = torch.autograd.grad(loop.formed(loop.x[part], loop.y[part]) / 2, parameters)
        total = [x + y for x, y in zip(total, found, strict=True)]
    for p, g in zip(parameters, total, strict=True):
        p.grad = g
    np.testing.assert_allclose(loop.directions(), plain(), rtol=1e-11)


def test_several_losses_of_one_backward_are_kept():
    loop = Loop()
    halves = [loop.formed(loop.x[part], loop.y[part]) / 2 for part in (slice(0, 4), slice(4, 8))]
    (halves[0] + halves[1]).backward()
    np.testing.assert_allclose(loop.directions(), plain(), rtol=1e-11)
