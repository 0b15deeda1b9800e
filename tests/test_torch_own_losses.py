"""Losses that users write, and outputs that are not a tensor: records against the loss's own derivatives."""

from __future__ import annotations

import math
from collections import UserDict

import numpy as np
import pytest

import kfaccore as kf
import torch_oracle as oracle

torch = pytest.importorskip("torch")
nn = torch.nn

import kfaccore_torch as kt  # noqa: E402
from kfaccore_torch import draw  # noqa: E402


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


class Poisson(kt.ExampleLoss):
    """f are log rates."""

    def each(self, f, target):
        return (f.exp() - target * f).sum(1)

    def labels(self, f, noise, target):
        rate = f.exp()
        counts = torch.arange(40)
        below = (counts * f[..., None] - rate[..., None] - torch.lgamma(counts + 1.0)).exp().cumsum(-1)
        return (noise[..., None] > below).sum(-1).to(f)


class Heteroscedastic:
    """Mean and log variance of a Gaussian: f (batch, 2). Its Hessian depends on the label; its Fisher is
    diag(1 / variance, 1 / 2)."""

    def value(self, f, target):
        return 0.5 * (f[:, 1] + (target - f[:, 0]) ** 2 * (-f[:, 1]).exp()).sum()

    def normaliser(self, f, target):
        return len(f)

    def gradient(self, f, target):
        gap = f[:, 0] - target
        precision = (-f[:, 1]).exp()
        return torch.stack([gap * precision, 0.5 * (1 - gap**2 * precision)], 1)

    def roots(self, f, target):
        zero = torch.zeros(len(f)).to(f)
        return torch.stack([torch.stack([(-0.5 * f[:, 1]).exp(), zero], 1), torch.stack([zero, zero + 0.5**0.5], 1)])

    def sampled(self, f, noise, target):
        z = torch.special.ndtri(noise[..., 0])
        return torch.stack([-z * (-0.5 * f[:, 1]).exp(), 0.5 * (1 - z**2)], -1)


class Quantile(kt.ExampleLoss):
    """The check loss has no curvature: the Fisher is that of the asymmetric Laplace density it is the likelihood of,
    q (1 - q)."""

    def __init__(self, q):
        self.q = q

    def each(self, f, target):
        gap = target - f
        return torch.maximum(self.q * gap, (self.q - 1) * gap).reshape(len(f), -1).sum(1)

    def roots(self, f, target):
        numbers = f[0].numel()
        eye = torch.eye(numbers).to(f) * (self.q * (1 - self.q)) ** 0.5
        return eye[:, None].expand(numbers, len(f), numbers).reshape(-1, *f.shape)

    def sampled(self, f, noise, target):
        return torch.where(noise < self.q, 1 - self.q, -self.q).to(f)  # the label lies below f with chance q


class Contrast(kt.ExampleLoss):
    """Pairs: f (batch, 2, d) holds both sides; the likelihood of `alike` falls with their distance. The Hessian is not
    that of a convex function, so roots are those of the Gauss-Newton matrix in s = |a - b|^2."""

    def each(self, f, target):
        s = (f[:, 0] - f[:, 1]).square().sum(1) - 1
        return nn.functional.binary_cross_entropy_with_logits(-s, target, reduction="none")

    def _slope(self, f):
        gap = 2 * (f[:, 0] - f[:, 1])
        return -torch.stack([gap, -gap], 1), torch.sigmoid(1 - 0.25 * gap.square().sum(1))

    def roots(self, f, target):
        slope, p = self._slope(f)
        return (slope * (p * (1 - p)).sqrt()[:, None, None])[None]

    def sampled(self, f, noise, target):
        slope, p = self._slope(f)
        return slope * (p - (noise[:, :, 0, 0] < p).to(f))[..., None, None]


class Pairs(nn.Module):
    """One tower, both sides of a pair."""

    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.o(torch.tanh(self.a(x.flatten(0, 1)))).unflatten(0, x.shape[:2])


def mlp(outputs, *last):
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs), *last)


RNG = torch.Generator().manual_seed(0)


def drawn(*shape):
    return torch.randn(shape, generator=RNG, dtype=torch.float64)


