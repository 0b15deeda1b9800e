"""A micro-batch of which no label counts is one of which few do: its inputs count in A, and a sum stays one sum."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch
from torch import nn

import kfaccore as kf
import kfaccore_torch as kt

pytestmark = pytest.mark.usefixtures("torch_double")


def direction(spans, ignored, rule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    x = torch.randn(12, 5)
    y = torch.randint(0, 3, (12,))
    y[ignored] = -100
    core = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), kf.Schedules(1e-2), step=rule)
    pre = kt.Preconditioner(model, nn.CrossEntropyLoss(reduction="sum"), core, fisher=kf.type2)
    for first, last in spans:
        with pre.capture():
            f = model(x[first:last])
        pre.loss(f, y[first:last]).backward()
    pre.step()
    told = [torch.tensor(float(value)) for value in pre.info.step.values()]
    return torch.cat([*(p.grad.flatten() for p in model.parameters()), torch.stack(told)])


@pytest.mark.parametrize("rule", [kf.Fixed(), kf.Fixed(rescale=kf.Noise())], ids=["fixed", "noise"])
@pytest.mark.parametrize("ignored", [slice(0, 7), slice(0, 8), slice(8, 12)], ids=["few", "none first", "none last"])
def test_micro_batches_are_one_batch(ignored, rule):
    want = direction([(0, 12)], ignored, rule)
    torch.testing.assert_close(direction([(0, 8), (8, 12)], ignored, rule), want, rtol=1e-10, atol=1e-12)
