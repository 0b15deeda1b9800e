"""How often a step waits for the device does not depend on how many layers there are."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import kfaccore as kf
import kfaccore_torch as kt
from kfaccore.xp import numbers
from test_torch_unread import Reads

RULES = {
    "self-tuning": kf.SelfTuning(),
    "self-tuning, gradients of one batch": kf.SelfTuning(noise=kf.Noise(average=0.0)),
    "noise": kf.Fixed(rescale=kf.Noise()),
}


def trained(rule: object, depth: int, l2: float = 0.0) -> tuple[list[torch.Tensor], int]:
    """Parameters after five steps of a net whose layers all have sizes of their own; reads of the last, which updates
    nothing."""
    torch.manual_seed(1)
    hidden = [nn.Sequential(nn.Linear(6 + k, 7 + k), nn.LayerNorm(7 + k), nn.Tanh()) for k in range(depth)]
    model = nn.Sequential(*hidden, nn.Linear(6 + depth, 5)).double()
    core = kf.Preconditioner(kf.KFAC(), kf.Clocks(8, 8), kf.Schedules(l2=l2), step=rule)
    optimizer = kt.Optimizer(model, nn.CrossEntropyLoss(), core, namespace="torch")
    for rows in torch.randn(5, 5, 6, dtype=torch.float64):
        COPIES.clear()
        with Reads() as reads:
            optimizer.step(rows, torch.arange(5))
    return [p.detach() for p in model.parameters()], reads.count + len(COPIES)


COPIES: list[torch.Tensor] = []


@pytest.fixture
def far(monkeypatch):
    """Tensors are as if on a device; copies of them to the host count as reads."""
    to_host = numbers.to_host

    def copied(x):
        COPIES.extend([x] if torch.is_tensor(x) else [])
        return to_host(x)

    monkeypatch.setattr(numbers, "on_gpu", torch.is_tensor)
    monkeypatch.setattr(numbers, "to_host", copied)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("l2", [0.0, 1e-3])
def test_reads_do_not_grow_with_layers(rule, l2, far):
    """Each layer's part of the model, of the own shares and of the inner products comes over with all others."""
    if l2 and isinstance(rule, kf.Fixed):
        pytest.skip("the noise of a direction knows no penalty")
    few = trained(rule, 2, l2)[1]
    assert few == trained(rule, 6, l2)[1]
    assert few <= 12


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_step_is_the_same_to_the_bit(rule, request):
    want = trained(rule, 3)[0]
    request.getfixturevalue("far")
    for found, expected in zip(trained(rule, 3)[0], want, strict=True):
        assert torch.equal(found, expected)


class Elementwise(TorchDispatchMode):
    """Counts sums and products of arrays while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mul, torch.ops.aten.add, torch.ops.aten.sub_)
        return func(*args, **(kwargs or {}))


def elementwise(depth: int) -> int:
    torch.manual_seed(1)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(depth))).double()
    core = kf.Preconditioner(kf.KFAC(), kf.Clocks(8, 8), step=kf.Fixed(0.1, 0.9))
    optimizer = kt.Optimizer(model, nn.CrossEntropyLoss(), core, namespace="torch")
    for rows in torch.randn(5, 5, 6, dtype=torch.float64):
        with Elementwise() as seen:
            optimizer.step(rows, torch.arange(5))
    return seen.count


def test_momentum_and_parameters_move_all_at_once():
    assert elementwise(2) == elementwise(6)


def test_parameters_of_a_class_of_ones_own_move_alike():
    """It may know no operations on lists."""

    class Own(nn.Parameter):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            assert "foreach" not in func.__name__
            return super().__torch_function__(func, types, args, kwargs or {})

    found = []
    for kind in (nn.Parameter, Own):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5)).double()
        model[0].weight = kind(model[0].weight.detach())
        core = kf.Preconditioner(kf.KFAC(), kf.Clocks(8, 8), step=kf.Fixed(0.1, 0.9))
        optimizer = kt.Optimizer(model, nn.CrossEntropyLoss(), core, namespace="torch")
        for rows in torch.randn(3, 5, 6, dtype=torch.float64):
            optimizer.step(rows, torch.arange(5))
        found.append([p.detach().as_subclass(torch.Tensor) for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))
