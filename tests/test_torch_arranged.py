"""Parameters that a network takes in other arrangements than their own: covered as a matrix, or named."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
import torch.nn.functional as F
from torch import nn

import kfaccore as kf
import kfaccore_torch as kt
from kfaccore_torch.views import View

CE = nn.CrossEntropyLoss()
CORE = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), kf.Schedules(0.1))
pytestmark = pytest.mark.usefixtures("torch_double")


def directions(model, x, y, **more):
    """Gradients, directions and the plan of one step."""
    pre = kt.Preconditioner(model, CE, CORE, fisher=kf.type2, **more)
    model.zero_grad()
    with pre.capture():
        f = model(x)
    pre.loss(f, y).backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    pre.step()
    return plain, {name: p.grad.clone() for name, p in model.named_parameters()}, pre.engine.plan


class Twice(nn.Module):
    """One weight through a called layer, and in another arrangement through an operation that only autograd shows."""

    def __init__(self, way):
        super().__init__()
        self.way, self.o = way, nn.Linear(4, 5)
        table = nn.Embedding(8, 4) if "table" in way else self.o
        self.w = nn.Conv1d(4, 4, 3, padding=1) if "convolution" in way else table

    def forward(self, x):
        w = self.w.weight
        if "table" in self.way:
            h = torch.tanh(self.w(x))
            h = h @ w[:5].T if self.way == "padded table" else torch.einsum("btd,vd->btv", h, w[:5])
            return h.mT + self.o(torch.tanh(self.w(x))).mT
        if "convolution" in self.way:
            return self.o(F.conv_transpose1d(torch.tanh(self.w(x.mT)), w, padding=1).mT).mT
        return self.o(torch.tanh(self.o(x) @ w)).mT


@pytest.mark.parametrize("way", ["padded table", "einsum of a table", "convolution transposed", "tied autoencoder"])
def test_a_weight_in_two_arrangements_is_left_uncovered_and_the_others_train(way):
    model = Twice(way)
    x = torch.randint(0, 8, (3, 6)) if "table" in way else torch.randn(3, 6, 4)
    y = torch.randint(0, 5, (3, 6))
    name = "o.weight" if model.w is model.o else "w.weight"
    plain, found, plan = directions(model, x, y)
    assert "different Kronecker structures" in plan.uncovered[name]
    assert torch.equal(found[name], plain[name])
    _, wanted, _ = directions(model, x, y, skip=(name,))
    for other in wanted:
        torch.testing.assert_close(found[other], wanted[other], rtol=1e-12, atol=1e-14)
        assert other == name or not torch.equal(found[other], plain[other])
    optimizer = kt.Optimizer(model, CE)
    losses = [float(optimizer.step(x, y)) for _ in range(5)]
    assert losses[-1] < losses[0]


def flat(total, first, gap=0):
    """Two layers, both with their weights in one vector: what is given as parts, and the same as parameters."""

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.o = nn.Parameter(torch.randn(total)), nn.Linear(4, 5)

        def forward(self, x):
            w, b = self.w[first : first + 12].view(4, 3), self.w[first + 12 + gap : first + 16 + gap]
            return self.o(torch.tanh(F.linear(x, w, b)))

    class Apart(nn.Module):
        def __init__(self, of):
            super().__init__()
            self.w = nn.Parameter(of.w.detach()[first : first + 12].view(4, 3))
            self.b = nn.Parameter(of.w.detach()[first + 12 + gap : first + 16 + gap])
            self.o = of.o

        def forward(self, x):
            return self.o(torch.tanh(F.linear(x, self.w, self.b)))

    return Flat(), Apart


@pytest.mark.parametrize(("total", "first", "gap"), [(16, 0, 0), (31, 12, 0), (17, 1, 0), (23, 4, 1), (21, 5, 0)])
def test_parts_of_a_vector_may_begin_anywhere(total, first, gap):
    model, apart = flat(total, first, gap)
    x, y = torch.randn(6, 3), torch.arange(6) % 5
    plain, found, plan = directions(model, x, y)
    assert not plan.uncovered
    assert set(plan.layers) - {"o"} == {f"w[{first}:{first + 12}]"}
    other = apart(model)
    _, wanted, _ = directions(other, x, y)
    parts = torch.zeros(total)
    parts[first : first + 12] = wanted["w"].flatten()
    parts[first + 12 + gap : first + 16 + gap] = wanted["b"]
    torch.testing.assert_close(found["w"], parts, rtol=1e-10, atol=1e-13)
    assert not torch.equal(found["w"], plain["w"])


def test_parts_of_the_rows_of_a_stack_may_begin_anywhere():
    """One vector an expert, with all of its weights."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(2, 20))

        def forward(self, x):
            h = torch.tanh(torch.bmm(x.expand(2, -1, -1), self.w[:, 1:13].view(2, 3, 4)))
            return torch.bmm(h, self.w[:, 13:17].view(2, 4, 1)).sum(0) * torch.arange(5.0)

    class Apart(nn.Module):
        def __init__(self, of):
            super().__init__()
            self.w = nn.Parameter(of.w.detach()[:, 1:13].reshape(2, 3, 4))
            self.v = nn.Parameter(of.w.detach()[:, 13:17].reshape(2, 4, 1))

        def forward(self, x):
            return torch.bmm(torch.tanh(torch.bmm(x.expand(2, -1, -1), self.w)), self.v).sum(0) * torch.arange(5.0)

    model = Experts()
    x, y = torch.randn(6, 3), torch.rand(6, 5).softmax(1)
    _, found, plan = directions(model, x, y)
    assert not plan.uncovered
    _, wanted, _ = directions(Apart(model), x, y)
    close = {"rtol": 1e-10, "atol": 1e-13}
    torch.testing.assert_close(found["w"][:, 1:13].reshape(2, 3, 4), wanted["w"], **close)
    torch.testing.assert_close(found["w"][:, 13:17].reshape(2, 4, 1), wanted["v"], **close)
    assert float(found["w"][:, [0, 17, 18, 19]].abs().max()) == 0


@pytest.mark.parametrize("seed", range(40))
def test_what_a_view_takes_and_puts_is_its_memory(seed):
    """Any slices, reshapes and turns of a parameter."""
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(1, 6, 3))
    x = torch.arange(float(np.prod(shape))).reshape(shape)
    y, view = x, View.whole(shape)
    for _ in range(4):
        axis = int(rng.integers(y.ndim))
        start = int(rng.integers(y.shape[axis]))
        size = int(rng.integers(1, y.shape[axis] - start + 1))
        narrowed = view.narrowed(axis, start, size)
        if narrowed is not None:
            y, view = y.narrow(axis, start, size), narrowed
        order = rng.permutation(y.ndim).tolist()
        y, view = y.permute(order), view.permuted(order)
        to = [y.shape[0] * y.shape[1], *y.shape[2:], 1]
        merged = view.reshaped(to)
        assert merged is not None
        y, view = y.reshape(to), merged
    assert view.boxed(x.numel()) is not None
    assert torch.equal(view.take(x), y)
    np.testing.assert_array_equal(view.take(x.numpy()), y)
    zeros = torch.zeros(shape)
    view.within(zeros).copy_(view.within(x))
    assert torch.equal(view.put(y, shape), zeros)
    np.testing.assert_array_equal(view.put(y.numpy(), shape), zeros)
