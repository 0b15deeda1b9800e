"""Gradients that `zero_grad` takes out of `.grad`: the step's have them in them, or have not."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf

torch = pytest.importorskip("torch")
nn = torch.nn

import kfaccore_torch as kt  # noqa: E402

HALVES = "ignore:the loss was multiplied by 0.5"  # a part alone, of a mean over two
pytestmark = [pytest.mark.usefixtures("torch_double"), pytest.mark.filterwarnings("error", HALVES)]
PARTS = (slice(4, 8), slice(0, 4))


class Loop:
    """A trunk with a head a part of the batch, its preconditioner, and one batch."""

    def __init__(self, dtype=torch.float64):
        torch.manual_seed(1)
        self.trunk = nn.Sequential(nn.Linear(3, 5), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)])
        self.model = nn.Sequential(self.trunk, self.heads).to(dtype)
        core = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), kf.Schedules(1e-2, 0.9))
        self.pre = kt.Preconditioner(self.model, nn.CrossEntropyLoss(), core, fisher=kf.type2)
        self.x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
        self.x[4:] *= 10
        self.y = torch.arange(8) % 3
        self.parameters = list(self.model.parameters())

    def backward(self, part, head=0, times=0.5):
        with self.pre.capture():
            f = self.heads[head](self.trunk(self.x[part]))
        (times * self.pre.loss(f, self.y[part])).backward()

    def gradients(self):
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.parameters]

    def directions(self):
        self.pre.step()
        return np.concatenate([p.grad.flatten().double().numpy() for p in self.parameters if p.grad is not None])

    def parts(self, head=0, none=True):
        """Gradients of each part, zeroed between; `.grad` is that of the last."""
        found = []
        for number, part in enumerate(PARTS):
            self.model.zero_grad(set_to_none=none)
            self.backward(part, head and number)
            found.append(self.gradients())
        return found

    def set_to(self, gradients):
        for p, g in zip(self.parameters, gradients, strict=True):
            p.grad = g if g is not None and bool(g.any()) else None


def with_gradients(change, head=0):
    """Directions of what `change` makes of the parts' gradients, where all that was seen counts."""
    loop = Loop()
    parts = []
    for number, part in enumerate(PARTS):
        old = loop.gradients()
        loop.backward(part, head and number)
        parts.append([new - g for new, g in zip(loop.gradients(), old, strict=True)])
    loop.set_to(change(*parts))
    return loop.directions()


def projected(first, second):
    """Each less its part along the other, where they conflict."""
    flat = [torch.cat([g.flatten() for g in one]) for one in (first, second)]
    inner = flat[0] @ flat[1]
    share = [min(float(inner / (one @ one)), -0.1) for one in flat]
    return [a - share[1] * b + b - share[0] * a for a, b in zip(first, second, strict=True)]


def each_clipped(*parts):
    def clipped(part):
        norm = torch.cat([g.flatten() for g in part]).norm()
        return [g * (0.1 / norm) for g in part]

    return [a + b for a, b in zip(*map(clipped, parts), strict=True)]


KEPT = {
    "added": lambda first, second: [a + b for a, b in zip(first, second, strict=True)],
    "projected": projected,
    "each clipped": each_clipped,
    "by parameter": lambda first, second: [(i + 1) * a - b for i, (a, b) in enumerate(zip(first, second, strict=True))],
    "clamped": lambda first, second: [(a + b).clamp(-0.3, 0.3) for a, b in zip(first, second, strict=True)],
}


@pytest.mark.parametrize("head", [0, 1], ids=["one head", "two heads"])
@pytest.mark.parametrize("change", KEPT.values(), ids=KEPT)
def test_gradients_that_the_loop_adds_up_keep_their_statistics(change, head):
    loop = Loop()
    loop.set_to(change(*loop.parts(head)))
    np.testing.assert_allclose(loop.directions(), with_gradients(change, head), rtol=1e-9)


def test_gradients_added_in_place_and_in_single_precision():
    loop = Loop(torch.float32)
    first, _ = loop.parts()
    for p, g in zip(loop.parameters, first, strict=True):
        p.grad = None if p.grad is None else p.grad.add_(g)
    np.testing.assert_allclose(loop.directions(), with_gradients(KEPT["added"]), rtol=1e-3, atol=1e-5)


THROWN = {
    "as it is": lambda g, norm: g,
    "clipped": lambda g, norm: g.mul_(0.1 / norm),
    "clamped": lambda g, norm: g.clamp_(-1e-2, 1e-2),
    "unscaled": lambda g, norm: g / 1024,
    "longer": lambda g, norm: 3 * g,
}


