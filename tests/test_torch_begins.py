"""A second look at a batch begins with what the first began with: networks that carry something between batches."""

from __future__ import annotations

import itertools
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch import nn

import kfaccore as kf
import kfaccore_torch as kt
from kfaccore_torch import held

CE = nn.CrossEntropyLoss()
pytestmark = pytest.mark.usefixtures("torch_double")


class Carries(nn.Module):
    """A recurrent network; its state is bound anew, written to, or given and returned."""

    def __init__(self, way):
        super().__init__()
        self.way, self.r, self.o = way, nn.RNN(3, 8, batch_first=True), nn.Linear(8, 2)
        if way == "buffer":
            self.register_buffer("h", torch.zeros(1, 8, 8))
        else:
            self.h = torch.zeros(1, 8, 8)

    def forward(self, x, h=None):
        z, new = self.r(x, self.h.clone() if h is None else h)
        if h is not None:
            self.new = new.detach()
        elif self.way == "bound":
            self.h = new.detach()
        elif self.way == "past .data":
            self.h.data.copy_(new.detach())
        else:
            self.h.copy_(new.detach())
        return self.o(z).transpose(1, 2)


def trained(way, rule):
    torch.manual_seed(0)
    model = Carries(way)
    optimizer = kt.Optimizer(model, CE, kf.Preconditioner(kf.KFAC(), step=rule))
    h = model.h
    losses = []
    for _ in range(8):
        x = torch.randn(8, 5, 3)
        y = (x.cumsum(1)[..., 0] > 0).long()
        losses.append(float(optimizer.step((x, h) if way == "given" else x, y)))
        h = model.new if way == "given" else h
    return losses


@pytest.mark.parametrize("rule", [kf.SelfTuning(), kf.LineSearch()])
@pytest.mark.parametrize("way", ["bound", "written", "past .data", "buffer"])
def test_a_state_that_is_carried_is_one_that_is_handed_in(way, rule):
    assert trained(way, rule) == pytest.approx(trained("given", rule), rel=1e-9)


@pytest.mark.parametrize("way", ["written", "buffer"])
def test_large_states_are_copied_where_forwards_write_to_them(way, monkeypatch):
    monkeypatch.setattr(held, "_LARGE", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trained(way, kf.SelfTuning()) == pytest.approx(trained("given", kf.SelfTuning()), rel=1e-9)


class Reads(nn.Module):
    """Scales its logits by what `read(self)` gives; `seen` by both looks."""

    def __init__(self, read, of):
        super().__init__()
        self.a, self.o, self.read, self.of = nn.Linear(3, 4), nn.Linear(4, 3), read, of
        self.register_buffer("table", torch.arange(6.0))

    def forward(self, x):
        number = float(self.read(self))
        SEEN.append(number)
        return self.o(torch.tanh(self.a(x))) * (1 + 0.01 * number)


SEEN: list[float] = []


def deep(levels):
    root = node = SimpleNamespace(n=0)
    for _ in range(levels):
        node.inner = SimpleNamespace(n=0)
        node = node.inner
    return root, node


def counted(node):
    node.n += 1
    return node.n


def array(m):
    m.of += 1
    return m.of[0]


def byte(m):
    m.of[0] += 1
    return m.of[0]


READS = {
    "count": (lambda m: next(m.of), lambda: itertools.count()),
    "range": (lambda m: next(m.of), lambda: iter(range(99))),
    "list": (lambda m: next(m.of), lambda: iter(list(range(99)))),
    "in a list": (lambda m: next(m.of[0]), lambda: [itertools.count()]),
    "in a dict": (lambda m: next(m.of["ids"]), lambda: {"ids": iter((5, 6, 7, 8))}),
    "array": (array, lambda: np.zeros(2)),
    "bytes": (byte, lambda: bytearray(4)),
    "deep": (lambda m: counted(m.of[1]), lambda: deep(9)),
    "appended": (lambda m: m.of.append(0) or len(m.of), list),
    "buffer": (lambda m: m.table.add_(1)[0], lambda: None),
}


@pytest.mark.parametrize("name", READS)
def test_both_looks_read_the_same_and_move_it_once(name):
    read, of = READS[name]
    SEEN.clear()
    model, x, y = Reads(read, of()), torch.randn(6, 3), torch.arange(6) % 3
    kt.plan(model, x)
    SEEN.clear()
    optimizer = kt.Optimizer(model, CE)
    for _ in range(3):
        optimizer.step(x, y)
    fresh = Reads(read, of())
    assert SEEN[::2] == SEEN[1::2] == [float(read(fresh)) for _ in range(3)]


@pytest.mark.parametrize(
    "of", [lambda: (i for i in range(99)), lambda: map(float, range(99)), lambda: enumerate("abcdefgh")]
)
def test_iterators_that_cannot_be_put_back_are_named_once(of):
    def read(m):
        found = next(m.of)
        return found[0] if isinstance(found, tuple) else found

    model, x, y = Reads(read, of()), torch.randn(6, 3), torch.arange(6) % 3
    optimizer = kt.Optimizer(model, CE)
    with pytest.warns(UserWarning, match=r"read from \['of'\], iterators that cannot be put back"):
        optimizer.step(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(x, y)


def test_what_shares_memory_with_a_parameter_is_as_the_step_has_made_it():
    """The loss after the step is at the new weights, however many names they have."""
    found = []
    for shares in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
        if shares:
            model[0].raw = model[0].weight.data
            model[2].raw = model[2].weight.detach()[:2]
        optimizer = kt.Optimizer(model, CE)
        x, y = torch.randn(6, 3), torch.arange(6) % 3
        found.append([float(optimizer.step(x, y)) for _ in range(5)])
    assert found[0] == found[1]
