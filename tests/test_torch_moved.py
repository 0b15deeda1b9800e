"""Parameters that a forward itself writes to, or binds anew, are state of it as buffers are."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
import torch.nn.functional as F
from torch import nn

import kfaccore as kf
import kfaccore_torch as kt

CE = nn.CrossEntropyLoss()
pytestmark = pytest.mark.usefixtures("torch_double")


class Momentum(nn.Module):
    """A query encoder, and the average of its weights in the past, which the forward moves by `move(m, old, new)`."""

    def __init__(self, move, kind):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.move, self.hidden = nn.Linear(3, 4), move, []
        k = self.q.weight.detach().clone()
        if kind == "buffer":
            self.register_buffer("k", k)
        elif kind == "in a list":
            self.hidden.append(nn.Linear(3, 4, bias=False))
            self.hidden[0].weight = nn.Parameter(k, requires_grad=False)
        else:
            self.k = nn.Parameter(k, requires_grad=False)

    @property
    def key(self):
        return self.hidden[0].weight if self.hidden else self.k

    def forward(self, a, b):
        with torch.no_grad():
            self.move(self, self.key, self.q.weight)
            k = b @ self.key.T
        return F.normalize(self.q(a), dim=1) @ F.normalize(k, dim=1).T / 0.2


def with_data(m, k, q):
    k.data = k.data * 0.9 + q.data * 0.1


def by_data(m, k, q):
    k.data.mul_(0.9).add_(q.data, alpha=0.1)


def out(m, k, q):
    torch.add(k.mul(0.9), q, alpha=0.1, out=k)


def of_lists(m, k, q):
    torch._foreach_lerp_([k], [q], 0.1)


def rows(m, k, q):
    view = k.detach().view(-1, 3)
    for i in range(4):
        view[i] = view[i] * 0.9 + q[i] * 0.1


def both(m, k, q):
    k *= 0.9
    k.data = k.data + q.data * 0.1


def loaded(m, k, q):
    m.load_state_dict({**m.state_dict(), "k": k * 0.9 + q * 0.1})


def bound(m, k, q):
    m.k = nn.Parameter(k * 0.9 + q * 0.1, requires_grad=False)


def lerp(m, k, q):
    k.lerp_(q, 0.1)


WAYS = [with_data, by_data, out, of_lists, rows, both, loaded, bound, lerp]


def trained(move, kind, step):
    model = Momentum(move, kind)
    optimizer = kt.Optimizer(model, CE, kf.Preconditioner(kf.KFAC(), step=step))
    rng = torch.Generator().manual_seed(1)
    for _ in range(4):
        a, b = torch.randn(2, 5, 3, generator=rng)
        optimizer.step((a, b), torch.arange(5))
    return np.concatenate([model.q.weight.detach().numpy(), model.key.detach().numpy()])


@pytest.mark.parametrize("move", WAYS, ids=lambda f: f.__name__)
def test_a_frozen_parameter_that_a_forward_moves_is_a_buffer(move):
    wanted = trained(lerp if move is bound else move, "buffer", kf.SelfTuning())
    kinds = ["parameter", "in a list"] if move in (with_data, by_data, lerp) else ["parameter"]
    for kind in kinds:
        np.testing.assert_allclose(trained(move, kind, kf.SelfTuning()), wanted, rtol=1e-12, err_msg=kind)


class ActNorm(nn.Module):
    """Gains and biases that begin as the first batch says."""

    def __init__(self, begin):
        super().__init__()
        self.loc, self.scale = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.ones(4))
        self.register_buffer("begun", torch.tensor(0))
        self.begin = begin

    def forward(self, x):
        if not self.begun.item():
            with torch.no_grad():
                self.begin(self, -x.mean(0), 1 / (x.std(0) + 1e-6))
            self.begun.fill_(1)
        return self.scale * (x + self.loc)


def copied(m, loc, scale):
    m.loc.data.copy_(loc)
    m.scale.data.copy_(scale)


def given(m, loc, scale):
    m.loc.data, m.scale.data = loc, scale


def added(m, loc, scale):
    m.loc += loc
    m.scale *= scale


@pytest.mark.parametrize("begin", [copied, given, added])
def test_weights_that_begin_as_data_say_keep_their_step(begin):
    """As where a forward before the first step has begun them."""
    found = []
    for before in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), ActNorm(begin), nn.Tanh(), nn.Linear(4, 3))
        x, y = torch.randn(8, 3), torch.arange(8) % 3
        optimizer = kt.Optimizer(model, CE)
        if before:
            model(x)
        for _ in range(3):
            optimizer.step(x, y)
        found.append({name: p.detach().numpy().copy() for name, p in model.named_parameters()})
    for name, p in found[0].items():
        np.testing.assert_array_equal(p, found[1][name], err_msg=name)


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n = nn.Linear(3, 3), nn.Parameter(torch.zeros(3), requires_grad=False)

    def forward(self, x):
        f = self.a(x)
        self.n += F.one_hot(f.argmax(1), 3).sum(0)
        return f


def test_a_plan_and_a_stream_leave_counts_as_they_are():
    model, x = Counts(), torch.randn(5, 3)
    kt.plan(model, x)
    assert model.n.tolist() == [0, 0, 0]
    list(kt.Stream(model, CE, [(x, torch.arange(5) % 3)] * 2))
    assert model.n.tolist() == [0, 0, 0]
