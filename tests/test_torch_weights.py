"""Parameters as matrices and back, for layers that modules do not show: their posteriors are those of plain layers."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf

torch = pytest.importorskip("torch")
nn = torch.nn
F = torch.nn.functional

import kfaccore_torch as kt  # noqa: E402

pytestmark = pytest.mark.usefixtures("torch_double")


class Plain(nn.Module):
    """Two projections and a layer of their product."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.q, self.k, self.l = nn.Linear(3, 5), nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.l((self.q(x) * self.k(x)).tanh())


class Fused(Plain):
    """Slices of one projection."""

    def __init__(self):
        super().__init__()
        self.qk = nn.Linear(3, 10)
        with torch.no_grad():
            self.qk.weight.copy_(torch.cat([self.q.weight, self.k.weight]))
            self.qk.bias.copy_(torch.cat([self.q.bias, self.k.bias]))
        del self.q, self.k

    def forward(self, x):
        q, k = (F.linear(x, w, b) for w, b in zip(self.qk.weight.chunk(2), self.qk.bias.chunk(2), strict=True))
        return self.l((q * k).tanh())


class Raw(Plain):
    """A matrix that no module knows, and a bias that it is used apart from."""

    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(self.q.weight.detach().T.clone()), nn.Parameter(self.q.bias.detach().clone())
        del self.q

    def forward(self, x):
        return self.l(((x @ self.w + self.b) * self.k(x)).tanh())


def data():
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    return x, torch.arange(8) % 3


def posterior(model, mean):
    stream = kt.Stream(model, nn.CrossEntropyLoss(), [data()], fisher=kf.type2)
    return kf.Posterior(kt.matrices(mean(model, stream)), kf.fit(kf.KFAC(), stream), precision=1.0, scale=8)


def covariance(P, model):
    (records,) = kt.outputs(model, [data()])
    return P.covariance(records)


@pytest.mark.parametrize("mean", [lambda m, s: s, lambda m, s: kt.plan(m, data()[0])], ids=["stream", "plan"])
def test_slices_have_the_posterior_of_layers(mean):
    model, plain = Fused(), Plain()
    wanted = covariance(posterior(plain, lambda m, s: m), plain)
    found = posterior(model, mean)
    assert sorted(found.mean) == ["l", "qk.weight[0:5]", "qk.weight[5:10]"]
    np.testing.assert_allclose(covariance(found, model), wanted, rtol=1e-9)


@pytest.mark.parametrize("kind", [Plain, Fused, Raw])
def test_a_sample_is_set_and_read_back(kind):
    model, (x, _) = kind(), data()
    P = posterior(model, lambda m, s: s)
    rng = np.random.default_rng(0)
    drawn = P.sample({name: rng.normal(size=m.shape) for name, m in P.mean.items()})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plan = kt.plan(model, x)
    one = next(name for name in drawn if name != "l")
    kt.assign(plan, {one: drawn[one]})
    again = kt.matrices(plan)
    for name in drawn:
        wanted = drawn[name] if name == one else P.mean[name]
        np.testing.assert_allclose(again[name].ravel(), wanted.ravel(), rtol=1e-12)
    kt.assign(plan, drawn)
    np.testing.assert_allclose(kt.matrices(plan)[one], drawn[one][0], rtol=1e-12)
    kt.assign(plan, P.mean)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name], rtol=1e-12, atol=1e-15)


def test_what_a_model_alone_does_not_tell():
    model, (x, _) = Raw(), data()
    mean = kt.matrices(kt.plan(model, x))
    with pytest.raises(ValueError, match=r"no layers \['b', 'w'\].*by the types of its modules: pass the Stream, or"):
        kt.assign(model, mean)
    with pytest.raises(ValueError, match=r"skip is .* beside a Plan"):
        kt.matrices(kt.plan(model, x), skip=("l.*",))
    before = model.l.weight.detach().clone()
    with pytest.raises(ValueError, match=r"layer 'k' got a matrix of \(2, 2\)"):
        kt.assign(model, {"l": np.zeros((3, 6)), "k": np.zeros((2, 2))})
    torch.testing.assert_close(model.l.weight.detach(), before, rtol=0, atol=0)


def test_no_layer_at_all():
    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3, 2))

    with pytest.raises(ValueError, match="no parameter of this Alone is covered, by the types"):
        kt.matrices(Alone())