CASES = {  # loss, model, inputs, target
    "Poisson": (Poisson(), lambda: mlp(2), drawn(5, 3), torch.tensor([[0.0, 2], [1, 0], [3, 1], [0, 0], [2, 5]])),
    "variance": (Heteroscedastic(), lambda: mlp(2), drawn(5, 3), drawn(5)),
    "quantile": (Quantile(0.9), lambda: mlp(2), drawn(5, 3), drawn(5, 2)),
    "quantile of one number": (Quantile(0.2), lambda: mlp(1, nn.Flatten(0)), drawn(5, 3), drawn(5)),
    "contrast": (Contrast(), Pairs, drawn(5, 2, 3), torch.tensor([1.0, 0, 0, 1, 1])),
}
cases = pytest.mark.parametrize("name", CASES)


def prepared(name):
    loss, make, x, y = CASES[name]
    torch.manual_seed(1)
    return loss, make(), x.double(), y.double()


@cases
def test_gradients(name):
    loss, model, x, y = prepared(name)
    f = model(x).detach().requires_grad_()
    (wanted,) = torch.autograd.grad(loss.value(f, y), f)
    torch.testing.assert_close(loss.gradient(f.detach(), y), wanted, rtol=1e-12, atol=1e-13)


@cases
@pytest.mark.parametrize("fisher", [kf.type2, kf.empirical])
def test_records_are_made_of_what_the_loss_says(name, fisher):
    """J^T B J with B the roots' (or each example's gradient's) second moment, J a row of autograd a number."""
    loss, model, x, y = prepared(name)
    records, grads = kt.records(model, loss, x, y, fisher=fisher)
    f = model(x)
    v = loss.roots(f.detach(), y) if fisher is kf.type2 else loss.gradient(f.detach(), y)[None]
    flat = v.reshape(len(v), len(x), -1).numpy()
    for layer, plan in kt.plan(model).layers.items():
        J = oracle.rows(f.reshape(-1), plan).reshape(len(x), -1, *oracle.rows(f.reshape(-1)[:1], plan).shape[1:])
        own = np.einsum("vbi,biko->vbko", flat, J)
        oracle.close(kf.dense(records[layer]), np.einsum("vbka,vbkc->kac", own, own) / len(x))
        (loss.value(model(x), y) / len(x)).backward()
        wanted = plan.matrix({role: p.grad.numpy() for role, p in plan.parameters.items()})
        oracle.close(grads[layer], wanted, 1e-12)
        model.zero_grad()


@cases
def test_samples_have_the_roots_as_second_moment(name):
    loss, model, x, y = prepared(name)
    f = model(x).detach()
    draws = 4000 if name == "Poisson" else 40000  # it takes one pass of autograd each
    noise = torch.from_numpy(np.random.default_rng(0).random((draws, *f.shape)))
    v = loss.sampled(f, noise, y).reshape(draws, len(f), -1)
    roots = loss.roots(f, y).reshape(-1, len(f), f[0].numel())
    found = torch.einsum("vbi,vbj->bij", v, v) / len(v)
    wanted = torch.einsum("vbi,vbj->bij", roots, roots)
    slack = 10 / draws**0.5
    assert (found - wanted).abs().max() < slack * wanted.abs().max()
    assert v.mean(0).abs().max() < slack * wanted.abs().max().sqrt()


@cases
@pytest.mark.parametrize("shell", ["one object", "a loop"])
def test_they_train(name, shell):
    loss, model, x, y = prepared(name)
    losses = []
    if shell == "one object":
        optimizer = kt.Optimizer(model, loss)
        losses = [optimizer.step(x, y) for _ in range(20)]
    else:
        pre = kt.Preconditioner(model, loss)
        sgd = torch.optim.SGD(model.parameters(), 0.02)
        for _ in range(8):
            sgd.zero_grad()
            with pre.capture():
                f = model(x)
            value = pre.loss(f, y)
            value.backward()
            pre.step()
            sgd.step()
            losses.append(value.item())
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]


