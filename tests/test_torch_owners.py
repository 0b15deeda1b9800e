"""Whose row is it: records of models laid out in every way against J^T H J of the training loss, no record in sight."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf

torch = pytest.importorskip("torch")
nn = torch.nn

import kfaccore_torch as kt  # noqa: E402
from torch_models import MIXING, OWNED, Frames, Graphs, Routed, Tokens, labels  # noqa: E402
from torch_oracle import close, empirical, ggn  # noqa: E402

CE = nn.CrossEntropyLoss()


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def made(table, name):
    torch.manual_seed(0)
    model, inputs, target = table[name]
    return model(), inputs(), target()


@pytest.mark.parametrize("name", OWNED)
def test_type2_is_the_ggn(name):
    model, x, y = made(OWNED, name)
    found, grads = kt.records(model, CE, x, y, fisher=kf.type2)
    layers = kt.plan(model).layers
    assert set(found) == set(layers)
    for layer_name, record in found.items():
        close(kf.dense(record), ggn(model, lambda f: CE(f, y), x, layers[layer_name]))
        assert record.batch > 1 or len(x) == 1
        wanted = torch.autograd.grad(CE(model(x), y), list(layers[layer_name].parameters.values()))
        for role, g in zip(layers[layer_name].parameters, wanted, strict=True):
            np.testing.assert_allclose(layers[layer_name].arrays(grads[layer_name])[role], g, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", [n for n in OWNED if n not in ("one by one",)])
def test_empirical_is_made_of_each_examples_own_gradient(name):
    model, x, y = made(OWNED, name)
    found, _ = kt.records(model, CE, x, y, fisher=kf.empirical)
    layers, f = kt.plan(model).layers, model(x)
    batch = {"classes second": 4, "ignored": 4}.get(name, found["o"].batch)
    first = name == "positions first, flattened"
    each = f.unflatten(0, (-1, batch)).transpose(0, 1) if first else f.reshape(batch, -1, *f.shape[1:])
    own = y.unflatten(0, (-1, batch)).T if first else y.reshape(batch, -1, *y.shape[1:])
    n = int((y != -100).sum())
    losses = [nn.functional.cross_entropy(a, b, reduction="sum") for a, b in zip(each, own, strict=True)]
    for layer_name, record in found.items():
        close(kf.dense(record), empirical(losses, n, layers[layer_name]))


@pytest.mark.parametrize("fisher", [kf.type2, kf.monte_carlo])
@pytest.mark.parametrize("name", MIXING)
def test_rows_that_mix_examples_are_right_in_the_mean(name, fisher):
    model, x, y = made(MIXING, name)
    layers = kt.plan(model).layers
    many = [kt.records(model, CE, x, y, fisher=fisher, draws=1, seed=seed)[0] for seed in range(150)]
    mixing = 0
    for layer_name in many[0]:
        found = np.stack([kf.dense(records[layer_name]) for records in many])
        wanted = ggn(model, lambda f: CE(f, y), x, layers[layer_name])
        error = found.std(0) / len(many) ** 0.5
        mixing += bool(many[0][layer_name].batch == 1)
        assert (np.abs(found.mean(0) - wanted) <= 5 * error + 1e-12 * np.abs(wanted).max()).mean() > 0.99
        assert np.abs(found.mean(0) - wanted).max() <= 6 * error.max() + 1e-10 * np.abs(wanted).max()
    assert mixing


def passes(monkeypatch):
    """Counts backward passes to outputs of calls."""
    counted, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *given, **more: counted.append(1) or grad(*given, **more))
    return counted


class Tokened(nn.Module):
    """A token stands in some columns: a parameter is repeated beside data, no row is."""

    def __init__(self):
        super().__init__()
        self.a, self.token, self.o = nn.Linear(3, 4), nn.Parameter(torch.randn(4)), nn.Linear(4, 3)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.o(torch.where(torch.arange(4) > 1, self.token.expand_as(h), h))


@pytest.mark.parametrize("make", [lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), Tokens, Tokened])
def test_confirmation_costs_two_passes_at_the_first_batch_the_second_the_fourth(make, monkeypatch):
    model = make()
    pre = kt.Preconditioner(model, CE, kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1)))
    counted = passes(monkeypatch)
    sizes = []
    for batch in (6, 6, 5, 6, 6, 6, 6, 6, 6, 5):
        x = torch.randn(batch, 5, 3) if isinstance(model, Tokens) else torch.randn(batch, 3)
        before = len(counted)
        model.zero_grad()
        with pre.capture():
            f = model(x)
        pre.loss(f, labels(batch) if f.ndim == 2 else labels(batch, 5)).backward()
        pre.step()
        sizes.append(len(counted) - before)
    assert sizes == [3, 3, 3, 1, 3, 1, 1, 1, 3, 3]


class Causal(nn.Module):
    """The query of the first position sees one key: its gradient is zero but for rounding."""

    def __init__(self):
        super().__init__()
        self.sides = nn.ModuleList([nn.Linear(256, 256) for _ in range(3)])

    def forward(self, x):
        q, k, v = (side(x)[:, None] for side in self.sides)  # one head
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).mean(2)[:, 0]


def test_rounding_wakes_no_row(monkeypatch):
    model = Causal().float()
    data = [(torch.randn(32, 16, 256, dtype=torch.float32), torch.randint(0, 256, (32,))) for _ in range(8)]
    counted = passes(monkeypatch)
    assert [len(counted) for _ in kt.Stream(model, CE, data, kf.empirical)] == [3, 6, 7, 10, 11, 12, 13, 16]


def test_a_map_costs_a_pass_a_digit():
    """Nine nodes of three graphs: two passes find that shapes are wrong, two more read the map."""
    model, x, y = made(OWNED, "graphs")
    patch = pytest.MonkeyPatch()
    counted = passes(patch)
    kt.records(model, CE, x, y)
    patch.undo()
    assert len(counted) <= 2 + 2 * 2 + 1 + 1  # the question, one draw, the gradient


@pytest.mark.parametrize("kind", ["routed", "graphs"])
def test_a_map_that_data_decide_is_asked_for_again(kind):
    """The same shapes and another routing."""
    if kind == "routed":
        model, ways = Routed(), ([0, 1, 1, 0], [1, 0, 1, 0], [0, 0, 1, 1])
        x, y = torch.randn(4, 3), labels(4)
    else:
        model, ways = Graphs(), ([0, 0, 0, 1, 1, 2, 2, 2, 2], [2, 0, 1, 1, 0, 2, 2, 2, 0])
        x, y = torch.randn(9, 3), labels(3)
    pre = kt.Preconditioner(
        model, CE, kf.Preconditioner(kf.Exact(), kf.Clocks(1, 1), kf.Schedules(0.1, 0.0)), fisher=kf.type2
    )
    layers = pre.engine.plan.layers
    for way in ways:
        model.goes = torch.tensor(way)
        model.zero_grad()
        with pre.capture():
            f = model(x)
        pre.loss(f, y).backward()
        plain = {
            name: layer.matrix({r: p.grad.numpy().copy() for r, p in layer.parameters.items()})
            for name, layer in layers.items()
        }
        pre.step()
        for name, layer in layers.items():
            F = ggn(model, lambda f: CE(f, y), x, layer)[0]
            wanted = np.linalg.solve(F + 0.1 * np.eye(len(F)), plain[name].reshape(-1))
            got = layer.matrix({r: p.grad.numpy() for r, p in layer.parameters.items()})
            np.testing.assert_allclose(got.reshape(-1), wanted, rtol=1e-8, atol=1e-12)


def test_examples_may_be_told():
    model, x, y = made(OWNED, "graphs")
    patch = pytest.MonkeyPatch()
    counted = passes(patch)
    told, _ = kt.records(model, CE, x, y, fisher=kf.type2, examples={"a": model.goes, "o": torch.arange(3)})
    patch.undo()
    assert len(counted) == 3 + 1
    asked, _ = kt.records(model, CE, x, y, fisher=kf.type2)
    for name, record in told.items():
        np.testing.assert_array_equal(kf.dense(record), kf.dense(asked[name]))
    with pytest.raises(ValueError, match="names 8 rows"):
        kt.records(model, CE, x, y, examples={"a": model.goes[:8]})
    with pytest.raises(ValueError, match="fit no layer"):
        kt.records(model, CE, x, y, examples=model.goes[:8])
    with pytest.raises(ValueError, match="names example 5"):
        kt.records(model, CE, x, y, examples=model.goes + 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["graphs", "pairs", "time major", "flattened"])
def test_other_precisions_find_the_same_map(name, dtype):
    model, x, y = made(OWNED, name)
    wanted, _ = kt.records(model, CE, x, y)
    found, _ = kt.records(model.to(dtype), CE, x.to(dtype), y)
    for layer, record in wanted.items():
        assert (found[layer].batch, found[layer].shared) == (record.batch, record.shared)
        assert (record.mask is None) == (found[layer].mask is None)


def test_rows_without_a_gradient_wait_for_one(monkeypatch):
    """Rows behind a closed gate are decided by the first batch that moves them, at two passes."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.o, self.gate = nn.Linear(3, 4), nn.Linear(4, 3), torch.ones(4)

        def forward(self, x):
            return self.o(torch.tanh(self.a(x)) * self.gate[:, None])

    model, x, y = Gated(), torch.randn(4, 3), labels(4)
    pre = kt.Preconditioner(model, CE, kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1)))
    counted, seen = passes(monkeypatch), []
    closed = [1.0, 1.0, 0.0, 0.0]
    for gate in (closed, closed, [0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]):
        model.gate = torch.tensor(gate)
        before = len(counted)
        model.zero_grad()
        with pre.capture():
            f = model(x)
        pre.loss(f, y).backward()
        pre.step()
        ((_, found),) = pre.engine.observer.kept.values()
        seen.append(
            (len(counted) - before, [0 if owned.undecided is None else len(owned.undecided) for owned in found])
        )
    assert seen == [(3, [2, 0]), (3, [2, 0]), (3, [0, 0]), (3, [0, 0]), (1, [0, 0])]


def test_examples_of_frames_of_graphs_and_beside_shared_positions():
    """As many examples as the loss has, with their own rows, whatever the sizes suggest; the mask of tokens is used."""

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.p, self.d = nn.Embedding(5, 4), nn.Dropout(0.0)
            self.f, self.o = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.o(torch.tanh(self.f(x + self.d(self.p(torch.arange(5)[None])))).mean(1))

    for examples in (4, 5):
        mask = torch.ones(examples, 5, dtype=torch.bool)
        found, _ = kt.records(Words(), CE, torch.randn(examples, 5, 4), labels(examples), mask=mask)
        assert (found["f"].batch, found["f"].shared, found["f"].mask.shape) == (examples, 5, (examples, 5))
    frames, _ = kt.records(Frames(), CE, torch.randn(8, 3, 2, 4, 4), labels(8))
    assert {record.batch for record in frames.values()} == {8}
    graphs, _ = kt.records(Graphs(), CE, torch.randn(9, 3), labels(3))  # of 3, 2 and 4 nodes
    assert np.asarray(graphs["a"].mask).sum(1).tolist() == [3, 2, 4]
