"""Parts frozen for a while: layers keep their averages, the rest its optimizer, and a run resumes across it."""

from __future__ import annotations

import copy

import numpy as np
import pytest

import kfaccore as kf

torch = pytest.importorskip("torch")
kt = pytest.importorskip("kfaccore_torch")
from torch import nn  # noqa: E402

DATA = [(np.random.default_rng(i).normal(size=(8, 3)) * (1 + i), np.arange(8) % 3) for i in range(12)]
DATA = [(torch.tensor(x), torch.tensor(y)) for x, y in DATA]


pytestmark = pytest.mark.usefixtures("torch_double")


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.two(self.one(x).tanh())


class Bare(nn.Module):
    """Layers that only a forward shows, and a scale that is none."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(5, 3))
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return torch.einsum("bi,io->bo", (x @ self.one).tanh(), self.two) * self.scale.exp()


def made(kind, clocks=None, **more):
    torch.manual_seed(1)
    model = kind()
    core = kf.Preconditioner(kf.KFAC(), clocks or kf.Clocks(1, 1), kf.Schedules(1e-2, 0.9))
    return model, kt.Preconditioner(model, nn.CrossEntropyLoss(), core, fisher=kf.type2, **more)


def taken(model, pre, i, off=()):
    """Directions by parameter, those of `off` left out."""
    x, y = DATA[i]
    model.zero_grad()
    with pre.capture():
        f = model(x)
    pre.loss(f, y).backward()
    for name, p in model.named_parameters():
        if name.split(".")[0] in off:
            p.grad = None
    pre.step()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def frozen(model, names):
    for name, p in model.named_parameters():
        p.requires_grad_(name.split(".")[0] not in names)


def same(got, want):
    assert got.keys() == want.keys()
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("kind", [Plain, Bare])
@pytest.mark.parametrize("clocks", [kf.Clocks(1, 1), kf.Clocks(1, 100), kf.Clocks(1, 3)], ids=str)
def test_frozen_in_turn_is_as_without_a_gradient_in_turn(kind, clocks):
    more = {"uncovered": kf.Diagonal()}
    model, pre = made(kind, clocks, **more)
    twin, whole = made(kind, clocks, **more)
    for i in range(9):
        off = {("one", "two")[i % 2]} if i else set()
        frozen(model, off)
        same(taken(model, pre, i), taken(twin, whole, i, off))
        assert pre.info.refreshed == whole.info.refreshed


def test_a_captured_forward_of_a_frozen_part_changes_nothing():
    model, pre = made(Plain)
    twin, whole = made(Plain)
    for i in range(3):
        taken(model, pre, i)
        taken(twin, whole, i)
    frozen(model, {"one"})
    with torch.no_grad(), pre.capture():
        model(DATA[0][0])
    frozen(model, ())
    same(taken(model, pre, 3), taken(twin, whole, 3))


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 5)
        self.heads = nn.ModuleList(nn.Linear(5, 3) for _ in range(5))

    def forward(self, x, task):
        return self.heads[task](self.body(x).tanh())


def test_five_heads_in_turn_are_each_refreshed_when_they_come():
    def directions(clocks):
        model, pre = made(Heads, clocks)
        for i in range(10):
            x, y = DATA[i]
            model.zero_grad()
            with pre.capture():
                f = model(x, i % 5)
            pre.loss(f, y).backward()
            pre.step()
            yield model.heads[i % 5].weight.grad.clone()

    for got, want in zip(directions(kf.Clocks(1, 5)), directions(kf.Clocks(1, 1)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_a_head_that_never_meets_an_update_is_measured_after_its_first_step():
    model, pre = made(Heads, kf.Clocks(10, 100))
    wanted = []
    for i in range(4):
        x, y = DATA[i]
        model.zero_grad()
        wanted.append(pre.engine.due)
        with pre.capture():
            f = model(x, i % 2)
        pre.loss(f, y).backward()
        raw = model.heads[i % 2].weight.grad.clone()
        pre.step()
    assert wanted == [True, False, True, True]
    assert not torch.allclose(raw, model.heads[1].weight.grad)


@pytest.mark.parametrize("kind", [Plain, Bare])
@pytest.mark.parametrize("way", ["dict", "file"])
@pytest.mark.parametrize("when", ["saved", "loaded", "both"])
def test_a_run_resumes_across_a_freeze(kind, way, when, tmp_path):
    """Against a run that was never interrupted, with the same parts frozen at the same steps."""
    steps = [set(), set(), {"one"}, {"one"}, set(), set()]
    stop = {"saved": 4, "loaded": 2, "both": 3}[when]
    model, pre = made(kind, uncovered=kf.Diagonal())
    for i, off in enumerate(steps[:stop]):
        frozen(model, off)
        taken(model, pre, i)
    again, other = made(kind, uncovered=kf.Diagonal())
    frozen(again, steps[stop])
    if way == "dict":
        other.load_state_dict(copy.deepcopy(pre.state_dict()))
    else:
        for p in again.parameters():
            p.data.zero_()
        pre.save(tmp_path / "state")
        other.load(tmp_path / "state")
        same(dict(again.named_parameters()), dict(model.named_parameters()))
    for i, off in list(enumerate(steps))[stop:]:
        frozen(model, off)
        frozen(again, off)
        same(taken(again, other, i), taken(model, pre, i))


def test_what_was_frozen_from_the_start_begins_anew(tmp_path):
    model, pre = made(Plain, kf.Clocks(1, 5))
    frozen(model, {"one"})
    taken(model, pre, 0)
    again, other = made(Plain, kf.Clocks(1, 5))
    other.load_state_dict(pre.state_dict())
    frozen(model, ())
    same(taken(again, other, 1), taken(model, pre, 1))
    pre.save(tmp_path / "whole")
    frozen(model, {"one"})
    pre.report()
    again, other = made(Plain)
    frozen(again, {"one"})
    other = kt.Preconditioner(again, nn.CrossEntropyLoss())
    other.save(tmp_path / "part")
    with pytest.warns(UserWarning, match=r"no parameters of layers \['one'\], which were frozen"):
        made(Plain)[1].load(tmp_path / "part")


def test_a_network_level_method_says_that_it_has_one_state():
    def of(off):
        torch.manual_seed(1)
        model = Plain()
        frozen(model, off)
        return model, kt.Preconditioner(model, nn.CrossEntropyLoss(), kf.Preconditioner(network=kf.TwoLevel(kf.KFAC())))

    model, pre = of(())
    taken(model, pre, 0)
    with pytest.raises(ValueError, match="one state of all its layers"):
        of({"one"})[1].load_state_dict(pre.state_dict())


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Plain()
        self.a, self.b = nn.Parameter(torch.tensor(0.1)), nn.Parameter(torch.tensor(0.2))

    def forward(self, x):
        return self.net(x * self.b.exp()) * self.a.exp()


def groups(parameters):
    found = list(parameters)
    return torch.optim.Adam([{"params": [p]} for p in found] if len(found) > 1 else found, lr=1e-2)


@pytest.mark.parametrize("make", [lambda p: torch.optim.Adam(p, lr=1e-2), groups], ids=["one", "two"])
def test_the_optimizer_of_the_rest_stays_when_a_parameter_is_frozen(make):
    torch.manual_seed(0)
    model = Scaled()
    optimizer = kt.Optimizer(model, nn.CrossEntropyLoss(), rest=make)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer.rest, 0.5)
    for i in range(6):
        model.b.requires_grad_(i not in (3, 4))
        before = model.b.item()
        if i == 3:
            model.b.grad = torch.tensor(1.0)  # of someone else
        optimizer.step(*DATA[i])
        schedule.step()
        assert (model.b.item() == before) == (i in (3, 4))
        assert [group["lr"] for group in optimizer.rest.param_groups] == schedule.get_last_lr()
    assert schedule.get_last_lr()[0] == pytest.approx(1e-2 / 2**6)
    assert [int(optimizer.rest.state[p]["step"]) for p in (model.a, model.b)] == [6, 4]


def test_the_rest_resumes_across_a_freeze():
    def of(off):
        torch.manual_seed(0)
        model = Scaled()
        frozen(model, off)
        return model, kt.Optimizer(model, nn.CrossEntropyLoss(), rest=lambda p: torch.optim.Adam(p, lr=1e-2))

    for first, second in (((), {"b"}), ({"b"}, ()), ((), {"a", "b"}), ({"a", "b"}, ())):
        model, optimizer = of(first)
        optimizer.step(*DATA[0])
        again, other = of(second)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        again.load_state_dict(model.state_dict())
        for i, off in enumerate([second, ()], 1):
            for net, it in ((model, optimizer), (again, other)):
                frozen(net, off)
                it.step(*DATA[i])
        same(dict(again.named_parameters()), dict(model.named_parameters()))