def test_a_flattened_prediction_has_examples_of_several_rows():
    class Tokens(nn.Sequential):
        def forward(self, x):
            return super().forward(x).flatten(0, 1)

    model = Tokens(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x, y = torch.randn(3, 4, 3), torch.randint(0, 3, (12, 2)).double()
    records, _ = kt.records(model, Poisson(), x, y, fisher=kf.type2)
    for name, layer in kt.plan(model).layers.items():
        assert records[name].batch == 3
        wanted = oracle.ggn(model, lambda f: Poisson().value(f, y) / 12, x, layer)
        oracle.close(kf.dense(records[name]), wanted)


def test_what_is_missing_is_named():
    class Half(kt.ExampleLoss):
        def each(self, f, target):
            return f.cos().sum(1)

    model, x, y = mlp(2), torch.randn(5, 3), torch.randn(5, 2)
    with pytest.raises(ValueError, match=r"Half is not convex in f.*write roots"):
        kt.records(model, Half(), x, y, fisher=kf.type2)
    with pytest.raises(NotImplementedError, match=r"labels.*or pass fisher=kfaccore.type2"):
        kt.records(model, Half(), x, y)

    class Odd(Poisson):
        def roots(self, f, target):
            return f

    with pytest.raises(ValueError, match=r"Odd.roots gave the shape \(5, 2\); need \(draws, 5, 2\)"):
        kt.records(model, Odd(), x, y, fisher=kf.type2)
    with pytest.raises(ValueError, match="held against each other crosswise"):
        kt.records(mlp(1), nn.MSELoss(), x, torch.randn(5))


class Returning(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way, self.net = way, mlp(3)

    def forward(self, x, scale=1.0):
        f = self.net(x) * scale
        return {"dict": {"hidden": x, "logits": f}, "tuple": (x, f), "object": Holder(f)}[self.way]


class Holder:
    def __init__(self, logits):
        self.logits = logits


@pytest.mark.parametrize(("way", "output"), [("dict", "logits"), ("dict", 1), ("tuple", 1), ("object", "logits")])
def test_the_output_that_the_loss_is_of(way, output):
    x, y = torch.randn(6, 3), torch.randint(0, 3, (6,))
    found = []
    for model, how in ((Returning(way), output), (Returning(way).net, None), (Returning(way), lambda f: pick(f))):
        torch.manual_seed(3)
        for p in model.parameters():
            nn.init.normal_(p)
        pre = kt.Preconditioner(model, nn.CrossEntropyLoss(), output=how)
        with pre.capture():
            f = model(x)
        pre.loss(f, y).backward()
        pre.step()
        grads = [p.grad.clone() for p in model.parameters()]
        loss = kt.Optimizer(model, nn.CrossEntropyLoss(), output=how).step(UserDict({"x": x}) if how else [x], y)
        records, _ = kt.records(model, nn.CrossEntropyLoss(), (x,), y, output=how)
        found.append([*grads, torch.tensor(loss), torch.as_tensor(np.array(next(iter(records.values())).g))])
    for a, b, c in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        torch.testing.assert_close(c, b, rtol=0, atol=0)


def pick(f):
    return f["logits"] if isinstance(f, dict) else f[1] if isinstance(f, tuple) else f.logits


def test_outputs_that_are_not_there():
    x, y = torch.randn(6, 3), torch.randint(0, 3, (6,))
    with pytest.raises(
        ValueError, match=r"output='scores' is not in what the model returned, a dict of \['hidden', 'logits'\]"
    ):
        kt.records(Returning("dict"), nn.CrossEntropyLoss(), x, y, output="scores")
    with pytest.raises(TypeError, match="output='logits'"):
        kt.records(Returning("dict"), nn.CrossEntropyLoss(), x, y)
    with pytest.raises(TypeError, match="output=0"):
        kt.records(Returning("tuple"), nn.CrossEntropyLoss(), x, y)


def test_type2_of_large_predictions_says_its_bytes(monkeypatch):
    model = nn.Conv2d(1, 3, 3, padding=1)
    x, y = torch.randn(2, 1, 192, 192), torch.randint(0, 3, (2, 192, 192))
    with pytest.raises(ValueError, match=r"type2 takes 110,592 draws .*bytes.*monte_carlo"):
        kt.records(model, nn.CrossEntropyLoss(), x, y, fisher=kf.type2)
    kt.records(model, nn.CrossEntropyLoss(), x, y)
    small = x[..., :4, :4], y[..., :4, :4]
    kt.records(model, nn.CrossEntropyLoss(), *small, fisher=kf.type2)
    monkeypatch.setattr(draw, "MOST_BYTES", 48 * 8 * (2 * 48 * 2) - 1)
    with pytest.raises(ValueError, match="48 draws"):
        kt.records(model, nn.CrossEntropyLoss(), *small, fisher=kf.type2)
