"""A share of the normaliser that a device knows is not waited for, and counts as one that the host read."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import kfaccore as kf
import kfaccore_torch as kt
from kfaccore_torch import known_losses, own_objective

FAR = lambda x: not x.numel()  # noqa: E731


class Reads(TorchDispatchMode):
    """Counts numbers that the host asks tensors for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "local_scalar_dense" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def far(monkeypatch):
    """Tensors are as if on a device."""
    monkeypatch.setattr(known_losses, "known_at_once", FAR)
    monkeypatch.setattr(own_objective, "known_at_once", FAR)


def trained(loss, forwards, dtype=torch.float64, fisher=kf.empirical, reads=None, autocast=False, refresh=1):
    """Directions of three steps, `forwards` of several losses each: (weight, labels)."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)
    core = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, refresh), kf.Schedules(damping=1e-2))
    pre = kt.Preconditioner(model, loss, core, fisher=fisher, namespace="torch")
    x = torch.randn(3, len(forwards), 6, 5, dtype=dtype)
    found = []
    for step in range(3):
        model.zero_grad()
        with nullcontext() if reads is None or step < 2 else reads:
            for losses, rows in zip(forwards, x[step], strict=True):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast), pre.capture():
                    f = model(rows)
                sum(pre.loss(f, y, weight=weight) for weight, y in losses).backward()
            pre.step()
        found.append([p.grad.clone() for p in model.parameters()])
    return found


LOSSES = {
    "mean": nn.CrossEntropyLoss(),
    "weights": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)),
    "core": kf.SoftmaxCrossEntropy(ignore=-100),
}
SOME = torch.tensor([0, 2, -100, 1, -100, 0])
MORE = torch.tensor([1, -100, -100, -100, -100, 0])
NONE = torch.full((6,), -100)
FORWARDS = {
    "one": [[(1.0, SOME)]],
    "two": [[(1.0, SOME)], [(1.0, MORE)]],
    "two losses": [[(1.0, SOME), (0.5, MORE)]],
    "one that counts": [[(1.0, SOME)], [(1.0, NONE)]],
}


PAIRS = [(loss, forwards) for loss in LOSSES for forwards in FORWARDS]
PAIRS.remove(("core", "one that counts"))  # whose loss of nothing is no number


@pytest.mark.parametrize(("loss", "forwards"), PAIRS)
@pytest.mark.filterwarnings("ignore:the losses of 2 forwards")
def test_directions_are_those_of_a_share_that_was_read(loss, forwards, request):
    want = trained(LOSSES[loss], FORWARDS[forwards])
    request.getfixturevalue("far")
    found = trained(LOSSES[loss], FORWARDS[forwards])
    for step, (ours, theirs) in enumerate(zip(found, want, strict=True)):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13, equal_nan=True, msg=lambda m, s=step: f"{s}: {m}")


@pytest.mark.parametrize("autocast", [False, True])
def test_nothing_is_read(far, autocast):
    """An update waits for nothing, under autocast neither."""
    reads = Reads()
    trained(nn.CrossEntropyLoss(), FORWARDS["one"], torch.float32, kf.monte_carlo, reads, autocast, 10)
    assert reads.count == 0


def test_a_batch_without_labels_is_refused(far):
    """Averages stay, and each layer says so."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    core = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), kf.Schedules(damping=1e-2))
    pre = kt.Preconditioner(model, nn.CrossEntropyLoss(), core, namespace="torch")
    before = None
    for y in (SOME, NONE):
        model.zero_grad()
        with pre.capture():
            f = model(torch.randn(6, 5))
        pre.loss(f, y).backward()
        pre.step()
        layers = {name: pre.engine.state.layers[name] for name in pre.engine.plan.layers}
        if before is not None:
            for name, layer in layers.items():
                torch.testing.assert_close(layer.A, before[name].A, rtol=0, atol=0)
                torch.testing.assert_close(layer.G, before[name].G, rtol=0, atol=0)
        before = layers
    assert all(code == kf.Code.NONFINITE for code in pre.info.codes.values())
    assert all(float(p.grad.abs().sum()) == 0 for p in model.parameters())
