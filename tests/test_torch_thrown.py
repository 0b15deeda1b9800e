"""Statistics go with the gradients that they are of: thrown away together, kept together."""

from __future__ import annotations

from functools import partial

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

    def __init__(self, reduction="mean"):
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
        core = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), kf.Schedules(1e-2, 0.9))
        self.pre = kt.Preconditioner(self.model, nn.CrossEntropyLoss(reduction=reduction), core, fisher=kf.type2)
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


def failing(loss, at):
    def boom(grad):
        raise RuntimeError("out of memory")

    handle = at.register_hook(boom)
    with pytest.raises(RuntimeError, match="out of memory"):
        loss()
    handle.remove()


@pytest.mark.parametrize("asked", [False, True], ids=["backward", "grad"])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("none", [True, False], ids=["none", "zeros"])
def test_a_backward_pass_that_failed_counts_nothing(late, none, asked):
    loop = Loop()
    with loop.pre.capture():
        f = loop.model(5 * loop.x)
    loss = loop.pre.loss(f, loop.y)
    parameters = list(loop.model.parameters())
    failing(partial(torch.autograd.grad, loss, parameters) if asked else loss.backward, parameters[0] if late else f)
    loop.model.zero_grad(set_to_none=none)
    loop.formed(loop.x).backward()
    np.testing.assert_allclose(loop.directions(), plain(), rtol=1e-12)
    assert not any(p._backward_hooks for p in parameters)


def test_a_micro_batch_whose_backward_failed_is_taken_again():
    loop = Loop()
    parts = (slice(0, 4), slice(4, 8))
    (loop.formed(loop.x[parts[0]], loop.y[parts[0]]) / 2).backward()
    kept = [p.grad.clone() for p in loop.model.parameters()]
    failing((loop.formed(loop.x[parts[1]], loop.y[parts[1]]) / 2).backward, loop.model[0].weight)
    for p, g in zip(loop.model.parameters(), kept, strict=True):
        p.grad = g
    (loop.formed(loop.x[parts[1]], loop.y[parts[1]]) / 2).backward()
    np.testing.assert_allclose(loop.directions(), plain(), rtol=1e-11)


def test_a_whole_step_begun_anew_after_its_second_backward_failed():
    loop = Loop()
    loop.formed(9 * loop.x).backward()
    failing(loop.formed(loop.x).backward, loop.model[0].weight)
    loop.model.zero_grad()
    loop.formed(loop.x).backward()
    np.testing.assert_allclose(loop.directions(), plain(), rtol=1e-12)


def asked(loop, loss, retain=False):
    return torch.autograd.grad(loss, list(loop.model.parameters()), retain_graph=retain)


def given(loop, *grads):
    for p, *parts in zip(loop.model.parameters(), *grads, strict=True):
        p.grad = sum(parts[1:], parts[0].clone())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("used", ["asked", "clipped", "backward", "added", "loaded"])
@pytest.mark.parametrize("value", [30.0, float("nan")], ids=["far", "nan"])
def test_gradients_that_are_asked_for_and_not_used_take_their_statistics_along(value, used):
    loop = Loop()
    asked(loop, loop.formed(value * loop.x))
    wanted = plain()
    if used in ("asked", "clipped"):
        given(loop, asked(loop, loop.formed(loop.x)))
        if used == "clipped":
            for p in loop.model.parameters():
                p.grad *= 0.5
            wanted = wanted / 2
    elif used == "backward":
        loop.formed(loop.x).backward()
    else:  # halves of the batch, the first asked for, the other added to it by a pass
        first, second = (loop.formed(loop.x[i], loop.y[i]) / 2 for i in (slice(0, 4), slice(4, 8)))
        there = asked(loop, first)
        if used == "loaded":
            given(loop, there)
        second.backward()
        if used == "added":
            given(loop, there, [p.grad for p in loop.model.parameters()])
    np.testing.assert_allclose(loop.directions(), wanted, rtol=1e-10)


