"""What a forward moves in slots, in an array of numbers, or in the arguments of a partial, moves once a step."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from functools import partial

import pytest

pytest.importorskip("torch")

import torch
from torch import nn

import kfaccore_torch as kt

STEPS = 5


@dataclass(slots=True)
class Meter:
    n: int = 0
    late: object = field(init=False)


class Named(Meter):
    __slots__ = ("__own", "numbers")

    def __init__(self):
        super().__init__()
        self.__own = 0
        self.numbers = torch.zeros(2, dtype=torch.float64)

    def move(self):
        self.__own += 1
        self.n += 2
        self.numbers.add_(1)
        self.late = self.__own
        return self.__own, self.n, self.numbers.tolist()


def counted(a, held, *, by):
    a[0] += 1
    held.n += 1
    by["n"] += 1
    return a[0], held.n, by["n"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(3, 3, dtype=torch.float64)
        self.meter, self.numbers = Named(), array("d", [0.0, float("nan")])
        self.step = partial(counted, [0], Meter(), by={"n": 0})
        self.seen = []

    def forward(self, x):
        self.numbers[0] += 1
        moves = (*self.meter.move(), *self.step(), self.numbers[0])
        self.seen.append(moves)
        return self.line(x) + moves[0] * 0.01


def test_each_moves_once_a_step(torch_double):
    torch.manual_seed(0)
    model = Net()
    x, y = torch.randn(6, 3), torch.arange(6) % 3
    optimizer = kt.Optimizer(model, nn.CrossEntropyLoss())
    for _ in range(STEPS):
        optimizer.step(x, y)
    right = Net()
    for _ in range(STEPS):
        right(x)
    assert model.seen == right.seen
    assert model.meter.late == STEPS
    assert model.numbers[0] == STEPS


def test_what_a_first_forward_binds_is_not_there_at_the_second():
    model = Net()
    kt.plan(model, torch.randn(6, 3, dtype=torch.float64))
    assert model.seen == []
    assert not hasattr(model.meter, "late")
