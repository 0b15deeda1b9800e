"""An optimizer that steps before `step()` has used plain gradients, which is named."""

from __future__ import annotations

import warnings

import pytest

import kfaccore as kf

torch = pytest.importorskip("torch")
nn = torch.nn

import kfaccore_torch as kt  # noqa: E402

pytestmark = pytest.mark.usefixtures("torch_double")


@pytest.mark.parametrize("first", ["optimizer", "preconditioner", "graft"])
def test_an_optimizer_that_steps_before_is_named_once(first):
    """Nothing is said of a warm-up without step(), nor of an optimizer that runs first to tell lengths."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 3), torch.randint(3, (8,))
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
    rule = kf.Fixed(rescale=kf.Graft()) if first == "graft" else kf.Fixed()
    core = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), step=rule)
    pre = kt.Preconditioner(model, nn.CrossEntropyLoss(), core)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    told = []
    for step in range(3):
        optimizer.zero_grad()
        with pre.capture():
            f = model(x)
        pre.loss(f, y).backward()
        if step == 0:  # a batch of a warm-up
            optimizer.step()
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if first == "optimizer":
                optimizer.step()
            pre.graft(optimizer) if first == "graft" else pre.step()
            if first == "preconditioner":
                optimizer.step()
        told += [str(one.message) for one in caught]
    assert len(told) == (first == "optimizer")
    assert all("an optimizer stepped between backward and step()" in text and "2.weight" in text for text in told)
