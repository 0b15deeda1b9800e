"""Predictions of several numbers an example, flattened for the loss, of layers whose rows are the examples."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf

torch = pytest.importorskip("torch")
nn = torch.nn

import kfaccore_torch as kt  # noqa: E402

pytestmark = pytest.mark.usefixtures("torch_double")
WAYS = {"rows": lambda x: x.reshape(-1), "columns": lambda x: x.t().reshape(-1), "pairs": lambda x: x.reshape(-1, 2)}
LOSSES = {"squares": nn.MSELoss(), "logits": nn.BCEWithLogitsLoss(), "sum": nn.MSELoss(reduction="sum")}


def data(loss):
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 3, generator=rng), torch.randn(6, 4, generator=rng)
    return x, (y > 0).double() if loss == "logits" else y


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))


def directions(way, loss, fisher):
    model, (x, y) = net(), data(loss)
    core = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), kf.Schedules(1e-2, 0.9))
    pre = kt.Preconditioner(model, LOSSES[loss], core, fisher=fisher)
    for _ in range(3):
        model.zero_grad()
        with pre.capture():
            f = model(x)
        pre.loss(way(f), way(y)).backward()
        pre.step()
    assert pre.engine.mixing == set()
    return np.concatenate([p.grad.numpy().ravel() for p in model.parameters()])


@pytest.mark.parametrize("fisher", [kf.type2, kf.empirical])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("way", WAYS)
def test_flattening_changes_no_direction(way, loss, fisher):
    plain = directions(lambda x: x, loss, fisher)
    np.testing.assert_allclose(directions(WAYS[way], loss, fisher), plain, rtol=1e-9, atol=1e-12)


def test_a_rule_that_judges_by_examples_sees_them():
    (x, y), runs = data("squares"), []
    for last in (nn.Identity(), nn.Flatten(0)):
        optimizer = kt.Optimizer(nn.Sequential(net(), last), nn.MSELoss(), fisher=kf.type2)
        runs.append([optimizer.step(x, last(y)) for _ in range(6)])
    np.testing.assert_allclose(runs[1], runs[0], rtol=1e-8)