@pytest.mark.parametrize("value", [1.0, float("nan")])
@pytest.mark.parametrize("change", THROWN.values(), ids=THROWN)
def test_gradients_that_are_thrown_away_take_their_statistics_along(change, value):
    found = []
    for first in (True, False):
        loop = Loop()
        if first:
            loop.x[PARTS[0]] *= value
            loop.backward(PARTS[0])
            loop.model.zero_grad()
        loop.backward(PARTS[1])
        norm = nn.utils.get_total_norm([p.grad for p in loop.parameters if p.grad is not None])
        loop.set_to([None if p.grad is None else change(p.grad, norm) for p in loop.parameters])
        found.append(loop.directions())
    np.testing.assert_allclose(*found, rtol=1e-12)


def test_one_part_is_thrown_away_and_others_are_added_up():
    loop = Loop()
    parts = loop.parts()
    loop.model.zero_grad()
    loop.backward(slice(2, 6), times=50.0)  # too far off
    loop.model.zero_grad()
    loop.backward(slice(1, 3))
    last = loop.gradients()
    loop.set_to([sum(g) for g in zip(*parts, last, strict=True)])
    wanted = Loop()
    for part in (*PARTS, slice(1, 3)):
        wanted.backward(part)
    np.testing.assert_allclose(loop.directions(), wanted.directions(), rtol=1e-9)


def test_gradients_that_tell_nothing_keep_what_was_seen_and_that_is_said_once():
    """Noise, and gradients that were written over."""

    def noisy(first, second):
        noise = torch.Generator().manual_seed(2)
        return [a + b + (a != 0) * torch.randn(a.shape, generator=noise) for a, b in zip(first, second, strict=True)]

    for change, none in ((noisy, True), (KEPT["added"], False)):
        loop = Loop()
        for told in (True, False):
            parts = loop.parts(none=none)
            loop.set_to(change(*parts))
            if told:
                with pytest.warns(UserWarning, match=r"call discard\(\)"):
                    found = loop.directions()
                np.testing.assert_allclose(found, with_gradients(change), rtol=1e-9)
            else:
                loop.directions()


@pytest.mark.parametrize("more", [False, True])
def test_gradients_are_put_back_after_a_probe(more):
    loop, wanted = Loop(), Loop()
    first, _ = loop.parts()
    loop.set_to(first)
    wanted.backward(PARTS[0])
    if more:
        for one in (loop, wanted):
            one.backward(slice(2, 6))
    np.testing.assert_allclose(loop.directions(), wanted.directions(), rtol=1e-12)


def of_one_forward(loop, weights=(1.0, 50.0)):
    with loop.pre.capture():
        f = loop.heads[0](loop.trunk(loop.x))
    return [loop.pre.loss(f, y, weight=w) for w, y in zip(weights, (loop.y, loop.y.flip(0)), strict=True)]


@pytest.mark.parametrize("again", [False, True], ids=["the other", "the same again"])
def test_of_two_losses_on_one_forward_one_is_thrown_away(again):
    loop = Loop()
    losses = of_one_forward(loop)
    losses[not again].backward(retain_graph=True)
    loop.model.zero_grad()
    losses[0].backward()
    wanted = Loop()
    of_one_forward(wanted)[0].backward()
    np.testing.assert_allclose(loop.directions(), wanted.directions(), rtol=1e-12)


def test_projected_gradients_of_two_losses_on_one_forward():
    found = []
    for zeroed in (True, False):
        loop = Loop()
        first, second = of_one_forward(loop, (1.0, 1.0))
        first.backward(retain_graph=True)
        one = loop.gradients()
        if zeroed:
            loop.model.zero_grad()
        second.backward()
        both = loop.gradients()
        other = both if zeroed else [a - b for a, b in zip(both, one, strict=True)]
        loop.set_to(projected(one, other))
        found.append(loop.directions())
    np.testing.assert_allclose(*found, rtol=1e-9)


def test_batches_that_the_loop_steps_on_itself_are_let_go_of():
    """A warm-up without `pre.step()`: what was measured of its batches is of no step to come."""
    loop = Loop()
    optimizer = torch.optim.SGD(loop.parameters, 0.01)
    for _ in range(12):
        optimizer.zero_grad()
        loop.backward(slice(0, 8))
        optimizer.step()
    kept = [loss for shot in loop.pre._pending.shots for loss in shot.losses]
    assert len(kept) < 8
    optimizer.zero_grad()
    loop.backward(slice(0, 8))
    wanted = Loop()
    wanted.model.load_state_dict(loop.model.state_dict())
    wanted.backward(slice(0, 8))
    np.testing.assert_allclose(loop.directions(), wanted.directions(), rtol=1e-12)
