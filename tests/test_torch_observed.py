"""Plans by what a forward shows: every operation on a parameter against the network function, and what has none."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf

torch = pytest.importorskip("torch")
nn = torch.nn
F = torch.nn.functional

import kfaccore_torch as kt  # noqa: E402
from kfaccore_torch.draw import Batch  # noqa: E402
from kfaccore_torch.masks import Told  # noqa: E402
from torch_oracle import close, empirical, ggn  # noqa: E402
from torch_uses import OBSERVED  # noqa: E402

CE = nn.CrossEntropyLoss()
observed = pytest.mark.parametrize("name", OBSERVED)


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def of_name(name):
    make, data = OBSERVED[name]
    return make(), data(), torch.tensor([0, 2, 1, 2])


@observed
def test_records_are_of_the_network_function(name):
    model, x, y = of_name(name)
    plan = kt.plan(model, x)
    assert not plan.uncovered
    found, grads = kt.records(model, CE, x, y, fisher=kf.type2)
    own, _ = kt.records(model, CE, x, y, fisher=kf.empirical)
    assert set(found) == set(plan.layers)
    wanted = torch.autograd.grad(CE(model(x), y), [p for p in model.parameters() if p.requires_grad])
    wanted = dict(zip([n for n, p in model.named_parameters() if p.requires_grad], wanted, strict=True))
    losses = F.cross_entropy(model(x), y, reduction="none")
    total = {n: torch.zeros_like(g) for n, g in wanted.items()}
    for layer_name, layer in plan.layers.items():
        assert found[layer_name].batch == 4, layer_name
        close(kf.dense(found[layer_name]), ggn(model, lambda f: CE(f, y), x, layer))
        close(kf.dense(own[layer_name]), empirical(losses, 4, layer))
        for role, part in layer.arrays(grads[layer_name]).items():
            total[layer.paths[role]] += torch.as_tensor(np.array(part)).reshape(total[layer.paths[role]].shape)
    for path, g in wanted.items():  # parts add up to the parameter
        torch.testing.assert_close(total[path], g, rtol=1e-10, atol=1e-12)


@observed
def test_a_draw_leaves_what_its_records_give(name):
    """Measured inside the draw's own backward, where nodes know what that backward asks for."""
    model, x, y = of_name(name)
    pre = kt.Preconditioner(model, CE, kf.KFAC())
    engine = pre.engine
    found = []
    for way in (engine.measured, engine.records, engine.measured):  # the first also asks whose row is whose
        with engine.captured() as seen:
            f = model(x)
        found.append(way(seen, Batch(f, y, Told(None, {}, None)), 0, 4.0)[0])
    hyper = engine.core.schedules.hyper("", 0)
    assert found[2].keys() == found[1].keys() == engine.plan.layers.keys()
    for layer, record in found[1].items():
        wanted = kf.flatten(kf.KFAC().measure(engine.state.layers[layer], record, hyper))
        for path, value in kf.flatten(found[2][layer]).items():
            np.testing.assert_allclose(value, wanted[path], rtol=1e-12, atol=1e-13, err_msg=f"{layer} {path}")


def test_a_joined_vector_is_named():
    """`F.linear` takes a vector too, whose product has no axis of outputs."""

    class Vector(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last, self.head = nn.Parameter(torch.rand(1)), nn.Parameter(torch.rand(2)), nn.Linear(1, 3)

        def forward(self, x):
            return self.head(F.linear(x, torch.cat([self.first, self.last]))[:, None])

    plan = kt.plan(Vector(), torch.rand(4, 3))
    assert plan.uncovered == dict.fromkeys(["first", "last"], "it goes into CatBackward0")


class ByHand(nn.Module):
    """No module in it is known."""

    def __init__(self, net):
        super().__init__()
        self.w, self.b, self.v, self.c = (nn.Parameter(p.detach().clone()) for p in net.parameters())

    def forward(self, x):
        return F.linear(torch.tanh(F.linear(x, self.w, self.b)), self.v, self.c)


@pytest.mark.parametrize("way", ["by hand", "traced", "scripted"])
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_model_that_shows_no_layer_is_looked_at_in_its_first_step(way):
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(8, 3), torch.arange(8) % 3
    model = ByHand(net) if way == "by hand" else torch.jit.trace(net, x) if way == "traced" else torch.jit.script(net)
    found = []
    for one in (net, model):
        pre = kt.Preconditioner(one, CE, kf.Preconditioner(kf.KFAC(), schedules=kf.Schedules(0.1)), fisher=kf.type2)
        one.zero_grad()
        with pre.capture():
            f = one(x)
        pre.loss(f, y).backward()
        plain = [p.grad.clone() for p in one.parameters()]
        pre.step()
        assert not any(torch.equal(p.grad, g) for p, g in zip(one.parameters(), plain, strict=True))
        found.append([p.grad.clone() for p in one.parameters()])
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
