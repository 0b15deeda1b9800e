"""Ragged rows of examples: padded for what looks at examples, as they are for what does not; the direction is one."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch
from torch import nn

import kfaccore as kf
import kfaccore_torch as kt
from kfaccore_torch import bags, layout, places

CE = nn.CrossEntropyLoss()
LENGTHS = torch.tensor([20, 1, 2, 0, 3, 1])
OWNER = torch.arange(6).repeat_interleave(LENGTHS)
STARTS = LENGTHS.cumsum(0) - LENGTHS
pytestmark = pytest.mark.usefixtures("torch_double")


class Graphs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.o(torch.zeros(6, 5).index_add(0, OWNER, torch.tanh(self.a(x))))


class Bags(nn.Module):
    """Two bags an example if `twice`."""

    def __init__(self, twice=False, **how):
        super().__init__()
        self.e, self.o, self.twice = nn.EmbeddingBag(7, 4, **how), nn.Linear(8 if twice else 4, 3), twice

    def forward(self, i):
        h = torch.tanh(self.e(i, STARTS))
        return self.o(h.reshape(3, 8) if self.twice else h)


def ids():
    return torch.randint(0, 7, (len(OWNER),))


CASES = {
    "graphs": (Graphs, lambda: torch.randn(len(OWNER), 4), {}),
    "graphs, some of nobody": (
        Graphs,
        lambda: torch.randn(len(OWNER), 4),
        {"examples": torch.where(torch.arange(len(OWNER)) % 7 == 3, -1, OWNER)},
    ),
    "bags, sum": (lambda: Bags(mode="sum"), ids, {}),
    "bags, mean": (lambda: Bags(mode="mean", padding_idx=2), ids, {}),
    "bags, two an example": (lambda: Bags(True), ids, {}),
}


def directions(make, x, told, method):
    torch.manual_seed(1)
    model = make()
    pre = kt.Preconditioner(model, CE, kf.Preconditioner(method, kf.Clocks(1, 1), kf.Schedules(1e-2)), fisher=kf.type2)
    for _ in range(2):
        model.zero_grad()
        with pre.capture(**told):
            f = model(x)
        pre.loss(f, torch.arange(len(f)) % 3).backward()
        pre.step()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def padded_nowhere(monkeypatch):
    def refuse(*_):
        raise AssertionError("a padded layout was made")

    monkeypatch.setattr(places.Groups, "index", property(refuse))
    monkeypatch.setattr("kfaccore_torch.lookup.padded", refuse)


PAIRS = [(case, method) for case in CASES for method in (kf.KFAC(), kf.EKFAC())]
PAIRS += [(case, kf.KFAC(sharing=kf.reduce)) for case in CASES if "graphs" in case]  # it takes no table


@pytest.mark.parametrize(("case", "method"), PAIRS)
def test_directions_are_those_of_padded_rows(case, method, monkeypatch):
    make, inputs, told = CASES[case]
    x = inputs()
    with monkeypatch.context() as patched:
        if method == kf.KFAC():
            padded_nowhere(patched)
        found = directions(make, x, told, method)
    monkeypatch.setattr(places, "RAGGED", 1e9)
    monkeypatch.setattr(bags, "RAGGED", 1e9)
    torch.testing.assert_close(found, directions(make, x, told, method), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [Graphs, Bags])
def test_a_rule_that_judges_by_examples_has_far_too_ragged_rows_as_one_example(make, monkeypatch):
    """As rows that mix examples: trained, and marked."""
    monkeypatch.setattr(layout, "MOST_RAGGED", 2)
    monkeypatch.setattr(layout, "MOST_PADDED", 0)
    padded_nowhere(monkeypatch)
    model, x = make(), torch.randn(len(OWNER), 4) if make is Graphs else ids()
    optimizer = kt.Optimizer(model, CE)
    losses = [optimizer.step(x, torch.arange(6) % 3) for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]
    assert optimizer.engine.mixing == {"a" if make is Graphs else "e"}
