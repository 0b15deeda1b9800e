"""Whose row it is, confirmed for every example alike: those whose number in a pass is small are looked at as well."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch import nn

import kfaccore as kf
import kfaccore_torch as kt

CE = nn.CrossEntropyLoss()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class Net(nn.Module):
    """Rows of `a` go through `way`."""

    def __init__(self, way):
        super().__init__()
        self.a, self.o, self.way = nn.Linear(3, 4), nn.Linear(4, 3), way

    def forward(self, x):
        return self.o(torch.tanh(self.way(self.a(x))))


def centred(first, last):
    """Some rows are centred among themselves, as those of one domain or one task."""

    def way(h):
        part = h[first:last]
        return torch.cat([h[:first], part - part.mean(0), h[last:]])

    return way


MIXED = {
    "the first of 128": (128, centred(0, 40)),
    "the first two of 64": (64, centred(0, 2)),
    "the last of 128": (128, centred(88, 128)),
    "two views of 128": (256, lambda h: h + h.roll(128, 0)),
    "two views of 100": (200, lambda h: h + h.roll(100, 0)),
    "two views of 512": (1024, lambda h: h + h.roll(512, 0)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MIXED)
def test_examples_that_are_mixed_are_seen_wherever_they_stand(name, dtype):
    batch, way = MIXED[name]
    x, y = torch.randn(batch, 3, dtype=dtype), torch.randint(0, 3, (batch,))
    records, _ = kt.records(Net(way).to(dtype), CE, x, y)
    assert records["a"].batch == 1
    assert records["o"].batch == batch


class Words(nn.Module):
    """Two words an example, told apart by `own`."""

    def __init__(self, own):
        super().__init__()
        self.a, self.o, self.own = nn.Linear(3, 4), nn.Linear(4, 3), own

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.o(h.new_zeros(len(x) // 2, 4).index_add(0, self.own, h))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("first", "batch"), [(0, 128), (0, 64), (54, 64), (100, 300)])
def test_words_in_another_order_are_those_of_their_example(first, batch, dtype):
    """The words of ten examples come in another order than all others."""
    own = torch.arange(batch).repeat_interleave(2)
    own[2 * first : 2 * first + 20] = own[2 * first : 2 * first + 20].view(10, 2).T.reshape(-1)
    model = Words(own).to(dtype)
    x, y = torch.randn(2 * batch, 3, dtype=dtype), torch.randint(0, 3, (batch,))
    asked, _ = kt.records(model, CE, x, y, fisher=kf.type2)
    told, _ = kt.records(model, CE, x, y, fisher=kf.type2, examples={"a": own, "o": torch.arange(batch)})
    for found in (kf.dense, lambda record: kf.reduce(record).a):
        np.testing.assert_array_equal(found(asked["a"]), found(told["a"]))


def test_gradients_that_are_cut_off_are_no_other_examples():
    """1e-30 times 2^-32 is no number of 32 bits."""

    class Faint(Net):
        def forward(self, x):
            return self.o(torch.tanh(x)) + 1e-30 * self.a(x)

    model = Faint(None)
    model.o = nn.Linear(3, 4)
    records, _ = kt.records(model, CE, torch.randn(64, 3), torch.randint(0, 4, (64,)))
    assert records["a"].batch == records["o"].batch == 64
