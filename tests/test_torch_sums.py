"""Losses that are sums: several heads, one's own, and what a loss gives for each example."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf

torch = pytest.importorskip("torch")
nn = torch.nn
F = torch.nn.functional

import kfaccore_torch as kt  # noqa: E402

pytestmark = pytest.mark.usefixtures("torch_double")


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.trunk, self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x):
        h = self.trunk(x).tanh()
        return {"a": self.a(h), "b": self.b(h)}


class Sum(kt.ExampleLoss):
    """Half the squares, a sum."""

    reduction = "sum"

    def each(self, f, target):
        return ((f - target) ** 2).sum(1) / 2

    def normaliser(self, f, target):
        return 1.0


class SumModule(nn.Module, Sum):
    """The same, with what modules have."""


def data():
    g = torch.Generator().manual_seed(0)
    return torch.randn(12, 3, generator=g), torch.arange(12) % 3, torch.randn(12, 2, generator=g)


HEADS = {
    "torch": lambda: {"a": nn.CrossEntropyLoss(reduction="sum"), "b": nn.MSELoss(reduction="sum")},
    "own": lambda: {"a": nn.CrossEntropyLoss(reduction="sum"), "b": Sum()},
}


def stepped(sizes, heads, steps=2):
    x, y, z = data()
    model = Two()
    core = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), kf.Schedules(1e-3, 0.9))
    pre = kt.Preconditioner(model, kf.Joint(heads, {"b": 0.3}), core, fisher=kf.type2)
    for _ in range(steps):
        model.zero_grad()
        for i in torch.arange(12).split(sizes):
            with pre.capture():
                f = model(x[i])
            pre.loss(f, {"a": y[i], "b": z[i]}).backward()
        pre.step()
    return np.concatenate([p.grad.flatten().numpy() for p in model.parameters()])


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("sizes", [6, 5, 1, [2, 7, 3]], ids=str)
def test_sums_of_several_heads_add_up_over_micro_batches(sizes, heads):
    np.testing.assert_allclose(stepped(sizes, heads()), stepped(12, heads()), rtol=1e-9)


def test_the_fisher_of_sums_of_several_heads():
    """Twelve times that of their means by example."""
    x, y, z = data()
    model, target = Two(), {"a": y, "b": z}
    found, grads = kt.records(model, kf.Joint(HEADS["own"](), {"b": 0.3}), x, target, fisher=kf.type2)
    mean = kf.Joint({"a": kf.SoftmaxCrossEntropy(), "b": kf.Gaussian()}, {"b": 0.3})
    wanted, slopes = kt.records(model, mean, x, target, fisher=kf.type2)
    for name, record in wanted.items():
        assert found[name].n == 1
        np.testing.assert_allclose(kf.dense(found[name]), 12 * kf.dense(record), rtol=1e-12)
        np.testing.assert_allclose(grads[name], 12 * slopes[name], rtol=1e-12)


def test_heads_of_which_some_are_sums_and_some_are_means_are_refused():
    loss = kf.Joint({"a": nn.CrossEntropyLoss(reduction="sum"), "b": nn.MSELoss()})
    with pytest.raises(ValueError, match=r"sums for \['a'\] and means for \['b'\]"):
        kt.Preconditioner(Two(), loss)


@pytest.mark.parametrize(
    ("loss", "times"),
    [(Sum(), 1), (SumModule(), 1), (kf.Joint({"b": Sum()}), 1), (kf.Joint({"b": nn.MSELoss(reduction="sum")}), 2)],
    ids=["own", "own module", "joint of own", "joint of torch"],
)
@pytest.mark.parametrize("fisher", [kf.type2, kf.empirical])
def test_a_stream_of_a_sum_has_shares_of_the_mean_however_it_is_cut(loss, times, fisher):
    x, _, z = data()
    joint = isinstance(loss, kf.Joint)

    class Model(Two):
        def forward(self, x):
            f = super().forward(x)["b"]
            return {"b": f} if joint else f

    wanted, _ = kt.records(
        Model(), kf.Joint({"b": kf.Gaussian()}) if joint else kf.Gaussian(), x, _of(z, joint), fisher=fisher
    )
    for cut in (12, 5, 1):
        pairs = [(x[i], _of(z[i], joint)) for i in torch.arange(12).split(cut)]
        parts = list(kt.Stream(Model(), loss, pairs, fisher=fisher))
        for name, record in wanted.items():
            assert sum(part[name].n for part in parts) == 12
            whole = sum(kf.dense(part[name]) * part[name].n for part in parts) / 12
            scale = times**2 if fisher is kf.empirical else times
            np.testing.assert_allclose(whole, scale * kf.dense(record), rtol=1e-10, atol=1e-14)


def _of(target, joint):
    return {"b": target} if joint else target


SHAPES = {
    "mean": (3, lambda f, t: F.cross_entropy(f, t), r"\(\)"),
    "crosswise": (1, lambda f, t: (f - t) ** 2, r"\(12, 12\)"),
    "by number": (3, lambda f, t: f**2, r"\(12, 3\)"),
    "one axis too many": (1, lambda f, t: f**2, r"\(12, 1\)"),
}


@pytest.mark.parametrize("fisher", [kf.type2, kf.empirical])
@pytest.mark.parametrize(("d", "each", "shape"), SHAPES.values(), ids=SHAPES)
def test_what_is_not_a_number_an_example_is_named(d, each, shape, fisher):
    class Loss(kt.ExampleLoss):
        def each(self, f, target):
            return each(f, target)

    x, y, _ = data()
    model = nn.Linear(3, d)
    pre = kt.Preconditioner(model, Loss(), fisher=fisher)
    with pre.capture():
        f = model(x)
    with pytest.raises(ValueError, match=rf"Loss.each gave the shape {shape}.*need \(12,\)"):
        pre.loss(f, y)
