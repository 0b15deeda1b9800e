"""Operations that multiply what they add with numbers of their own: the same as the products and sums written out."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf

torch = pytest.importorskip("torch")
nn = torch.nn

import kfaccore_torch as kt  # noqa: E402

pytestmark = pytest.mark.usefixtures("torch_double")


class Net(nn.Module):
    def __init__(self, does):
        super().__init__()
        torch.manual_seed(0)
        self.does = does
        self.w, self.b = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3))
        self.o = nn.Linear(3, 3)

    def forward(self, x):
        return self.o(torch.tanh(self.does(self.w, self.b, x)))


def stacked(x):
    return x.reshape(2, 3, 3)


BETA = {
    "addmm": (
        lambda w, b, x: torch.addmm(b, x, w, beta=0.5),
        lambda w, b, x: x @ w + 0.5 * b,
    ),
    "addmm of both numbers": (
        lambda w, b, x: torch.addmm(b, x, w, beta=0.5, alpha=3.0),
        lambda w, b, x: 3 * (x @ w) + 0.5 * b,
    ),
    "addmm, the product's number alone": (
        lambda w, b, x: torch.addmm(b, x, w, alpha=3.0),
        lambda w, b, x: torch.addmm(b, 3 * x, w),
    ),
    "addmm of data": (
        lambda w, b, x: torch.addmm(b, x, x.T @ x, beta=0.5) @ w,
        lambda w, b, x: (x @ (x.T @ x) + 0.5 * b) @ w,
    ),
    "baddbmm": (
        lambda w, b, x: torch.baddbmm(b, stacked(x), w.expand(2, 3, 3), beta=0.5, alpha=3.0).reshape(6, 3),
        lambda w, b, x: 3 * (x @ w) + 0.5 * b,
    ),
    "add": (lambda w, b, x: torch.add(x @ w, b, alpha=0.5), lambda w, b, x: x @ w + 0.5 * b),
    "add to it": (lambda w, b, x: torch.add(b, x @ w, alpha=0.5), lambda w, b, x: 0.5 * (x @ w) + b),
    "sub from it": (lambda w, b, x: torch.sub(b, x @ w, alpha=0.5), lambda w, b, x: -0.5 * (x @ w) + b),
    "addcmul": (
        lambda w, b, x: torch.addcmul(x @ w, x, b, value=0.3),
        lambda w, b, x: x @ w + 0.3 * x * b,
    ),
    "addcmul to it": (
        lambda w, b, x: torch.addcmul(b, x, x @ w, value=0.3),
        lambda w, b, x: b + 0.3 * x * (x @ w),
    ),
    "addcdiv": (
        lambda w, b, x: torch.addcdiv(x @ w, b, x + 4, value=0.3),
        lambda w, b, x: x @ w + b * (0.3 / (x + 4)),
    ),
}
FACTORS = {
    "rsub of it": (lambda w, b, x: torch.rsub(w, torch.ones(3, 3)), lambda w, b, x: 1 - w),
    "rsub of a number": (lambda w, b, x: torch.rsub(torch.ones(3, 3), w), lambda w, b, x: w - 1),
    "rsub of it, times": (lambda w, b, x: torch.rsub(w, torch.ones(3, 3), alpha=2), lambda w, b, x: -2 * w + 1),
    "rsub, times": (lambda w, b, x: torch.rsub(torch.ones(3, 3), w, alpha=2), lambda w, b, x: w - 2),
    "sub": (lambda w, b, x: torch.sub(torch.ones(3, 3), w, alpha=2), lambda w, b, x: -2 * w + 1),
    "add": (lambda w, b, x: torch.add(torch.ones(3, 3), w, alpha=2), lambda w, b, x: 2 * w + 1),
}
METHODS = [kf.KFAC(), kf.KFAC(sharing=kf.reduce), kf.Exact(), kf.EKFAC()]


def directions(does, method):
    model = Net(does)
    core = kf.Preconditioner(method, kf.Clocks(1, 1), kf.Schedules(1e-2))
    pre = kt.Preconditioner(model, nn.CrossEntropyLoss(), core, fisher=kf.type2)
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    with pre.capture():
        f = model(x)
    pre.loss(f, torch.arange(6) % 3).backward()
    pre.step()
    return {name: p.grad.numpy().copy() for name, p in model.named_parameters()}


@pytest.mark.parametrize("method", METHODS[:1] + METHODS[2:3], ids=["KFAC", "Exact"])
@pytest.mark.parametrize("name", BETA)
def test_what_is_added_is_multiplied_too(name, method):
    one, other = BETA[name]
    a, b = directions(one, method), directions(other, method)
    for key in a:
        np.testing.assert_allclose(a[key], b[key], rtol=1e-9, atol=1e-12, err_msg=key)


@pytest.mark.parametrize("method", METHODS, ids=["KFAC", "reduce", "Exact", "EKFAC"])
@pytest.mark.parametrize("name", FACTORS)
def test_a_weight_used_plainly_and_less_a_constant(name, method):
    one, other = (lambda w, b, x, way=way: x @ way(w, b, x) + x.square() @ w + b for way in FACTORS[name])
    a, b = directions(one, method), directions(other, method)
    for key in a:
        np.testing.assert_allclose(a[key], b[key], rtol=1e-9, atol=1e-12, err_msg=key)
