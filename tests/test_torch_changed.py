"""Models that change in the middle of training: a layer's direction is that of a new preconditioner, or it is said."""

from __future__ import annotations

import warnings

import pytest

pytest.importorskip("torch")

import torch
import torch.nn.functional as F
from torch import nn

import kfaccore as kf
import kfaccore_torch as kt

CE = nn.CrossEntropyLoss()
CORE = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), kf.Schedules(1e-2, 0.9))
pytestmark = pytest.mark.usefixtures("torch_double")


class Slim(nn.Module):
    """Any width of its hidden layer."""

    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(3, 8), nn.Linear(8, 3)

    def forward(self, x, k=8):
        return F.linear(torch.tanh(F.linear(x, self.a.weight[:k], self.a.bias[:k])), self.o.weight[:, :k], self.o.bias)


class ByHand(nn.Module):
    """Parameters of no module."""

    def __init__(self):
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(3, 8)), nn.Parameter(torch.randn(8, 3))

    def forward(self, x):
        return torch.tanh(x @ self.w) @ self.v


def directions(pre, model, x, y, *more):
    model.zero_grad()
    with pre.capture():
        f = model(x, *more)
    pre.loss(f, y).backward()
    pre.step()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def preconditioner(model):
    return kt.Preconditioner(model, CE, CORE, fisher=kf.type2)


def batch():
    return torch.randn(16, 3), torch.arange(16) % 3


def grow_head(model):
    model.o.weight.data = torch.cat([model.o.weight.data, torch.randn(2, 8)])
    model.o.bias.data = torch.cat([model.o.bias.data, torch.zeros(2)])


def grow_columns(model):
    model.v.data = torch.cat([model.v.data, torch.randn(8, 2)], 1)


@pytest.mark.parametrize(("make", "grow", "head"), [(Slim, grow_head, "o.weight"), (ByHand, grow_columns, "v")])
def test_a_weight_whose_data_grow_is_planned_anew(make, grow, head):
    model = make()
    pre = preconditioner(model)
    x, y = batch()
    directions(pre, model, x, y)
    grow(model)
    found = directions(pre, model, x, y)[head]
    torch.testing.assert_close(found, directions(preconditioner(model), model, x, y)[head], rtol=1e-9, atol=1e-12)
    assert found.shape == dict(model.named_parameters())[head].shape


class Beside(nn.Module):
    """A parameter of no module beside a layer."""

    def __init__(self):
        super().__init__()
        self.a, self.v = nn.Linear(3, 8), nn.Parameter(torch.randn(8, 3))

    def forward(self, x):
        return torch.tanh(self.a(x)) @ self.v


def test_a_weight_of_no_module_that_grows_does_not_wait_for_the_clocks():
    model = Beside()
    core = kf.Preconditioner(kf.KFAC(), kf.Clocks(10, 10), kf.Schedules(1e-2, 0.9))
    x, y = batch()
    pre = kt.Preconditioner(model, CE, core, fisher=kf.type2)
    for _ in range(3):
        directions(pre, model, x, y)
    grow_columns(model)
    found = directions(pre, model, x, y)["v"]
    new = directions(kt.Preconditioner(model, CE, core, fisher=kf.type2), model, x, y)["v"]
    torch.testing.assert_close(found, new, rtol=1e-9, atol=1e-12)


def test_one_other_use_is_said_and_forgotten():
    model = Slim()
    pre = preconditioner(model)
    x, y = batch()
    directions(pre, model, x, y)
    with pytest.warns(UserWarning, match="'o.weight': elements are used as linear in several arrangements") as said:
        directions(pre, model, x, y, 4)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        directions(pre, model, x, y)  # in one way again
        found = directions(pre, model, x, y)
    new = directions(preconditioner(model), model, x, y)
    for name in found:
        torch.testing.assert_close(found[name], new[name], rtol=1e-9, atol=1e-12)


def test_uses_that_alternate_leave_a_weight_alone():
    """A layer would lose its state at every step; only the first few steps try."""
    model = Slim()
    pre = preconditioner(model)
    x, y = batch()
    with pytest.warns(UserWarning, match="'a.weight'") as said:
        covered = [directions(pre, model, x, y, 8 - i % 2 * 4) and "o" in pre.engine.plan.layers for i in range(20)]
    assert len(said) == 1
    assert not any(covered[6:])


class Tasks(nn.Module):
    """Task 0 classifies tokens, task 1 is a language model whose output layer is the table."""

    def __init__(self):
        super().__init__()
        self.e, self.a, self.c = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6)

    def forward(self, i, task):
        h = torch.tanh(self.a(self.e(i)))
        return (h @ self.e.weight.T if task else self.c(h)).transpose(1, 2)


class SometimesBias(Tasks):
    """Task 1 leaves out a bias."""

    def forward(self, i, task):
        h = self.e(i)
        return self.c(torch.tanh(F.linear(h, self.a.weight) if task else self.a(h))).transpose(1, 2)


def micro_batches(pre, model, order):
    rng = torch.Generator().manual_seed(0)
    i, y = torch.randint(0, 6, (2, 4, 3), generator=rng), torch.randint(0, 6, (2, 4, 3), generator=rng)
    model.zero_grad()
    for task in order:
        with pre.capture():
            f = model(i[task], task)
        (0.5 * pre.loss(f, y[task])).backward()
    pre.step()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    ("kind", "layer"), [(Tasks, "'e', embedding of 4 x 6"), (SometimesBias, "'a', linear of 4 x 5")]
)
@pytest.mark.parametrize("method", [kf.KFAC(), kf.EKFAC(), kf.SINGD(), kf.CGFAC(), kf.Exact(), kf.Diagonal()])
def test_a_way_that_only_the_second_micro_batch_shows(kind, layer, method):
    core = kf.Preconditioner(method, kf.Clocks(1, 1), kf.Schedules(1e-2, 0.9))
    found = []
    for order in ((0, 1), (1, 0)):
        torch.manual_seed(1)
        model = kind()
        pre = kt.Preconditioner(model, CE, core, fisher=kf.type2)
        if order == (0, 1):
            with pytest.raises(ValueError, match=f"layer {layer}.*take the whole step again"):
                micro_batches(pre, model, order)
        found.append(micro_batches(pre, model, order))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
