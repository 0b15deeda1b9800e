"""Losses that the loop keeps, as for a running mean, keep nothing of their step."""

from __future__ import annotations

import gc
import weakref

import pytest

import kfaccore as kf

torch = pytest.importorskip("torch")
nn = torch.nn

import kfaccore_torch as kt  # noqa: E402

pytestmark = pytest.mark.usefixtures("torch_double")


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_what_a_loss_left_goes_with_its_step(weight):
    model = nn.Linear(3, 4)
    pre = kt.Preconditioner(model, nn.CrossEntropyLoss(), kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1)))
    losses, left = [], []
    for _ in range(2):
        with pre.capture():
            f = model(torch.randn(8, 3))
        loss = pre.loss(f, torch.randint(4, (8,)), weight=weight)
        loss.backward()
        losses.append(loss)
        left.append(weakref.ref(pre._pending.shots[0]))
        pre.step()
        model.zero_grad()
    gc.collect()
    assert [shot() for shot in left] == [None, None]
