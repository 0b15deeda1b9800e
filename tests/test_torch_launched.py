"""A plain step that was recorded is the step: with a stand-in for a CUDA graph, which runs the function again."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

import kfaccore as kf
import kfaccore_torch as kt
from kfaccore_torch import launched


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5), nn.Linear(5, 5)
    ).double()


@pytest.fixture
def graphs(monkeypatch) -> list[object]:
    """Graphs on a CPU: what is played writes into the arrays that recording gave."""
    made = []

    def graphed(run):
        outputs = [x.clone() for x in run()]
        made.append(run)
        return lambda: torch._foreach_copy_(outputs, run()), outputs

    monkeypatch.setattr(launched, "graphed", graphed)
    monkeypatch.setattr(launched, "records_on", lambda device: True)
    return made


def steps(count: int, core: kf.Preconditioner, **settings) -> tuple[list[list[torch.Tensor]], kt.Preconditioner]:
    """Directions of some steps of training, parameters moving."""
    model = net()
    pre = kt.Preconditioner(model, nn.CrossEntropyLoss(), core, namespace="torch", **settings)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    found = []
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(8, 2, 4, 4, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 5, (8,), generator=generator)
        optimizer.zero_grad()
        with pre.capture():
            f = model(x)
        pre.loss(f, y).backward()
        pre.step()
        found.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
    return found, pre


def core(method: object, damping: object = 1e-2, step: object = None) -> kf.Preconditioner:
    rule = kf.Fixed(0.1) if step is None else step
    return kf.Preconditioner(method, kf.Clocks(4, 8), kf.Schedules(damping=damping), step=rule, donate=True)


@pytest.mark.parametrize(
    "method",
    [kf.KFAC(), kf.KFAC(inverse=kf.eigh), kf.EKFAC(), kf.SINGD(), kf.Diagonal()],
    ids=lambda m: type(m).__name__,
)
def test_recorded_steps_are_the_steps(method, graphs, monkeypatch):
    """Over updates and refreshes, which change what the graph reads, to the bit; one recording serves all."""
    found, pre = steps(22, core(method))
    assert len(graphs) == 1
    monkeypatch.setattr(launched, "records_on", lambda device: False)
    want, plain = steps(22, core(method))
    assert len(graphs) == 1
    assert all(torch.equal(x, y) for a, b in zip(found, want, strict=True) for x, y in zip(a, b, strict=True))
    assert pre.engine.state.step == plain.engine.state.step == 22
    assert pre.info.metrics() == plain.info.metrics()


@pytest.mark.parametrize(
    ("name", "made", "settings"),
    [
        ("a damping that moves", core(kf.KFAC(inverse=kf.eigh), lambda step: 0.1 / (1 + step)), {}),
        ("momentum", core(kf.KFAC(), step=kf.Fixed(0.1, 0.9)), {}),
        ("a method that reads", core(kf.CGFAC()), {}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_changes_every_step_is_not_recorded(name, made, settings, graphs):
    steps(10, made, **settings)
    assert not graphs, name


def test_other_layers_are_another_step(graphs):
    """A step without a layer's gradient is not that which was recorded; the second of its kind is."""
    _, pre = steps(7, core(kf.KFAC()))
    pre.engine.core = pre.engine.given = kf.Preconditioner(kf.KFAC(), kf.Clocks(1000, 1000), donate=True)
    model = pre.engine.model
    for recorded in (1, 2, 2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        model[5].weight.grad = model[5].bias.grad = None
        pre.step()
        assert len(graphs) == recorded
    assert model[5].weight.grad is None


def test_copies_leave_the_graph_behind(graphs):
    _, pre = steps(7, core(kf.KFAC()))
    again = pickle.loads(pickle.dumps(pre))
    assert again.info.metrics() == pre.info.metrics()
    assert again.engine.launch.recorded is None


def test_what_cannot_be_recorded_is_said_once_and_taken(graphs, monkeypatch):
    """The step is the same, launch by launch."""

    def failing(run):
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(launched, "graphed", failing)
    with pytest.warns(RuntimeWarning, match=r"launch by launch.*operation not permitted") as told:
        found, _ = steps(12, core(kf.KFAC()))
    assert len(told) == 1
    monkeypatch.setattr(launched, "records_on", lambda device: False)
    want, _ = steps(12, core(kf.KFAC()))
    assert all(torch.equal(x, y) for a, b in zip(found, want, strict=True) for x, y in zip(a, b, strict=True))
