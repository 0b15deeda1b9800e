"""A second look at a batch leaves a model as the first forward left it, and draws the numbers that it drew."""

from __future__ import annotations

import random
import warnings
from collections import Counter, deque
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch import nn

import kfaccore_torch as kt
from kfaccore_torch import held

CE = nn.CrossEntropyLoss()
STEPS = 4


@pytest.fixture(autouse=True)
def _seeded(torch_double):
    random.seed(0)
    np.random.seed(0)


class Net(nn.Module):
    """Moves what `move(self, x)` moves, and is scaled by what that gives."""

    def __init__(self, move):
        super().__init__()
        self.a, self.o, self.move = nn.Linear(3, 8), nn.Linear(8, 3), move
        self.register_buffer("mean", torch.zeros(3))
        self.count, self.hidden, self.past, self.by_name = 0, torch.zeros(3), [], {"n": 0}
        self.recent, self.seen, self.inner = deque(maxlen=2), set(), SimpleNamespace(n=0)
        self.array, self.counter = np.zeros(3), Counter()
        self.torch_rng = torch.Generator().manual_seed(3)
        self.rngs = [random.Random(3), np.random.default_rng(3), np.random.RandomState(3)]

    def forward(self, x):
        return self.o(torch.tanh(self.a(x)) * self.move(self, x))


def moved(m, x):
    m.mean = 0.9 * m.mean + 0.1 * x.mean(0)
    m.hidden.mul_(0.5).add_(x.mean(0))
    m.count += 1
    m.past.append(m.count)
    m.by_name["n"] += 1
    m.by_name[f"at {m.count}"] = x.sum()
    m.recent.append(m.count)
    m.seen.add(m.count)
    m.inner.n += 1
    m.array += 1
    m.counter["n"] += 1
    m.last = x
    return 1.0


def held_by(m):
    return {
        "mean": m.mean.tolist(),
        "hidden": m.hidden.tolist(),
        "array": m.array.tolist(),
        "rest": (m.count, m.past, m.by_name["n"], sorted(m.by_name), list(m.recent), m.seen, m.inner.n, m.counter),
    }


def test_what_a_forward_moves_moves_once_a_step():
    x, y = torch.randn(8, 3) + 3, torch.arange(8) % 3
    model = Net(moved)
    optimizer = kt.Optimizer(model, CE)
    for _ in range(STEPS):
        optimizer.step(x, y)
    right = Net(moved)
    for _ in range(STEPS):
        right(x)
    assert held_by(model) == held_by(right)
    assert model.last is x


@pytest.mark.parametrize(
    "draw",
    [
        lambda m: random.random(),
        lambda m: np.random.rand(),
        lambda m: torch.rand(1).item(),
        lambda m: torch.rand(1, generator=m.torch_rng).item(),
        lambda m: m.rngs[0].random(),
        lambda m: m.rngs[1].random(),
        lambda m: m.rngs[2].rand(),
    ],
)
def test_both_looks_draw_the_same(draw):
    drawn = []
    x, y = torch.randn(8, 3), torch.arange(8) % 3
    model = Net(lambda m, x: drawn.append(draw(m)) or 1.0)
    optimizer = kt.Optimizer(model, CE)
    for _ in range(STEPS):
        optimizer.step(x, y)
    assert drawn[::2] == drawn[1::2]
    assert len(set(drawn)) == STEPS


def test_a_plan_leaves_modules_as_they_are():
    model = Net(moved)
    before = held_by(model)
    kt.plan(model, torch.randn(8, 3))
    assert held_by(model) == before
    assert not hasattr(model, "last")


def test_a_large_tensor_written_by_a_second_look_is_named_once(monkeypatch):
    monkeypatch.setattr(held, "_LARGE", 2)
    looks = []

    def second(m, x):
        looks.append(0)
        if len(looks) == 2:
            m.hidden.add_(1)
        return 1.0

    model = Net(second)
    x, y = torch.randn(8, 3), torch.arange(8) % 3
    optimizer = kt.Optimizer(model, CE)
    with pytest.warns(UserWarning, match=r"wrote to \['hidden'\]"):
        optimizer.step(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(x, y)
