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


def test_a_state_that_is_held_stays_as_it_was():
    """While training goes on, and after it was loaded: whether it was copied makes no difference."""
    x, y = batch(6)
    model = Changed()
    optimizer = kt.Optimizer(model, CE, rest=torch.optim.Adam)
    for _ in range(2):
        optimizer.step(x, y)
    held, weights = optimizer.state_dict(), {n: p.clone() for n, p in model.state_dict().items()}
    found = []
    for _ in range(3):
        model.load_state_dict(weights)
        optimizer.load_state_dict(held)
        found.append([optimizer.step(x, y) for _ in range(3)])
    assert found[0] == found[1] == found[2]


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
    assert set(pre.engine.plan.layers) == {"w[0:1]", "o"}
    assert torch.equal(plain[1], found[1])
    assert "the part of it that no forward has used" in str(pre.report())
    state = pre.engine.state.layers["o"]
    plain, found = step([0, 1, 1, 0])
    assert len(pre.engine.plan.layers) == 3
    assert all(not torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    assert float(pre.engine.state.layers["o"].weight[0]) > float(state.weight[0])


# What a plan tells before anything is allocated.


def test_memory_is_told_before_it_is_taken():
    make, data = OBSERVED["conv1d of GPT-2"]
    model = make()
    core = kf.Preconditioner(kf.KFAC(), widest=3)
    pre = kt.Preconditioner(model, CE, core)
    told = pre.memory()
    assert pre.engine._state is None
    plan = kt.plan(model, data())
    whole = plan.memory(core)
    assert whole.keys() == plan.layers.keys() > told.keys()
    with pre.capture():
        f = model(data())
    pre.loss(f, torch.tensor([0, 2, 1, 2])).backward()
    pre.step()
    for name, state in pre.engine.state.layers.items():
        assert pre.memory()[name].state == sum(np.asarray(x).nbytes for x in kf.flatten(state).values())
    report = str(plan.report(core))
    assert "G 4 diagonal, A 5 diagonal" in report
    assert "G 3, A 5 diagonal" in report
    assert "diagonal" not in str(plan.report())
    assert plan.report(core).share == pre.report().share == 1.0


def test_a_plan_leaves_the_model_as_it_is():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    plan = kt.plan(model, torch.randn(5, 4, generator=torch.Generator().manual_seed(1)))
    assert set(plan.layers) == {"0", "1.weight", "1.bias", "3"}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())
    assert "covered: 100.0%" in str(plan)
    with pytest.raises(ValueError, match="no tensor with a graph"):
        kt.plan(nn.Sequential(nn.Linear(4, 3), _Ended()), torch.randn(5, 4))


class _Ended(nn.Module):
    def forward(self, x):
        return x.detach()


def test_a_plan_on_the_meta_device():
    with torch.device("meta"):
        for name in ("conv1d of GPT-2", "LSTM", "cross-attention", "transposed 2d", "first positions", "bag, mean"):
            make, data = OBSERVED[name]
            model = make()
            assert not kt.plan(model, data()).uncovered, name


FUSED = ("LSTM, two ways, two layers", "LSTM, projected", "LSTM, packed", "GRU", "GRU, packed", "RNN")


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", FUSED)
def test_unfused_recurrence_is_the_fused_one(name):
    make, data = OBSERVED[name]
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        model = make().to(dtype)
        x = data().to(dtype)
        pre = kt.Preconditioner(model, CE)
        with pre.capture():
            found = model(x)
        torch.testing.assert_close(found, model(x), rtol=tolerance, atol=tolerance)


def test_unfused_states_and_dropout():
    """Given and returned states, one sequence without a batch, and dropout between layers in training."""
    lstm = nn.LSTM(3, 4, 2, dropout=0.5)
    x, h, c = torch.randn(5, 2, 3), torch.randn(2, 2, 4), torch.randn(2, 2, 4)
    pre = kt.Preconditioner(lstm, CE)
    with pre.capture():
        torch.manual_seed(0)
        y, (h1, c1) = lstm(x, (h, c))
        lstm.eval()
        alone, _ = lstm(x[:, 0], (h[:, 0], c[:, 0]))
        both, ends = lstm(x, (h, c))
    wanted, last = lstm(x, (h, c))
    torch.testing.assert_close(alone, wanted[:, 0])
    torch.testing.assert_close(both, wanted)
    torch.testing.assert_close(ends, last)
    assert not torch.allclose(y, wanted)
    assert h1.shape == c1.shape == h.shape
