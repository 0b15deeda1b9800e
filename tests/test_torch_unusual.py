"""Complex, sparse and nested tensors, and sparse gradients: what meets them is named, and all else is right."""

from __future__ import annotations

import warnings

import pytest

pytest.importorskip("torch")

import torch
import torch.nn.functional as F
from torch import nn

import kfaccore as kf
import kfaccore_torch as kt

CE = nn.CrossEntropyLoss()
CORE = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), kf.Schedules(1e-2, 0.9))
pytestmark = pytest.mark.usefixtures("torch_double")


class Net(nn.Module):
    """A head on what `does` makes of inputs with a parameter w."""

    def __init__(self, does, w):
        super().__init__()
        self.does, self.w, self.o = does, nn.Parameter(w), nn.Linear(4, 3)

    def forward(self, x):
        return self.o(torch.tanh(self.does(x, self.w)))


def dense_inputs():
    return torch.randn(6, 8)


def sparse():
    return (torch.randn(6, 8) * (torch.rand(6, 8) > 0.5)).to_sparse()


def jagged():
    return torch.nested.nested_tensor([torch.randn(k, 8) for k in (3, 2, 4, 1, 2, 2)], layout=torch.jagged)


def index():
    return torch.randint(0, 8, (6, 5))


def pooled(h):
    return torch.stack([u.sum(0) for u in h.unbind()])


def complex_numbers():
    return torch.randn(8, 4, dtype=torch.complex128)


def real():
    return torch.randn(8, 4)


CASES = {  # name: (inputs, w, what is done with both, a word of the reason)
    "complex weight": (dense_inputs, complex_numbers, lambda x, w: (x.to(w.dtype) @ w).real, "complex128"),
    "cast": (dense_inputs, real, lambda x, w: (torch.fft.fft(x) @ w.to(torch.complex128)).real, "complex128"),
    "gain": (dense_inputs, real, lambda x, w: (torch.fft.fft(x) * w[:, 0]).real[:, :4], "complex128"),
    "linear": (
        dense_inputs,
        real,
        lambda x, w: F.linear(torch.fft.fft(x), w.T.to(torch.complex128)).real,
        "complex128",
    ),
    "two parts": (
        dense_inputs,
        lambda: torch.randn(8, 4, 2),
        lambda x, w: (torch.fft.fft(x) @ torch.view_as_complex(w)).real,
        "ViewAsComplex",
    ),
    "sparse, linear": (sparse, real, lambda x, w: F.linear(x, w.T), "torch.sparse_coo"),
    "sparse, product": (sparse, real, lambda x, w: x @ w, "torch.sparse_coo"),
    "sparse, rows": (lambda: sparse().to_sparse_csr(), real, lambda x, w: x @ w, "torch.sparse_csr"),
    "sparse, vector": (sparse, lambda: torch.randn(8), lambda x, w: (x @ w)[:, None].expand(-1, 4), "torch.sparse_coo"),
    "jagged, linear": (jagged, real, lambda x, w: pooled(F.linear(x, w.T)), "nested"),
    "jagged, product": (jagged, real, lambda x, w: pooled(x @ w), "nested"),
    "jagged, gain": (jagged, real, lambda x, w: pooled(x * w[:, 0])[:, :4], "nested"),
    "jagged, added": (jagged, real, lambda x, w: pooled(x + w[:, 0])[:, :4], "nested"),
    "sparse gradient": (index, real, lambda x, w: F.embedding(x, w, sparse=True).sum(1), "sparse"),
    "of torch.embedding": (
        index,
        real,
        lambda x, w: torch.embedding(w, x, -1, False, True).sum(1),
        "EmbeddingBackward",
    ),
    "sparse gradient, bag": (index, real, lambda x, w: F.embedding_bag(x, w, sparse=True), "sparse"),
    "sparse gradient, gathered": (index, real, lambda x, w: w.gather(0, x[:, :4], sparse_grad=True), "Gather"),
}


def step(model, x, y, **settings):
    pre = kt.Preconditioner(model, CE, CORE, fisher=kf.type2, **settings)
    with pre.capture():
        f = model(x)
    pre.loss(f, y).backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    pre.step()
    return pre, plain


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_what_meets_them_is_named_and_the_rest_is_right(case):
    inputs, w, does, word = CASES[case]
    model = Net(does, w())
    x, y = inputs(), torch.arange(6) % 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pre, plain = step(model, x, y)
    assert word in pre.engine.plan.uncovered["w"]
    assert torch.equal(_dense(model.w.grad), _dense(plain["w"]))
    found = model.o.weight.grad
    head = nn.Sequential(nn.Linear(4, 3))  # on what the layer saw
    head[0].load_state_dict(model.o.state_dict())
    step(head, torch.tanh(does(x, model.w)).detach(), y)
    torch.testing.assert_close(found, head[0].weight.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("case", [case for case in CASES if case != "complex weight"])
def test_an_optimizer_trains_them_with_a_diagonal(case):
    inputs, w, does, _ = CASES[case]
    model = Net(does, w())
    x, y = inputs(), torch.arange(6) % 3
    optimizer = kt.Optimizer(model, CE)
    before = model.w.detach().clone()
    losses = [optimizer.step(x, y) for _ in range(6)]
    assert losses[-1] < losses[0]
    assert not torch.equal(model.w, before)


def test_an_optimizer_names_a_complex_weight_that_has_no_diagonal():
    model = Net(CASES["complex weight"][2], complex_numbers())
    with pytest.raises(ValueError, match=r"w: it is a torch\.complex128 tensor"):
        kt.Optimizer(model, CE).step(dense_inputs(), torch.arange(6) % 3)


def test_a_diagonal_of_a_sparse_gradient_is_that_of_the_dense_one():
    torch.manual_seed(0)
    w, x, y = real(), index(), torch.arange(6) % 3
    found = []
    for how in (True, False):
        torch.manual_seed(1)
        model = Net(lambda x, w, how=how: w.gather(0, x[:, :4], sparse_grad=how), w.clone())
        step(model, x, y, uncovered=kf.Diagonal())
        found.append(model.w.grad)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def _dense(g):
    return g if g.layout is torch.strided else g.to_dense()