def test_gradients_that_are_asked_for_layer_by_layer():
    loop = Loop()
    asked(loop, loop.formed(9 * loop.x))
    loss = loop.formed(loop.x)
    parameters = list(loop.model.parameters())
    found = [*torch.autograd.grad(loss, parameters[:2], retain_graph=True), *torch.autograd.grad(loss, parameters[2:])]
    given(loop, found)
    np.testing.assert_allclose(loop.directions(), plain(), rtol=1e-12)


def test_gradients_that_only_weigh_the_losses_are_not_in_the_step():
    """As GradNorm asks for them."""
    loop = Loop()
    with loop.pre.capture():
        f = loop.model(loop.x)
    loss = loop.pre.loss(f, loop.y)
    (3 * loss).backward(retain_graph=True)
    loop.model.zero_grad()
    asked(loop, loss, True)
    loss.backward()
    np.testing.assert_allclose(loop.directions(), plain(), rtol=1e-12)


def zeroed_by_data(loop):
    for p in loop.model.parameters():
        p.grad.data.zero_()


def zeroed_by_numpy(loop):
    for p in loop.model.parameters():
        p.grad.numpy()[...] = 0.0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("zero", [zeroed_by_data, zeroed_by_numpy])
def test_gradients_that_are_zeroed_past_autograd(zero, clipped):
    loop = Loop()
    loop.formed(5 * loop.x).backward()
    zero(loop)
    loop.formed(loop.x).backward()
    for p in loop.model.parameters():
        p.grad *= 1 - clipped / 2
    np.testing.assert_allclose(loop.directions(), plain() * (1 - clipped / 2), rtol=1e-12)


@pytest.mark.parametrize("clipped", [False, True])
def test_gradients_that_a_device_alone_knows_to_be_zero(monkeypatch, clipped):
    monkeypatch.setattr(kt.gone, "known_at_once", lambda x: False)
    loop = Loop()
    for value in (5, 3):
        loop.formed(value * loop.x).backward()
        zeroed_by_data(loop)
    loop.formed(loop.x).backward()
    if clipped:
        for p in loop.model.parameters():
            p.grad *= 0.5
        with pytest.warns(UserWarning, match=r"call discard\(\)"):
            loop.pre.step()
    else:
        np.testing.assert_allclose(loop.directions(), plain(), rtol=1e-12)


@pytest.mark.parametrize("none", [True, False], ids=["none", "zeros"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_optimizer_that_holds_the_head_alone(reduction, none):
    """Its `zero_grad` leaves the trunk, which is trained on both batches."""
    found = {}
    for way in ("both", "head", "second"):
        loop = Loop(reduction)
        if way != "second":
            loop.formed(2 * loop.x).backward()
        if way == "head":
            torch.optim.SGD(loop.model[2].parameters(), 0.1).zero_grad(set_to_none=none)
        loop.formed(loop.x).backward()
        found[way] = loop.directions()
    head = sum(p.numel() for p in Loop().model[0].parameters())
    np.testing.assert_allclose(found["head"][head:], found["second"][head:], rtol=1e-12)
    np.testing.assert_allclose(found["head"][:head], found["both"][:head], rtol=1e-12)


def test_gradients_of_a_layer_that_are_kept_aside_and_added_up():
    """As where the gradients of shared layers alone are zeroed between tasks, and projected."""
    loop, wanted = Loop(), Loop()
    parts = (slice(0, 4), slice(4, 8))
    kept = []
    for part in parts:
        for p in loop.model[0].parameters():
            p.grad = None
        for one in (loop, wanted):
            (one.formed(one.x[part], one.y[part]) / 2).backward()
        kept.append([p.grad for p in loop.model[0].parameters()])
    for p, *grads in zip(loop.model[0].parameters(), *kept, strict=True):
        p.grad = grads[0] + grads[1]
    np.testing.assert_allclose(loop.directions(), wanted.directions(), rtol=1e-10)
