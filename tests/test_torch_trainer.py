"""The callback of `transformers.Trainer`, in a loop that calls it as the Trainer does."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
nn = torch.nn

import kfaccore as kf  # noqa: E402
import kfaccore_torch as kt  # noqa: E402

CORE = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), kf.Schedules(0.1, 0.9))
STATE = SimpleNamespace(global_step=0, is_world_process_zero=True)
pytestmark = pytest.mark.usefixtures("torch_double")


class Model(nn.Module):
    """Forms its loss of labels, where it is given some, as models of transformers do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))

    def forward(self, x, labels=None):
        logits = self.net(x)
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


def data():
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 4


@pytest.fixture
def callback(monkeypatch):
    """Of a library that need not be there: a callback has no more of it than a base class."""
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(TrainerCallback=object))
    monkeypatch.delitem(sys.modules, "kfaccore_torch.trainer", raising=False)
    yield importlib.import_module("kfaccore_torch.trainer").KFACCallback
    sys.modules.pop("kfaccore_torch.trainer", None)


def directions(mine, model, loss, run=None):
    """Those of one step, `loss(run)` of what the Trainer calls: the model, or what it has compiled."""
    args = SimpleNamespace(output_dir="", torch_compile=run is not None)
    mine.on_train_begin(args, STATE, None, model=model)
    mine.on_step_begin(args, STATE, None)
    loss(model if run is None else run).backward()
    mine.on_pre_optimizer_step(args, STATE, None, model=model)
    mine.on_train_end(args, STATE, None)
    return [p.grad for p in model.parameters()]


def wanted(criterion):
    model, (x, y) = Model(), data()
    pre = kt.Preconditioner(model, criterion, CORE, output="logits", fisher=kf.type2)
    with pre.capture():
        out = model(x)
    pre.loss(out["logits"], y).backward()
    pre.step()
    return [p.grad for p in model.parameters()]


def test_the_loss_of_the_model(callback):
    x, y = data()
    found = directions(callback(core=CORE, fisher=kf.type2), Model(), lambda run: run(x, labels=y)["loss"])
    for a, b in zip(found, wanted(nn.CrossEntropyLoss()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_loss_that_the_loop_forms(callback):
    """By compute_loss or compute_loss_func, of labels that the model is not given."""
    x, y = data()
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 1.0]), label_smoothing=0.1)
    mine = callback(criterion, CORE, fisher=kf.type2)
    found = directions(mine, Model(), lambda run: mine.pre.loss(run(x)["logits"], y))
    for a, b in zip(found, wanted(criterion), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_loss_that_nobody_told_of(callback):
    """As that of the Trainer's label smoother, which takes the labels away."""
    x, y = data()
    mine = callback(core=CORE)
    with pytest.raises(ValueError, match=r"pre\.loss was not called") as said:
        directions(mine, Model(), lambda run: nn.functional.cross_entropy(run(x)["logits"], y))
    (note,) = said.value.__notes__
    assert "label_smoothing" in note
    assert "callback.pre.loss" in note


def test_a_compiled_model_is_not_compiled_where_it_is_captured(callback):
    """Hooks inside a compiled model were followed by the compiler, with all that a capture does."""
    x, y = data()
    model, frames = Model(), []

    def backend(graph, inputs):
        frames.append(graph)
        return graph.forward

    run = torch.compile(model, backend=backend)
    found = directions(callback(core=CORE, fisher=kf.type2), model, lambda run: run(x, labels=y)["loss"], run)
    assert not frames
    for a, b in zip(found, wanted(nn.CrossEntropyLoss()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    run(x)
    assert frames
    torch.compiler.reset()
