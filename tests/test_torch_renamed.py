"""A model whose parameters get other names goes on as one whose names stay."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf

torch = pytest.importorskip("torch")
nn = torch.nn

import kfaccore_torch as kt  # noqa: E402

CE = nn.CrossEntropyLoss()
pytestmark = [pytest.mark.usefixtures("torch_double"), pytest.mark.filterwarnings("error")]
BATCH = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.arange(8) % 5


class Raw(nn.Module):
    """A linear layer that only forwards show."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 5) / 2)

    def forward(self, x):
        return x @ self.table.t()


class Gain(nn.Module):
    """A parameter that no layer has."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(5))

    def forward(self, x):
        return x * nn.functional.softplus(self.gain)


class Named(nn.Module):
    """Blocks of names that stay, used in an order that changes."""

    def __init__(self, block):
        super().__init__()
        torch.manual_seed(1)
        for k in "abcd":
            setattr(self, k, block())
        self.order = "abc"

    def forward(self, x):
        for k in self.order:
            x = getattr(self, k)(x).tanh()
        return x


class Listed(nn.Module):
    """The same blocks in a list."""

    def __init__(self, other):
        super().__init__()
        self.layers = nn.ModuleList(getattr(other, k) for k in other.order)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x


CHANGES = {"inserted": "adbc", "swapped": "bac", "turned": "bca", "deleted": "bc", "doubled": "abca"}
BLOCKS = {"linear": lambda: nn.Linear(5, 5), "raw": Raw, "norm": lambda: nn.LayerNorm(5)}


def run(listed, block, change, core):
    named = Named(block)
    model = Listed(named) if listed else named
    if not listed:
        named.d.requires_grad_(False)
    pre = kt.Preconditioner(model, CE, core, fisher=kf.type2)
    optimizer = torch.optim.SGD(named.parameters(), 0.02)
    found = []
    for i in range(9):
        if i == 7:
            named.order = CHANGES[change]
            for k in "abcd":
                getattr(named, k).requires_grad_(k in named.order)
            if listed:
                model.layers = nn.ModuleList(getattr(named, k) for k in named.order)
        optimizer.zero_grad()
        with pre.capture():
            f = model(BATCH[0])
        pre.loss(f, BATCH[1]).backward()
        pre.step()
        optimizer.step()
        found += [p.grad.flatten().clone() for k in sorted({*named.order}) for p in getattr(named, k).parameters()]
    assert pre.report().share == 1
    return torch.cat(found).numpy()


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("step", [kf.Fixed(), kf.Fixed(momentum=0.9)], ids=["plain", "momentum"])
def test_layers_keep_their_state_whatever_they_are_called(block, change, step):
    core = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), step=step)
    np.testing.assert_allclose(run(True, block, change, core), run(False, block, change, core), rtol=1e-10, atol=1e-14)


def test_a_model_that_is_put_into_another():
    found = []
    for wrapped in (True, False):
        model = Listed(Named(BLOCKS["linear"]))
        pre = kt.Preconditioner(model, CE, kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 4)), fisher=kf.type2)
        for i in range(4):
            if wrapped and i == 2:
                model.layers[1] = nn.Sequential(model.layers[1])
            model.zero_grad()
            with pre.capture():
                f = model(BATCH[0] * (i + 1))
            pre.loss(f, BATCH[1]).backward()
            pre.step()
        assert list(pre.engine.plan.layers) == ["layers.0", "layers.1.0" if wrapped else "layers.1", "layers.2"]
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]).numpy())
    np.testing.assert_allclose(*found, rtol=1e-12)


def test_a_layer_that_gets_another_method_with_its_name_begins_anew():
    model = Listed(Named(BLOCKS["linear"]))
    methods = {"layers.0": kf.KFAC(), "layers.1": kf.EKFAC(), "layers.2": kf.KFAC()}
    pre = kt.Preconditioner(model, CE, kf.Preconditioner(methods, kf.Clocks(1, 1)), fisher=kf.type2)
    for i in range(3):
        if i == 2:
            model.layers = model.layers[::-1][1:] + model.layers[2:]  # of a b c: b a c
        model.zero_grad()
        with pre.capture():
            f = model(BATCH[0])
        pre.loss(f, BATCH[1]).backward()
        pre.step()
    assert set(pre.info.counts()) == {kf.Code.OK}


@pytest.mark.parametrize("change", ["swapped", "turned", "inserted"])
def test_the_other_optimizer_keeps_its_moments(change):
    found = []
    for listed in (True, False):
        named = Named(Gain)
        head = nn.Linear(5, 5)
        named.d.requires_grad_(listed)
        model = nn.Sequential(head, Listed(named) if listed else named)
        optimizer = kt.Optimizer(model, CE, kf.Preconditioner(kf.KFAC(), step=kf.Fixed(0.01)), rest=torch.optim.Adam)
        for i in range(6):
            if i == 3:
                named.order = CHANGES[change]
                named.d.requires_grad_("d" in named.order)
                if listed:
                    model[1].layers = nn.ModuleList(getattr(named, k) for k in named.order)
            optimizer.step(*BATCH)
        found.append([p.detach().numpy().copy() for k in named.order for p in getattr(named, k).parameters()])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)
