"""Matrices of equal layers made and undone together are those of each layer by itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kfaccore as kf
import kfaccore_torch as kt
from kfaccore.xp import gpu
from kfaccore.xp.blocks import stacked, together
from kfaccore_torch.assembled import matrices, tensors


class Net(nn.Module):
    """Two of each kind, one alone, a parameter used in two parts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, groups=g) for g in (1, 1, 2, 2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
        self.linears = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16, bias=False)])
        self.packed = nn.Parameter(torch.randn(32, 16) / 8)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv in self.convs:
            x = conv(x)
        for norm in self.norms:
            x = norm(x)
        x = x.flatten(1)[:, :16]
        for linear in self.linears:
            x = torch.tanh(linear(x))
        first, second = self.packed.chunk(2)
        return self.head(nn.functional.linear(x, first) * nn.functional.linear(x, second))


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
def test_together_as_one_by_one(last):
    """To the bit, there and back, for gradients of any layout."""
    model = Net().double()
    model = model.to(memory_format=torch.channels_last) if last else model
    x = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    pre = kt.Preconditioner(model, nn.CrossEntropyLoss(), namespace="torch")
    with pre.capture():
        f = model(x)
    pre.loss(f, torch.arange(5) % 3).backward()
    layers = pre.engine.plan.layers
    assert len(layers) == 14
    given = {name: {role: p.grad for role, p in layer.parameters.items()} for name, layer in layers.items()}
    found = matrices(layers, given)
    assert list(found) == list(given)
    for name, layer in layers.items():
        assert torch.equal(found[name], layer.matrix(given[name])), name
    back = tensors(layers, found)
    for name, layer in layers.items():
        for role, want in layer.arrays(found[name]).items():
            assert torch.equal(back[name][role], want), (name, role)
    shuffled = {name: found[name].clone() for name in reversed(found)}  # no stack to find
    for name, parts in tensors(layers, shuffled).items():
        assert all(torch.equal(x, back[name][role]) for role, x in parts.items())


def test_directions_with_a_blocks_axis():
    """Those of gradients that were never multiplied out come as (1, d_out, d_in), of equal layers as one stack."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(3)]).double()
    layers = kt.Preconditioner(model, nn.MSELoss(), namespace="torch").engine.plan.layers
    whole = torch.randn(3, 1, 16, 17, dtype=torch.float64)
    for name, parts in tensors(layers, dict(zip(layers, whole.unbind(0), strict=True))).items():
        for role, want in layers[name].arrays(whole[int(name), 0]).items():
            assert torch.equal(parts[role], want), (name, role)


@pytest.mark.parametrize("step", [kf.Fixed(), kf.SelfTuning()], ids=lambda rule: type(rule).__name__)
def test_an_optimizer_of_equal_layers(step):
    """On torch's own arrays, as on a GPU, it moves parameters as on NumPy's."""
    ends = []
    for namespace in ("torch", "numpy"):
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(3)], nn.Linear(16, 3)).double()
        core = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 2), step=step)
        optimizer = kt.Optimizer(model, nn.CrossEntropyLoss(), core, namespace=namespace, fisher=kf.type2)
        for x in torch.randn(3, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)):
            optimizer.step(x, torch.arange(5) % 3)
        ends.append([p.detach() for p in model.parameters()])
    for found, want in zip(*ends, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-8, atol=1e-10)


def test_half_parameters_are_widened_and_narrowed():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).bfloat16()
    pre = kt.Preconditioner(model, nn.MSELoss(), namespace="torch")
    layers = pre.engine.plan.layers
    given = {name: {r: torch.ones_like(p) / 3 for r, p in layer.parameters.items()} for name, layer in layers.items()}
    found = matrices(layers, given)
    assert {x.dtype for x in found.values()} == {torch.float32}
    assert all(x.dtype == torch.bfloat16 for parts in tensors(layers, found).values() for x in parts.values())


def test_what_lies_together_is_not_copied():
    """Slices of one array at equal distances, in order, are views of that array; anything else is a copy."""
    base = torch.arange(24.0).reshape(4, 2, 3)
    assert stacked(list(base[1:])).data_ptr() == base[1].data_ptr()
    assert torch.equal(stacked(list(base[1:])), base[1:])
    assert together([base[:1], base[1:2]]).data_ptr() == base.data_ptr()
    for parts in ([base[1], base[0]], [base[0], base[0]], [base[0], base[1].double().float()]):
        assert stacked(parts).data_ptr() != base.data_ptr()
        assert torch.equal(stacked(parts), torch.stack(parts))
    assert stacked([base[0], base[2]]).data_ptr() == base.data_ptr()
    assert torch.equal(stacked([base[0], base[2]]), base[::2])
    other = torch.ones(4, 2, 3)
    assert torch.equal(stacked([base[0], other[1]]), torch.stack([base[0], other[1]]))
    columns = list(base.unbind(2))
    assert torch.equal(stacked(columns), torch.stack(columns))


def test_a_stack_of_directions_is_not_the_gradient():
    """A method that hands the gradient on gives directions that a later step does not change."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    pre = kt.Preconditioner(model, nn.MSELoss(), kf.Identity(), namespace="torch")
    found = []
    for scale in (1.0, 2.0):
        for p in model.parameters():
            p.grad = torch.full_like(p, scale)
        pre.step()
        found.append([p.grad for p in model.parameters()])
    assert all(bool((x == 1.0).all()) for x in found[0])
    assert all(bool((x == 2.0).all()) for x in found[1])


def test_zeros_behind_matrices_change_no_step(monkeypatch):
    """What float32 has on CUDA, here: matrices of odd widths go through a step with the zeros that they are made with,
    and those of linear layers are not copied for a product."""
    found = []
    made = []
    wide = gpu._wide
    monkeypatch.setattr(gpu, "_wide", lambda parts: made.append((len(parts), parts[0].shape[-2:])) or wide(parts))
    for wants in (gpu.wants_zeros, lambda x: torch.is_tensor(x) and x.dtype == torch.float32):
        monkeypatch.setattr(gpu, "wants_zeros", wants)
        model = Net()
        core = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 2))
        pre = kt.Preconditioner(model, nn.CrossEntropyLoss(), core, namespace="torch")
        x = torch.randn(4, 5, 4, 3, 3, generator=torch.Generator().manual_seed(1))
        for rows in x:
            made.clear()
            model.zero_grad()
            with pre.capture():
                f = model(rows)
            pre.loss(f, torch.arange(5) % 3).backward()
            pre.step()
        found.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=1e-6)
    linear = [parts for parts, shape in made if shape in ((16, 16), (16, 17))]
    assert linear == [2]  # weights of both layers, and their biases
