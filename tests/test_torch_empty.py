"""Experts with buffers of a fixed capacity: free slots are named, and rows that are there alone give one direction."""

from __future__ import annotations

import warnings

import pytest

pytest.importorskip("torch")

import torch
import torch.nn.functional as F
from torch import nn

import kfaccore as kf
import kfaccore_torch as kt

CE = nn.CrossEntropyLoss()
CORE = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), kf.Schedules(1e-2))
pytestmark = pytest.mark.usefixtures("torch_double")


class Experts(nn.Module):
    """Three experts on their own tokens, or on buffers that have room for `room` of them."""

    def __init__(self, room, stacked):
        super().__init__()
        self.room, self.stacked = room, stacked
        self.r, self.o = nn.Linear(3, 3), nn.Linear(4, 3)
        if stacked:
            self.w = nn.Parameter(torch.randn(3, 3, 4))
        else:
            self.e = nn.ModuleList(nn.Linear(3, 4) for _ in range(3))

    def forward(self, x):
        gate, top = self.r(x).softmax(-1).max(-1)
        if not self.room:
            z = torch.zeros(len(x), 4)
            for e in range(3):
                mine = (top == e).nonzero()[:, 0]
                h = x[mine] @ self.w[e] if self.stacked else self.e[e](x[mine])
                z = z.index_add(0, mine, torch.tanh(h))
            return self.o(z * gate[:, None])
        one = F.one_hot(top, 3)
        slot = (one.cumsum(0) - 1).gather(1, top[:, None])[:, 0]
        goes = (one[:, :, None] * F.one_hot(slot, self.room)[:, None]).to(x)
        buffers = torch.einsum("nec,nd->ecd", goes, x)
        if self.stacked:
            h = torch.einsum("ecd,edf->ecf", buffers, self.w)
        else:
            h = torch.stack([e(rows) for e, rows in zip(self.e, buffers, strict=True)])
        return self.o(torch.einsum("nec,ecf->nf", goes, torch.tanh(h)) * gate[:, None])

    def owners(self, x):
        """The example of each slot, -1 where it is free."""
        top = self.r(x).argmax(-1)
        found = {}
        for e in range(3):
            mine = (top == e).nonzero()[:, 0]
            found[f"e.{e}"] = torch.cat([mine, torch.full((self.room - len(mine),), -1)])
        return found


def steps(room, stacked, count=3, told=False):
    torch.manual_seed(1)
    model = Experts(room, stacked)
    pre = kt.Preconditioner(model, CE, CORE, fisher=kf.type2)
    found = []
    for _ in range(count):
        model.zero_grad()
        x, y = torch.randn(12, 3), torch.randint(0, 3, (12,))
        with pre.capture(examples=model.owners(x) if told else None):
            f = model(x)
        pre.loss(f, y).backward()
        pre.step()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return torch.stack(found)


@pytest.mark.parametrize(("stacked", "name"), [(True, "'w': 67%"), (False, "'e.0': [0-9]+%, 'e.1': [0-9]+%, 'e.2'")])
def test_empty_slots_are_named_once(stacked, name):
    with pytest.warns(UserWarning, match=f"rows of these layers are empty.*{name}") as said:
        steps(12, stacked)
    assert len(said) == 1


@pytest.mark.parametrize("room", [12, 48])
def test_slots_without_an_example_do_not_count(room):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = steps(room, False, told=True)
        wanted = steps(0, False)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_an_expert_by_hand_without_a_token():
    model = Experts(0, True)
    model.r.bias.data = torch.tensor([9.0, 0.0, -9.0])
    pre = kt.Preconditioner(model, CE, CORE)
    for x in (torch.randn(12, 3), torch.ones(2, 3)):
        model.zero_grad()
        with pre.capture():
            f = model(x)
        pre.loss(f, torch.arange(len(x)) % 3).backward()
        pre.step()
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
