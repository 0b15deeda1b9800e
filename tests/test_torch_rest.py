"""Parameters without a Kronecker record, states that carry their table, and shells on models of all kinds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import kfaccore as kf

torch = pytest.importorskip("torch")
nn = torch.nn
F = torch.nn.functional

import kfaccore_torch as kt  # noqa: E402
from torch_oracle import close, ggn  # noqa: E402
from torch_uses import OBSERVED  # noqa: E402

CE = nn.CrossEntropyLoss()


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


class Changed(nn.Module):
    """A weight and a scale that are changed before they meet an example, beside a plain layer."""

    def __init__(self):
        super().__init__()
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.scale, self.fc = nn.Parameter(torch.randn(4)), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(torch.tanh(self.normed(x) * F.softplus(self.scale)))


def batch(n=3):
    return torch.randn(n, 4), torch.randint(0, 3, (n,))


def test_the_diagonal_is_unbiased():
    """Over all signs of the examples the squares average to the diagonal of the block, with nothing else in it."""
    model, (x, y) = Changed(), batch()
    draws = kf.type2(kf.SoftmaxCrossEntropy(), model(x).detach())
    signs = torch.tensor(list(itertools.product([1.0, -1.0], repeat=3)))
    signed = (signs[:, None, :, None] * draws).flatten(0, 1) / len(signs) ** 0.5
    found, grads = kt.records(model, CE, x, y, draws=signed, uncovered=kf.Diagonal())
    plan = kt.plan(model, x)
    assert set(plan.uncovered) == {
        n for n, _ in model.named_parameters() if n not in ("normed.bias", "fc.weight", "fc.bias")
    }
    named = dict(model.named_parameters())
    for name in plan.uncovered:
        record = found[name]
        assert (record.batch, record.shared, record.d_in, record.d_out) == (1, 1, 1, named[name].numel())
        layer = type(plan.layers["fc"])(name, _Flat(), {"p": named[name]}, {"p": name}, {})
        exact = ggn(model, lambda f: CE(f, y), x, layer)[0]
        close(np.asarray(record.g)[:, 0, 0, 0].T @ np.asarray(record.g)[:, 0, 0, 0] / record.n, exact)
        wanted = torch.autograd.grad(CE(model(x), y), named[name])[0].reshape(-1, 1)
        close(grads[name], wanted.numpy())


class _Flat:
    """A parameter as one vector."""

    def matrix(self, arrays):
        return arrays["p"].reshape(1, -1)


@pytest.mark.parametrize("fisher", [kf.monte_carlo, kf.type2, kf.empirical])
def test_rows_that_examples_share_have_signs_of_their_own(fisher):
    """Without them empirical draws would add up to the mean gradient, which vanishes where training ends."""
    model, (x, y) = Changed(), batch()
    found = [kt.records(model, CE, x, y, fisher=fisher, uncovered=kf.Diagonal(), seed=s)[0]["scale"] for s in range(6)]
    assert len({np.round(np.abs(np.asarray(r.g)).sum(), 12) for r in found}) > 1
    assert all(r.n == 3 for r in found)


def test_the_direction_is_that_of_the_diagonal():
    model, (x, y) = Changed(), batch(8)
    core = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), kf.Schedules(0.1))
    pre = kt.Preconditioner(model, CE, core, uncovered=kf.Diagonal())
    record = kt.records(model, CE, x, y, uncovered=kf.Diagonal())[0]["scale"]
    with pre.capture():
        f = model(x)
    pre.loss(f, y).backward()
    gradient = model.scale.grad.clone()
    pre.step()
    squares = torch.as_tensor((np.asarray(record.g) ** 2).sum(0).reshape(-1) / record.n)
    torch.testing.assert_close(model.scale.grad, gradient / (squares + 0.1), rtol=1e-10, atol=1e-12)
    assert bool(pre.info.layers["scale"]["diagonal"])
    row = next(row for row in pre.report().rows if row.parameters == ("scale",))
    assert (row.rule, row.count) == ("-", 4)
    assert "diagonal, no products with other layers: it goes into SoftplusBackward0" in row.quality
    assert pre.report().share < 0.6


def test_off_for_preconditioners_and_on_for_optimizers():
    model, (x, y) = Changed(), batch(8)
    pre = kt.Preconditioner(model, CE)
    assert "scale" not in pre.engine.plan.layers
    optimizer = kt.Optimizer(model, CE)
    losses = [optimizer.step(x, y) for _ in range(15)]
    assert losses[-1] < 0.7 * losses[0]
    assert "no products with other layers" in str(optimizer.report())
    rest = kt.Optimizer(Changed(), CE, rest=torch.optim.Adam)
    rest.step(x, y)
    assert rest.engine.plan.rest


def test_methods_of_each_examples_own_gradient_refuse():
    model, (x, y) = Changed(), batch(8)
    core = kf.Preconditioner(kf.FNGD(), kf.Clocks(1, 1), kf.Schedules(0.1), step=kf.Fixed(0.1))
    with pytest.raises(ValueError, match=r"FNGD.* own gradient.*'normed\.parametrizations.*rest="):
        kt.Optimizer(model, CE, core, fisher=kf.empirical, uncovered=kf.Diagonal()).step(x, y)
    with pytest.raises(ValueError, match="forward_only takes none"):
        kt.Optimizer(model, CE, fisher=kf.forward_only, uncovered=kf.Diagonal())
    together = kf.Preconditioner(network=kf.TwoLevel(kf.KFAC()), step=kf.Fixed(0.1))
    with pytest.raises(ValueError, match=r"TwoLevel.*no Kronecker record.*rest="):
        kt.Optimizer(model, CE, together).step(x, y)


# States carry the table of their layers.


@pytest.mark.parametrize("name", ["conv1d of GPT-2", "LSTM, two ways, two layers", "cross-attention", "class token"])
@pytest.mark.parametrize("way", ["state_dict", "file"])
def test_a_state_loads_before_the_first_forward(name, way, tmp_path):
    def fresh():
        torch.manual_seed(0)
        make, data = OBSERVED[name]
        model = make()
        return model, kt.Optimizer(model, CE), data()

    y = torch.tensor([0, 2, 1, 2])
    model, optimizer, x = fresh()
    for _ in range(3):
        optimizer.step(x, y)
    other, resumed, _ = fresh()
    if way == "file":
        optimizer.save(tmp_path / "state.safetensors")
        resumed.load(tmp_path / "state.safetensors")
    else:
        torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
        parameters, state = torch.load(tmp_path / "state.pt", weights_only=True)
        other.load_state_dict(parameters)
        resumed.load_state_dict(state)
    assert resumed.engine.plan.layers.keys() == optimizer.engine.plan.layers.keys()
    for _ in range(2):
        assert resumed.step(x, y) == optimizer.step(x, y)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_a_state_of_another_model_changes_nothing():
    make, data = OBSERVED["conv1d of GPT-2"]
    optimizer = kt.Optimizer(make(), CE)
    optimizer.step(data(), torch.tensor([0, 2, 1, 2]))
    other = kt.Optimizer(nn.Linear(3, 3), CE)
    plan = other.engine.plan
    with pytest.raises(ValueError, match="another model"):
        other.load_state_dict(optimizer.state_dict())
    assert other.engine.plan is plan


def test_a_state_without_a_table_loads():
    model, (x, y) = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), batch(8)
    optimizer = kt.Optimizer(model, CE)
    optimizer.step(x, y)
    state = {key: value for key, value in optimizer.state_dict().items() if key != "layers"}
    kt.Optimizer(model, CE).load_state_dict(state)


def test_plans_follow_what_later_forwards_show():
    """A part of a parameter that the first batch did not use joins when it is used; the others keep their state."""
    make, _ = OBSERVED["routed"]
    model = make()
    pre = kt.Preconditioner(model, CE, kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), kf.Schedules(0.1)))

    def step(goes):
        model.goes = torch.tensor(goes)
        model.zero_grad()
        with pre.capture():
            f = model(torch.randn(4, 3))
        pre.loss(f, torch.tensor([0, 2, 1, 2])).backward()
        plain = model.w.grad.clone()
        pre.step()
        return plain, model.w.grad

    plain, found = step([0, 0, 0, 0])
    assert set(pre.engine.plan.layers) == {"w[0:1]", "o"} or set(pre.engine.plan.layers) == {"w", "o"}
    assert torch.equal(plain[1], found[1])
    assert "the part of it that no forward has used" in str(pre.report())
    state = pre.engine.state.layers["o"]
    plain, found = step([0, 1, 1, 0])
    assert len(pre.engine.plan.layers) == 3
    assert all(not torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    assert float(pre.engine.state.layers["o"].weight[0]) > float(state.weight[0])
