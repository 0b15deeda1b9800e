"""Several draws of a tied table beside those of other layers, for methods that take layers together."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
import torch.nn.functional as F
from torch import nn

import kfaccore as kf
import kfaccore_torch as kt
from kfaccore_torch.folded import _folded

CE = nn.CrossEntropyLoss()
pytestmark = pytest.mark.usefixtures("torch_double")


class Layers(nn.Module):
    """An embedding, a convolution and a linear layer."""

    def __init__(self):
        super().__init__()
        self.e, self.c, self.o = nn.Embedding(6, 4), nn.Conv1d(4, 4, 2), nn.Linear(4, 3)

    def forward(self, i):
        return self.o(torch.tanh(self.c(self.e(i).mT)).mean(2))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.a = nn.Embedding(6, 4), nn.Linear(4, 4)

    def forward(self, i):
        return F.linear(torch.tanh(self.a(self.e(i))), self.e.weight).transpose(1, 2)


def core():
    return kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), kf.Schedules(1e-2), network=kf.TwoLevel(kf.KFAC()))


def test_draws_as_examples_are_the_same_to_a_method_of_all_layers():
    model, i, y = Layers(), torch.randint(0, 6, (5, 4)), torch.arange(5) % 3
    records, grads = kt.records(model, CE, i, y, fisher=kf.type2)
    pre = core()
    found = []
    for given in (records, {name: _folded(record) for name, record in records.items()}):
        state = pre.init(kt.plan(model, i).blocks, np.zeros(1))
        found.append(pre.step(state, {name: [record] for name, record in given.items()}, grads)[0])
    assert next(iter(records.values())).draws == 3
    for name in grads:
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(kf.dense(records[name]), kf.dense(_folded(records[name])), rtol=1e-12)


@pytest.mark.parametrize("how", [{"draws": 1}, {"draws": 2}, {"fisher": kf.type2}, {"fisher": kf.empirical}])
def test_a_tied_table_under_a_method_of_all_layers(how):
    """Examples in another order give the same direction, where none is drawn."""
    i, y = torch.randint(0, 6, (4, 3)), torch.randint(0, 6, (4, 3))
    found = []
    for order in (torch.arange(4), torch.tensor([2, 0, 3, 1])):
        torch.manual_seed(1)
        model = Tied()
        pre = kt.Preconditioner(model, CE, core(), **how)
        with pre.capture():
            f = model(i[order])
        pre.loss(f, y[order]).backward()
        plain = [p.grad.clone() for p in model.parameters()]
        pre.step()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert not any(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True))
    if "fisher" in how:  # labels of Monte-Carlo are drawn by place
        torch.testing.assert_close(*found, rtol=1e-8, atol=1e-10)
