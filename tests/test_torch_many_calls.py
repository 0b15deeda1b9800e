"""Many small calls of a layer, and rows that only some examples have, are asked and recorded as one call is."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import nn

import kfaccore as kf
import kfaccore_torch as kt
from kfaccore_torch.scaled import Asked

CE = nn.CrossEntropyLoss()


class Bags(nn.Module):
    """Sets of any sizes, one call each."""

    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, *bags):
        return torch.stack([self.o(torch.tanh(self.a(x)).sum(0)) for x in bags])


class Pixels(nn.Module):
    """Logits of the pixels that count."""

    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, x, there):
        return self.c(torch.tanh(self.a(x)))[there]


def bags(count):
    torch.manual_seed(0)
    sizes = [2 + i % 5 for i in range(count)]
    return tuple(torch.randn(n, 3, dtype=torch.float64) for n in sizes), torch.arange(count) % 3, sizes


def test_a_record_has_the_rows_of_all_calls_padded_once():
    model = Bags().double()
    x, y, sizes = bags(16)
    found, _ = kt.records(model, CE, x, y, fisher=kf.type2)
    record = found["a"]
    assert record.a.shape == (1, 16, max(sizes), 4)
    assert np.asarray(record.mask).sum(1).tolist() == sizes
    for i, bag in enumerate(x):
        rows = np.asarray(record.a)[0, i][np.asarray(record.mask)[i]]
        np.testing.assert_array_equal(rows, np.concatenate([bag.numpy(), np.ones((len(bag), 1))], 1))


@pytest.mark.parametrize("draws", ["draws", "own"])
def test_the_question_is_asked_of_layers_and_not_of_calls(draws, monkeypatch):
    """Comparisons grow with the digits of the examples' numbers alone."""
    counted = []
    compared = Asked.scaled_by
    monkeypatch.setattr(Asked, "scaled_by", lambda *given: counted.append(1) or compared(*given))
    seen = []
    for count in (17, 31):  # of five digits both
        model = Bags().double()
        x, y, _ = bags(count)
        counted.clear()
        if draws == "own":
            kt.Optimizer(model, CE).step(x, y)
        else:
            kt.records(model, CE, x, y)
        seen.append(len(counted))
    assert seen[0] == seen[1]


def test_masked_pixels_pad_no_example_and_are_those_of_ignored_labels():
    """Rows that no example has are in the mean of inputs, and few positions of any."""
    torch.manual_seed(0)
    x = torch.randn(2, 12, 12, 3, dtype=torch.float64)
    there = torch.zeros(2, 12, 12, dtype=torch.bool)
    there[:, ::6, ::6] = True  # runs of many that are not there
    there[0, 3, 3] = True
    y = torch.randint(0, 3, (2, 12, 12))
    model = Pixels().double()
    found, _ = kt.records(model, CE, (x, there), y[there], fisher=kf.type2)
    rows = 2 * 144
    assert found["c"].batch == int(there.sum())
    assert found["c"].shared == rows // int(there.sum())
    directions = []
    for picked in (True, False):
        core = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), kf.Schedules(0.1, 0.0))
        model.zero_grad()
        pre = kt.Preconditioner(model, CE, core, fisher=kf.type2)
        with pre.capture():
            f = model(x, there) if picked else model(x, slice(None)).reshape(-1, 3)
        target = y[there] if picked else y.masked_fill(~there, -100).reshape(-1)
        pre.loss(f, target).backward()
        pre.step()
        directions.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*directions, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_micro_batch_costs_the_same_however_many_came_before():
    """By the calls of Python that it makes, from its forward to the end of its backward pass."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    pre = kt.Preconditioner(model, nn.CrossEntropyLoss(), kf.Preconditioner(kf.KFAC()), fisher=kf.type2)
    x, y = torch.randn(4, 3), torch.arange(4) % 3
    counted = []

    def micro():
        with pre.capture():
            f = model(x)
        (pre.loss(f, y) / 150).backward()

    for i in range(150):
        if i in (20, 139):
            counted.append(0)
            sys.setprofile(lambda frame, event, arg: counted.__setitem__(-1, counted[-1] + ("call" in event)))
        try:
            micro()
        finally:
            sys.setprofile(None)
    assert counted[1] <= 1.05 * counted[0]


GROUPED = getattr(torch.nn.functional, "grouped_mm", getattr(torch, "_grouped_mm", None))


class Experts(nn.Module):
    """Each token goes to one expert: called one by one, or all in one product of tokens sorted by expert."""

    def __init__(self, together):
        super().__init__()
        torch.manual_seed(0)
        self.router, self.together = nn.Linear(8, 5), together
        self.up, self.down = (nn.Parameter(torch.randn(5, 8, 8) * 0.4) for _ in range(2))

    def forward(self, x):
        weight, expert = self.router(x).softmax(1).max(1)
        if self.together:
            order = expert.argsort(stable=True)
            ends = torch.bincount(expert, minlength=5).cumsum(0).to(torch.int32)
            h = GROUPED(x[order], self.up.mT, offs=ends).relu()
            y = GROUPED(h, self.down.mT, offs=ends) * weight[order, None]
            return x.index_add(0, order, y)
        for i in range(5):
            chosen = (expert == i).nonzero()[:, 0]
            if len(chosen):
                h = nn.functional.linear(x[chosen], self.up[i]).relu()
                x = x.index_add(0, chosen, nn.functional.linear(h, self.down[i]) * weight[chosen, None])
        return x


@pytest.mark.skipif(GROUPED is None, reason="torch without grouped products")
@pytest.mark.parametrize("method", [kf.KFAC(), kf.EKFAC()], ids=["KFAC", "EKFAC"])
def test_a_product_grouped_by_expert_is_a_call_of_each(method):
    """In single precision, which the product is for; some experts get no token in some batches."""
    found = []
    for together in (False, True):
        model = Experts(together)
        pre = kt.Preconditioner(model, CE, kf.Preconditioner(method, kf.Clocks(1, 1)), fisher=kf.type2)
        noise = torch.Generator().manual_seed(1)
        for _ in range(4):
            x = torch.randn(6, 8, generator=noise)
            model.zero_grad()
            with pre.capture():
                f = model(x)
            pre.loss(f, torch.arange(6)).backward()
            pre.step()
            found.append([p.grad.clone() for p in model.parameters()])
    assert len(pre.engine.plan.layers) == 11
    torch.testing.assert_close(found[4:], found[:4], rtol=1e-5, atol=1e-6)
