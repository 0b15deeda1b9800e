"""Several captured forwards in one step, each with its loss, in any order; what the loss is multiplied with, and a step
without gradients."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

import kfaccore as kf

torch = pytest.importorskip("torch")
nn = torch.nn

import kfaccore_torch as kt  # noqa: E402
from kfaccore_torch import opened  # noqa: E402

pytestmark = [pytest.mark.usefixtures("torch_double"), pytest.mark.filterwarnings("error")]
LENGTH = torch.tensor([2, 3, 2, 3, 6, 6, 6, 5])
MASK = torch.arange(6) < LENGTH[:, None]
HALVES = (slice(0, 4), slice(4, 8))
CORE = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1))


class Loop:
    """Rows of words, some of them padding."""

    def __init__(self, reduction="sum", model=None):
        torch.manual_seed(1)
        self.model = model or nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(8, 6, 3, generator=generator)
        self.y = torch.where(MASK, torch.arange(48).reshape(8, 6) % 3, -100)
        self.pre = kt.Preconditioner(self.model, nn.CrossEntropyLoss(reduction=reduction), CORE, fisher=kf.type2)

    def forward(self, part, masked=True):
        with self.pre.capture(mask=MASK[part] if masked else None):
            return self.model(self.x[part])

    def loss(self, f, part):
        return self.pre.loss(f.flatten(0, 1), self.y[part].flatten())

    def directions(self):
        self.pre.step()
        return torch.cat([p.grad.flatten() for p in self.model.parameters()]).numpy()


def in_turn(reduction="sum", masked=True):
    loop = Loop(reduction)
    losses = [loop.loss(loop.forward(part, masked), part) for part in HALVES]
    (sum(losses) / (2 if reduction == "mean" else 1)).backward()
    return loop.directions()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("apart", [False, True], ids=["one backward", "two"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_after_all_forwards_are_each_of_its_own(reduction, apart, order):
    loop = Loop(reduction)
    f = [loop.forward(part) for part in HALVES]
    losses = []
    for i in order:
        losses.append(loop.loss(f[i], HALVES[i]) / (2 if reduction == "mean" else 1))
        if apart:
            losses[-1].backward()
    if not apart:
        sum(losses).backward()
    np.testing.assert_allclose(loop.directions(), in_turn(reduction), rtol=1e-11)


def test_a_validation_between_a_forward_and_its_loss():
    loop = Loop()
    f = [loop.forward(HALVES[0])]
    for _ in range(3):
        loop.forward(slice(1, 3))
    f.append(loop.forward(HALVES[1]))
    sum(loop.loss(g, part) for g, part in zip(f, HALVES, strict=True)).backward()
    np.testing.assert_allclose(loop.directions(), in_turn(), rtol=1e-11)


class Seen(nn.Module):
    """Notes its input by a weak reference."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        h = x + 0.0
        self.seen.append(weakref.ref(h))
        return self.fc(h).exp()


def test_forwards_without_a_loss_are_not_held():
    loop = Loop(model=Seen())
    for _ in range(4):
        f = loop.forward(HALVES[0], False)
    gc.collect()
    assert [ref() is not None for ref in loop.model.seen] == [False, False, True, True]
    loop.loss(f, HALVES[0]).backward()
    assert np.isfinite(loop.directions()).all()


def test_what_a_forward_that_is_no_more_has_made_is_refused():
    loop = Loop()
    f = loop.forward(HALVES[0]).flatten(0, 1)
    for _ in range(2):
        loop.forward(HALVES[1])
    with pytest.raises(ValueError, match="not of the newest captured forward"):
        loop.pre.loss(f, loop.y[HALVES[0]].flatten())


def test_a_model_that_changes_between_forward_and_loss():
    loop = Loop()
    f = loop.forward(HALVES[0])
    loop.model[0].weight = nn.Parameter(loop.model[0].weight.detach().clone())
    loop.forward(HALVES[1])
    with pytest.raises(ValueError, match="parameters changed since"):
        loop.loss(f, HALVES[0])


def test_a_prediction_made_of_two_forwards():
    found = []
    for captures in (1, 2):
        loop = Loop()
        if captures == 1:
            with loop.pre.capture():
                f = [loop.model(loop.x[part]) for part in HALVES]
        else:
            f = [loop.forward(part, False) for part in HALVES]
        loop.loss(f[0] - f[1], HALVES[1]).backward()
        found.append(loop.directions())
    np.testing.assert_allclose(*found, rtol=1e-11)
    loop = Loop()
    f = [loop.forward(part) for part in HALVES]
    with pytest.raises(ValueError, match="made of several captured forwards"):
        loop.loss(f[0] - f[1], HALVES[1])


