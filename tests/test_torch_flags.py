"""Forwards that freeze, thaw or bind parameters themselves: as where the loop does, or the parameters are buffers."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
import torch.nn.functional as F
from torch import nn

import kfaccore as kf
import kfaccore_torch as kt

CE = nn.CrossEntropyLoss()
pytestmark = pytest.mark.usefixtures("torch_double")


def trained(make, shell, loss=CE, before=lambda model: None, steps=5):
    """Parameters after some steps, and the shell."""
    torch.manual_seed(0)
    model = make()
    core = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), kf.Schedules(1e-2)) if shell == "Preconditioner" else None
    own = getattr(kt, shell)(model, loss, core, **({"fisher": kf.type2} if core else {}))
    rng = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(6, 3, generator=rng)
        y = x if isinstance(loss, nn.MSELoss) else torch.arange(6) % 3
        before(model)
        if shell == "Optimizer":
            own.step(x, y)
            continue
        model.zero_grad()
        with own.capture():
            f = model(x)
        own.loss(f, y).backward()
        own.step()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad if p.grad is not None else 0.0
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}, own


def same(found, wanted):
    assert found
    for name, p in found.items():
        np.testing.assert_allclose(p, wanted[name], rtol=1e-9, atol=1e-12, err_msg=name)


class Thaws(nn.Module):
    """A branch that is trained from the third batch on, and frozen again at the fifth."""

    def __init__(self, inside):
        super().__init__()
        self.a, self.t, self.o, self.i, self.inside = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 3), 0, inside

    def turn(self):
        self.i += 1
        self.t.requires_grad_(self.i in (3, 4))

    def forward(self, x):
        if self.inside:
            self.turn()
        return self.o(torch.tanh(self.a(x) + self.t(x)))


@pytest.mark.parametrize("shell", ["Preconditioner", "Optimizer"])
def test_frozen_and_thawed_inside(shell):
    wanted, _ = trained(lambda: Thaws(False), shell, before=Thaws.turn)
    found, _ = trained(lambda: Thaws(True), shell)
    same(found, wanted)


class Twice(nn.Module):
    """The same layer as a target too, which nothing is to flow to."""

    def __init__(self, flags):
        super().__init__()
        self.a, self.o, self.flags = nn.Linear(3, 4), nn.Linear(4, 3), flags

    def forward(self, x):
        h = torch.tanh(self.a(x))
        if not self.flags:
            return self.o(h + torch.tanh(F.linear(h[:, :3], self.a.weight.detach(), self.a.bias.detach())))
        self.a.requires_grad_(False)
        h = h + torch.tanh(self.a(h[:, :3]))
        self.a.requires_grad_(True)
        return self.o(h)


@pytest.mark.parametrize("shell", ["Preconditioner", "Optimizer"])
def test_frozen_for_one_call(shell):
    found, wanted = (trained(lambda flags=flags: Twice(flags), shell)[0] for flags in (True, False))
    same(found, wanted)


class Codes(nn.Module):
    """A codebook that the forward moves, in new parameters or in buffers."""

    def __init__(self, bound):
        super().__init__()
        self.e, self.d, self.bound = nn.Linear(3, 4), nn.Linear(4, 3), bound
        self.keep("codes", torch.randn(5, 4))

    def keep(self, name, x):
        if self.bound:
            setattr(self, name, nn.Parameter(x))
        else:
            self.register_buffer(name, x)

    def forward(self, x):
        z = self.e(x)
        hot = F.one_hot(torch.cdist(z, self.codes).argmin(1), 5).to(z)
        q = hot @ self.codes
        self.keep("codes", self.codes.detach() * 0.9 + 0.1 * (hot.T @ z).detach())
        return self.d(z + (q - z).detach())


@pytest.mark.parametrize("shell", ["Preconditioner", "Optimizer"])
def test_parameters_bound_in_each_forward(shell):
    wanted, _ = trained(lambda: Codes(False), shell, nn.MSELoss())
    found, own = trained(lambda: Codes(True), shell, nn.MSELoss(), steps=4)
    observer = own.engine.observer
    found, own = trained(lambda: Codes(True), shell, nn.MSELoss())
    codes = found.pop("codes")
    same(found, wanted)
    assert np.abs(codes).max() > 0
    assert max(own.engine.observer.turns.values()) == 5  # maps are kept
    assert observer.kept.keys() == own.engine.observer.kept.keys()


class Late(nn.Module):
    """A layer made in the first forward."""

    def __init__(self, late):
        super().__init__()
        self.a, self.late = nn.Linear(3, 4), late
        if not late:
            self.make()

    def make(self):
        torch.manual_seed(7)
        self.o = nn.Linear(4, 3)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        if not hasattr(self, "o"):
            self.make()
        return self.o(h)


@pytest.mark.parametrize("shell", ["Preconditioner", "Optimizer"])
def test_a_layer_made_in_the_first_forward(shell):
    found, wanted = (trained(lambda late=late: Late(late), shell)[0] for late in (True, False))
    same(found, wanted)
