"""Batches of one example, where nothing is repeated: parameters stay what larger batches show them to be."""

from __future__ import annotations

import warnings

import pytest

pytest.importorskip("torch")

import torch
from torch import nn

import kfaccore as kf
import kfaccore_torch as kt

CE = nn.CrossEntropyLoss()
CORE = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), kf.Schedules(0.1, 0.5))
pytestmark = pytest.mark.usefixtures("torch_double")


class Language(nn.Module):
    """Positions or their gains as a raw parameter; `way` says how rows are laid out on the way to the logits."""

    def __init__(self, use, way):
        super().__init__()
        self.use, self.way = use, way
        self.e, self.p, self.o = nn.Embedding(7, 4), nn.Parameter(torch.randn(6, 4)), nn.Linear(4, 3)

    def forward(self, x):
        p = self.p[: x.shape[1]]
        h = self.e(x.T if self.way == "positions first" else x)
        p = p[:, None] if self.way == "positions first" else p
        h = h * p if self.use == "multiplied" else p.expand_as(h) + h if self.use == "repeated" else h + p
        if self.way == "positions first":
            return self.o(torch.tanh(h).cumsum(0)).flatten(0, 1)
        z = self.o(torch.tanh(h).cumsum(1))
        return z.flatten(0, 1) if self.way == "flattened" else z.mT


def trained(use, way, sizes, lengths=()):
    """Directions of a parameter `p` at each step, by batches of `sizes` examples with five positions, or `lengths`."""
    torch.manual_seed(1)
    model = Language(use, way)
    pre = kt.Preconditioner(model, CE, CORE, fisher=kf.empirical)
    found = []
    for n, t in zip(sizes, lengths or [5] * len(sizes), strict=True):
        model.zero_grad()
        x, y = torch.randint(0, 7, (n, t)), torch.randint(0, 3, (n, t))
        with pre.capture():
            f = model(x)
        y = y if way == "joined" else (y.T if way == "positions first" else y).flatten()
        pre.loss(f, y).backward()
        pre.step()
        assert "p" in pre.engine.plan.layers
        found.append(model.p.grad.clone())
    return torch.stack(found)


@pytest.mark.parametrize("sizes", [(4, 4, 1, 4, 1, 1, 4), (1, 1, 1), (1, 4, 1)])
@pytest.mark.parametrize("way", ["flattened", "positions first"])
@pytest.mark.parametrize("use", ["added", "multiplied", "repeated"])
def test_positions_of_one_sequence_are_those_of_many(use, way, sizes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = trained(use, way, sizes)
    if way == "flattened":  # (5, 1) rows of positions first are as well five examples
        torch.testing.assert_close(found, trained(use, "joined", sizes), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("use", ["added", "multiplied", "repeated"])
def test_one_position_is_a_row_of_the_table(use):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = trained(use, "flattened", (4, 4, 1, 4), (5, 1, 1, 5))
    assert float(found[1][1:].abs().max()) == 0
    torch.testing.assert_close(found, trained(use, "joined", (4, 4, 1, 4), (5, 1, 1, 5)), rtol=1e-10, atol=1e-12)


class Raw(nn.Module):
    """Inputs that no call has seen meet a parameter, and are rows of one axis afterwards."""

    def __init__(self):
        super().__init__()
        self.p, self.o = nn.Parameter(torch.randn(5, 4)), nn.Linear(4, 3)

    def forward(self, x):
        return self.o(torch.tanh(x + self.p).flatten(0, 1))


def test_an_axis_of_one_that_a_parameter_has_not_is_one_example():
    found = []
    for n in (1, 2):  # the same example twice changes nothing
        torch.manual_seed(1)
        model = Raw()
        pre = kt.Preconditioner(model, CE, CORE, fisher=kf.empirical)
        x, y = torch.randn(1, 5, 4).repeat(n, 1, 1), torch.arange(5).repeat(n) % 3
        with pre.capture():
            f = model(x)
        pre.loss(f, y).backward()
        pre.step()
        assert "p" in pre.engine.plan.layers
        found.append(model.p.grad.clone())
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


def test_a_parameter_before_it_meets_an_example_is_named_in_larger_batches():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.o = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 3)

        def forward(self, x):
            return self.o(torch.tanh(x @ (self.w * torch.ones(4, 4).tril())).flatten(0, 1))

    plan = kt.plan(Masked(), torch.randn(3, 5, 4))
    assert plan.uncovered == {"w": "it goes into MulBackward0 by itself, before it meets an example"}