class Parts(nn.Module):
    """Two uses of raw parameters that only forwards show."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(3, 3))
        self.b = nn.Parameter(torch.randn(3, 3))

    def forward(self, x, second=False):
        return x @ (self.b if second else self.a)


def test_what_two_forwards_show_is_known_of_both():
    loop = Loop(model=Parts())
    f = []
    for second, part in enumerate(HALVES):
        with loop.pre.capture():
            f.append(loop.model(loop.x[part], bool(second)))
    sum(loop.loss(g, part) for g, part in zip(f, HALVES, strict=True)).backward()
    loop.pre.step()
    assert loop.pre.report().share == 1


@pytest.mark.parametrize("start", [0.0, 0.1])
@pytest.mark.parametrize("way", ["loss", "attach"])
def test_a_learned_weight_is_trained_whatever_it_is(way, start):
    found = []
    for kept in (True, False):
        loop = Loop("mean")
        s = torch.tensor(start, requires_grad=kept)
        weight = torch.exp(-s) if kept else float(torch.exp(-s))
        f = loop.forward(HALVES[0]).flatten(0, 1)
        y = loop.y[HALVES[0]].flatten()
        plain = nn.functional.cross_entropy(f, y)
        made = loop.pre.loss(f, y, weight) if way == "loss" else loop.pre.attach(plain, f, y, weight)
        made.backward()
        found.append(loop.directions())
        if kept:
            np.testing.assert_allclose(s.grad, -plain.detach() * weight.detach(), rtol=1e-12)
    np.testing.assert_allclose(*found, rtol=1e-12)


@pytest.mark.parametrize("way", ["zeroed", "stepped in backward"])
def test_a_step_without_any_gradient_is_named_once(way):
    loop = Loop()
    optimizer = torch.optim.SGD(loop.model.parameters(), 0.1)
    if way != "zeroed":
        for p in loop.model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    for told in (True, False):
        loop.loss(loop.forward(HALVES[0]), HALVES[0]).backward()
        if way == "zeroed":
            optimizer.step()
            optimizer.zero_grad()
        if told:
            with pytest.warns(UserWarning, match=r"no gradient at all, though layers \['0', '2'\] were measured"):
                loop.pre.step()
        else:
            loop.pre.step()


class Raw(nn.Module):
    """Products that no function of torch.nn makes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(3, 3))

    def forward(self, x):
        return torch.tanh(x @ self.w)


@pytest.mark.parametrize("before", [False, True], ids=["alone", "after another"])
@pytest.mark.parametrize("make", [lambda: nn.Linear(3, 3), Raw], ids=["module", "raw"])
def test_a_loss_inside_its_capture_is_named(make, before):
    model = make()
    pre = kt.Preconditioner(model, nn.CrossEntropyLoss())
    x, y = torch.randn(4, 3), torch.arange(4) % 3
    if before:
        with pre.capture():
            held = model(x)
        loss = pre.loss(held, y)
    with pytest.raises(ValueError, match="inside the `with"), pre.capture():
        pre.loss(model(x)[:2] * 2, y[:2])
    with pre.capture():
        f = model(x)
    total = pre.loss(f, y) + loss if before else pre.loss(f, y)
    total.backward()
    pre.step()


def test_a_loss_of_another_forward_is_formed_inside_a_capture():
    """Its prediction is cut there too."""
    found = []
    for inside in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(3, 3)
        core = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), kf.Schedules(1e-2))
        pre = kt.Preconditioner(model, nn.CrossEntropyLoss(), core, fisher=kf.type2)
        x, y = torch.randn(8, 3, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3
        with pre.capture():
            f = model(x[:4])
        first = None if inside else pre.loss(f[:3] * 1.0, y[:3])
        with pre.capture():
            g = model(3 * x[4:])
            if inside:
                first = pre.loss(f[:3] * 1.0, y[:3])
        (first + pre.loss(g, y[4:])).backward()
        pre.step()
        found.append(model.weight.grad.clone())
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def test_a_capture_a_time_step_looks_through_forwards_as_often_as_there_are(monkeypatch):
    """A forward a step of an episode, losses at its end; those of which nobody holds the prediction are still let go
    of, and a loss finds its own forward among many."""
    looked = []
    held, walked = opened._held, opened.Opened._place
    monkeypatch.setattr(opened, "_held", lambda seen: looked.append(0) or held(seen))
    monkeypatch.setattr(opened.Opened, "_place", lambda self, node: looked.append(0) or walked(self, node))
    counts = []
    for steps in (40, 80, 160):
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        pre = kt.Preconditioner(model, nn.CrossEntropyLoss())
        looked.clear()
        outputs = []
        for _ in range(steps):
            with pre.capture():
                outputs.append(model(torch.randn(1, 3)))
            with pre.capture():
                model(torch.randn(1, 3))
        assert len(pre._opened.all) <= 2 * steps
        found = [pre._opened.of([f]) for f in outputs]
        assert [one.seen.span.made(f.grad_fn) for one, f in zip(found, outputs, strict=True)] == [True] * steps
        assert len({id(one) for one in found}) == steps
        counts.append(len(looked))
    assert counts[2] <= 2.5 * counts[1] <= 2.5 * 2.5 * counts[0]
