"""One graph, and other calls at its nodes: what was found of a batch is not laid to the calls of another."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch import nn

import kfaccore as kf
import kfaccore_torch as kt

CE = nn.CrossEntropyLoss()
pytestmark = pytest.mark.usefixtures("torch_double")


class Net(nn.Module):
    """Six parts of three examples, in an order that Python decides."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.o = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.other = nn.Linear(3, 4)


class OneByOne(Net):
    def forward(self, x, own):
        sums = [0.0] * 3
        for part, example in zip(x, own, strict=True):
            sums[example] = sums[example] + torch.tanh(self.a(part))
        return self.o(torch.stack(sums))


class Ranked(Net):
    def forward(self, x, order):
        done = {i: torch.tanh(self.a(x[i : i + 1])) for i in order}
        return self.o(torch.cat([done[2 * b] + done[2 * b + 1] for b in range(3)]))


class Kinds(Net):
    def forward(self, x, kinds):
        rows = [None] * 6
        for kind, encoder in enumerate((self.a, self.other)):
            mine = [i for i in range(6) if kinds[i] == kind]
            for i, h in zip(mine, torch.tanh(encoder(x[mine])), strict=True):
                rows[i] = h
        return self.o(torch.stack(rows).view(3, 2, 4).sum(1))


class Parts(Net):
    """Parts of one call, each called again by itself."""

    def forward(self, x, order):
        parts = torch.tanh(self.a(x)).split(1)
        return self.o(torch.cat([torch.tanh(self.b(parts[i])) for i in order]).view(3, 2, 4).sum(1))


class Half(Net):
    """Half of the rows are predicted."""

    def forward(self, x, half):
        return self.o(torch.tanh(self.a(x))).chunk(2)[half]


ORDERS = [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 4, 0, 1, 5, 3]]
CASES = {
    "one by one": (OneByOne, [[0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 2, 2], [0, 1, 2, 0, 1, 2]]),
    "ranked": (Ranked, ORDERS),
    "kinds": (Kinds, [[0, 0, 1, 0, 1, 1], [1, 1, 0, 1, 0, 0], [0, 1, 1, 0, 0, 1]]),
    "parts": (Parts, ORDERS),
    "half": (Half, [0, 1, 0]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_record_is_that_of_its_own_batch(name):
    make, ways = CASES[name]
    model, y = make(), torch.tensor([0, 2, 1])
    ways = [ways[i] for i in (0, 0, 1, 0, 2, 1, 2)]
    data = [((torch.randn(6, 3), way), y) for way in ways]
    for (inputs, target), records in zip(data, kt.Stream(model, CE, data, kf.type2), strict=True):
        fresh, _ = kt.records(model, CE, inputs, target, fisher=kf.type2)
        for layer, record in fresh.items():
            for of in (kf.expand, kf.reduce):
                seen, want = of(records[layer]), of(record)
                np.testing.assert_allclose(kf.dense(seen), kf.dense(want), rtol=1e-12, atol=1e-15)
            assert records[layer].batch == record.batch
            np.testing.assert_allclose(kf.dense(records[layer]), kf.dense(record), rtol=1e-12, atol=1e-15)
