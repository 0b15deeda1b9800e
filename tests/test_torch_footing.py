"""A shell that is made before its model is put where it trains, and a model that is moved later."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch
from torch import nn

import kfaccore as kf
import kfaccore_torch as kt

CE = nn.CrossEntropyLoss()


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def data():
    rng = torch.Generator().manual_seed(1)
    return torch.randn(16, 4, generator=rng, dtype=torch.float64), torch.arange(16) % 3


def made(model):
    return kt.Preconditioner(model, CE, kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), kf.Schedules(1e-2)))


def stepped(pre, model):
    x, y = data()
    model.zero_grad()
    with pre.capture():
        f = model(x.to(next(model.parameters())))
    pre.loss(f, y).backward()
    pre.step()
    return [p.grad.clone() for p in model.parameters()]


def on_meta():
    with torch.device("meta"):
        return net()


def filled(model):
    model.to_empty(device="cpu")
    model.load_state_dict(net().state_dict())


@pytest.mark.parametrize(
    ("early", "put"), [(lambda: net().float(), lambda m: m.load_state_dict(net().state_dict())), (on_meta, filled)]
)
def test_a_shell_made_before_its_model_is_put_where_it_trains(early, put):
    wanted = net()
    want = stepped(made(wanted), wanted)
    model = early()
    pre = made(model)
    model.double()
    put(model)
    torch.testing.assert_close(stepped(pre, model), want, rtol=1e-12, atol=1e-14)


def test_an_optimizer_made_on_meta():
    found = []
    for late in (True, False):
        model = on_meta() if late else net()
        optimizer = kt.Optimizer(model, CE)
        if late:
            filled(model)
        found.append([optimizer.step(*data()) for _ in range(4)])
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_a_model_without_values_is_named():
    model = on_meta()
    for call in (made(model).state_dict, lambda: stepped(made(model), model)):
        with pytest.raises(ValueError, match="on the meta device, so hold no values"):
            call()


def test_the_state_goes_with_a_model_that_is_moved():
    """float32 for a step, then float64: averages go on, from numbers of float32."""
    found = []
    for first in (torch.float32, torch.float64):
        model = net(first)
        pre = made(model)
        stepped(pre, model)
        model.double()
        found.append(stepped(pre, model))
        assert {x.A.dtype.name for x in pre.engine.state.layers.values()} == {"float64"}
        assert pre.engine.state.step == 2
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
