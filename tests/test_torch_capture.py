"""The torch adapter's records against autograd: every layer kind, every way of calling one, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf

torch = pytest.importorskip("torch")
nn = torch.nn
F = torch.nn.functional

import kfaccore_torch as kt  # noqa: E402
from kfaccore_torch import capture as capturing  # noqa: E402
from kfaccore_torch.draw import Batch  # noqa: E402
from kfaccore_torch.masks import Told  # noqa: E402
from kfaccore_torch.step import Engine, Settings  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


class Flat(nn.Module):
    """Mean over everything but batch and features, so that any model ends in (batch, features)."""

    def forward(self, x):
        return x.flatten(2).mean(-1) if x.ndim > 2 else x


class Tokens(nn.Module):
    """Mean over positions of (batch, positions, features)."""

    def forward(self, x):
        return x.mean(1)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.fc(torch.tanh(self.fc(x)))))


class Tied(nn.Module):
    """Two modules, one weight, each its own bias."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.out(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Positions(nn.Module):
    """Positions are embedded once for all examples and added to each, in several ways of writing it."""

    def __init__(self, way="add"):
        super().__init__()
        self.way, self.position, self.out = way, nn.Embedding(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = self.position(torch.arange(3)[None] if self.way == "one row" else torch.arange(3))
        if self.way == "in place":
            x = x * 1.0
            x += h
            return self.out(torch.tanh(x).mean(1))
        x = torch.add(h, x) if self.way == "function" else x + (h[None] if self.way == "view" else h)
        return self.out(torch.tanh(x).mean(1)) + (h.sum() if self.way == "twice" else 0.0)


class PositionsFirst(nn.Module):
    """Rows run over positions, a multiple of the examples in number, before they run over examples."""

    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.fc(x.transpose(0, 1))).mean(0))


class Functional(nn.Module):
    """No layer's forward is ever called."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return F.linear(torch.relu_(F.linear(x, self.a.weight, self.a.bias)), bias=self.b.bias, weight=self.b.weight)


class SelfAttention(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.batch_first = batch_first
        self.attention, self.out = nn.MultiheadAttention(4, 2, batch_first=batch_first), nn.Linear(4, 3)

    def forward(self, x):
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.out(x.mean(1 if self.batch_first else 0))


class Windows(nn.Module):
    """Windows of tokens folded into the batch axis."""

    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.fc(x.reshape(-1, 2, 4))).reshape(len(x), -1, 4).mean(1))


class Parametrised(nn.Module):
    """A frozen weight whose bias is trained, and a trained weight whose bias is frozen."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.a.weight.requires_grad_(False)
        self.b.bias.requires_grad_(False)

    def forward(self, x):
        return self.out(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Convolution(nn.Module):
    """One convolution called on its own output."""

    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(2, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.conv(torch.tanh(self.conv(x)))).flatten(2).mean(-1))


def conv(layer):
    return nn.Sequential(layer, nn.Tanh(), Flat(), nn.Linear(4, 3))


def norm(layer, features=4):
    return nn.Sequential(nn.Linear(features, features), layer, nn.Tanh(), nn.Linear(features, 3))


def drawn(*shape):
    return lambda: torch.randn(5, *shape)


def ids(high, *shape):
    return lambda: torch.randint(0, high, (5, *shape))


MODELS = {
    "dense": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3, bias=False)), drawn(4)),
    "in-place": (lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)), drawn(4)),
    "tokens": (lambda: nn.Sequential(nn.Linear(4, 6), nn.GELU(), Tokens(), nn.Linear(6, 3)), drawn(7, 4)),
    "more axes": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Flatten(1, 2), Tokens(), nn.Linear(6, 3)),
        drawn(2, 3, 4),
    ),
    "twice": (Twice, drawn(4)),
    "tied": (Tied, drawn(4)),
    "functional": (Functional, drawn(4)),
    "windows": (Windows, drawn(6, 4)),
    "positions first": (PositionsFirst, drawn(10, 4)),
    "frozen": (Parametrised, drawn(4)),
    "conv1d": (lambda: conv(nn.Conv1d(2, 4, 3, padding=2, dilation=2)), drawn(2, 7)),
    "conv2d": (lambda: conv(nn.Conv2d(2, 4, (3, 2), padding=1, bias=False)), drawn(2, 5, 6)),
    "conv3d": (lambda: conv(nn.Conv3d(2, 4, 2, stride=(1, 2, 1))), drawn(2, 3, 4, 3)),
    "strided": (lambda: conv(nn.Conv2d(2, 4, 3, stride=2, padding=(1, 0))), drawn(2, 6, 7)),
    "grouped": (lambda: conv(nn.Conv2d(4, 4, 3, groups=2)), drawn(4, 5, 5)),
    "depthwise": (lambda: conv(nn.Conv2d(4, 4, 3, groups=4, padding=1)), drawn(4, 5, 5)),
    "same": (lambda: conv(nn.Conv2d(2, 4, 4, padding="same")), drawn(2, 5, 5)),
    "valid": (lambda: conv(nn.Conv2d(2, 4, 3, padding="valid")), drawn(2, 5, 5)),
    "reflect": (lambda: conv(nn.Conv2d(2, 4, 3, padding=2, padding_mode="reflect")), drawn(2, 5, 5)),
    "circular": (lambda: conv(nn.Conv2d(2, 4, 3, padding="same", padding_mode="circular")), drawn(2, 5, 5)),
    "channels last": (
        lambda: conv(nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last)),
        lambda: torch.randn(5, 2, 5, 5).to(memory_format=torch.channels_last),
    ),
    "conv twice": (Convolution, drawn(2, 4, 4)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(7, 4), Tokens(), nn.Linear(4, 3)), ids(7, 6)),
    "one token": (lambda: nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3)), ids(7)),
    "padding": (lambda: nn.Sequential(nn.Embedding(5, 4, padding_idx=2), Tokens(), nn.Linear(4, 3)), ids(5, 6)),
    "layer norm": (lambda: norm(nn.LayerNorm(4)), drawn(4)),
    "layer norm on tokens": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh(), Tokens(), nn.Linear(4, 3)),
        drawn(6, 4),
    ),
    "layer norm on two axes": (
        lambda: nn.Sequential(nn.LayerNorm((3, 4)), nn.Tanh(), Tokens(), nn.Linear(4, 3)),
        drawn(3, 4),
    ),
    "rms norm": (lambda: norm(nn.RMSNorm(4)), drawn(4)),
    "group norm": (lambda: conv(nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4))), drawn(2, 5, 5)),
    "batch norm": (lambda: conv(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4))).eval(), drawn(2, 5, 5)),
    "attention": (lambda: SelfAttention(True), drawn(6, 4)),
    "attention, positions first": (lambda: SelfAttention(False), drawn(6, 4)),
    "transformer": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), Tokens(), nn.Linear(4, 3)
        ),
        drawn(6, 4),
    ),
}
for _way in ("add", "function", "in place", "one row"):
    MODELS[f"positions, {_way}"] = (lambda way=_way: Positions(way), drawn(3, 4))
models = pytest.mark.parametrize("name", MODELS)
LOSS = kf.SoftmaxCrossEntropy()
LINEAR = F.linear


def prepared(name, **settings):
    make, data = MODELS[name]
    model = make()
    core = kf.Preconditioner(kf.KFAC())
    return model, data(), torch.randint(0, 3, (5,)), Engine(model, LOSS, core, Settings(**settings))


def recorded(engine, x, y):
    with engine.captured() as seen:
        f = engine.model(x)
    return f, drawn_from(engine, seen, f, y)


def drawn_from(engine, seen, f, y, turn=0):
    batch = Batch(f, y, Told())
    return engine.records(seen, batch, turn, engine.share(batch), True)[0]


@models
def test_examples_are_autograds(name):
    model, x, y, engine = prepared(name, fisher=kf.empirical)
    _, records = recorded(engine, x, y)
    assert set(records) == set(engine.plan.layers)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {
        id(p) for layer in engine.plan.layers.values() for p in layer.parameters.values()
    }
    for i in range(len(x)):
        loss = LOSS.value(model(x[i : i + 1]), y[i : i + 1])
        for layer_name, layer in engine.plan.layers.items():
            wanted = torch.autograd.grad(loss, list(layer.parameters.values()), retain_graph=True)
            matrix = layer.matrix({r: g.numpy() for r, g in zip(layer.parameters, wanted, strict=True)})
            got = records[layer_name].examples()[0, :, i]
            np.testing.assert_allclose(got.reshape(matrix.shape), matrix, rtol=1e-10, atol=1e-12, err_msg=layer_name)


@models
def test_the_mean_gradient_and_its_way_back(name):
    model, x, y, engine = prepared(name, fisher=kf.empirical)
    f, records = recorded(engine, x, y)
    (LOSS.value(f, y) / len(x)).backward()
    for layer_name, layer in engine.plan.layers.items():
        mean = records[layer_name].examples().sum((0, 2)) / records[layer_name].n
        arrays = layer.arrays(mean if mean.shape[0] > 1 else mean[0])
        for role, p in layer.parameters.items():
            np.testing.assert_allclose(arrays[role], p.grad.numpy(), rtol=1e-10, atol=1e-12)
    assert torch.equal(model(x), f) or "batch" in name


@models
def test_namespaces_agree(name):
    """The same core on torch tensors and on NumPy views."""
    found = {}
    for namespace in ("numpy", "torch"):
        torch.manual_seed(0)
        _, x, y, engine = prepared(name, namespace=namespace, draws=2)
        _, records = recorded(engine, x, y)
        grads = {n: r.examples().sum((0, 2)) for n, r in records.items()}
        found[namespace] = engine.step({n: [r] for n, r in records.items()}, grads)
    for layer_name, x in found["numpy"].items():
        np.testing.assert_allclose(found["torch"][layer_name].numpy(), x, rtol=1e-9, atol=1e-11)


def test_views_need_the_edge_of_their_base(monkeypatch):
    """`nn.Linear` on three axes returns a view, which an activation in place takes off the path."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), Tokens(), nn.Linear(6, 3))
    x, y = torch.randn(5, 7, 4), torch.randint(0, 3, (5,))
    found, _ = kt.records(model, LOSS, x, y, fisher=kf.empirical)
    (g,) = torch.autograd.grad(LOSS.value(model(x), y), model[0].weight)
    np.testing.assert_allclose(found["0"].examples().sum((0, 1, 2))[:, :4], g.numpy(), rtol=1e-10)
    # without it the call is seen in the graph all the same
    monkeypatch.setattr(capturing, "_edge", capturing.get_gradient_edge)
    other, _ = kt.records(model, LOSS, x, y, fisher=kf.empirical)
    np.testing.assert_allclose(other["0"].examples().sum((0, 1, 2))[:, :4], g.numpy(), rtol=1e-10)


def test_running_statistics_move_once():
    model = conv(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)))
    engine = Engine(model, LOSS, kf.Preconditioner(kf.KFAC()), Settings())
    x, y = torch.randn(5, 2, 5, 5), torch.randint(0, 3, (5,))
    before = model[0][1].running_mean.clone()
    with engine.captured() as seen:
        f = model(x)
    once = model[0][1].running_mean.clone()
    drawn_from(engine, seen, f, y)
    assert not torch.equal(before, once)
    torch.testing.assert_close(model[0][1].running_mean, once)


def test_gradients_and_functions_are_left_alone():
    model, x, y, engine = prepared("dense")
    recorded(engine, x, y)
    assert all(p.grad is None for p in model.parameters())
    model(x).sum().backward()
    kept = [p.grad.clone() for p in model.parameters()]
    recorded(engine, x, y)
    assert all(torch.equal(p.grad, k) for p, k in zip(model.parameters(), kept, strict=True))
    assert not model._forward_hooks
    assert not model[0]._forward_hooks
    with pytest.raises(RuntimeError, match="stop"), engine.captured() as seen:
        raise RuntimeError("stop")
    model(x)
    assert not seen.calls
    assert F.linear is LINEAR


def test_attention_restores_linear_after_an_error():
    model = SelfAttention(True)
    engine = Engine(model, LOSS, kf.Preconditioner(kf.KFAC()), Settings())
    with pytest.raises((RuntimeError, AssertionError)), engine.captured():
        model(torch.randn(5, 6, 3))
    assert F.linear is LINEAR


def test_calls_without_a_graph_are_not_seen():
    model, x, _, engine = prepared("dense")
    with engine.captured() as seen:
        with torch.no_grad():
            model(x)
        assert not seen.calls
        model(x)
        assert {name: len(calls) for name, calls in seen.calls.items()} == {"0": 1, "2": 1}


def test_an_unused_layer_has_no_record():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.never, self.aside = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            self.aside(x)
            return self.a(x)

    engine = Engine(Unused(), LOSS, kf.Preconditioner(kf.KFAC()), Settings())
    _, records = recorded(engine, torch.randn(5, 4), torch.zeros(5, dtype=torch.int64))
    assert set(records) == {"a"}


def test_tokens_joined_to_examples_in_the_prediction():
    """(examples, positions, classes) flattened for the loss: layers before and after have the examples' rows."""
    before = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh(), nn.Flatten(0, 1))
    model = nn.Sequential(before, nn.Linear(4, 3))
    engine = Engine(model, LOSS, kf.Preconditioner(kf.KFAC()), Settings(fisher=kf.empirical))
    x, y = torch.randn(5, 6, 4), torch.randint(0, 3, (30,))
    _, records = recorded(engine, x, y)
    for i in range(5):
        loss = LOSS.value(model(x[i : i + 1]), y[6 * i : 6 * i + 6])
        for name, layer in engine.plan.layers.items():
            assert (records[name].batch, records[name].shared, records[name].n) == (5, 6, 30)
            wanted = torch.autograd.grad(loss, list(layer.parameters.values()), retain_graph=True)
            matrix = layer.matrix({r: g.numpy() for r, g in zip(layer.parameters, wanted, strict=True)})
            np.testing.assert_allclose(records[name].examples()[0, :, i].reshape(matrix.shape), matrix, rtol=1e-10)


def test_reduce_sees_no_curvature_of_keys():
    _, x, y, engine = prepared("attention", fisher=kf.type2)
    (record,) = (r for n, r in recorded(engine, x, y)[1].items() if r.d_out == 12)
    g = kf.reduce(record).g.reshape(-1, 3, 4)
    assert np.abs(g[:, 1]).max() < 1e-15
    assert min(np.abs(g[:, i]).max() for i in (0, 2)) > 1e-3
    assert np.abs(record.g.reshape(-1, 3, 4)[:, 1]).max() > 1e-4


@pytest.mark.parametrize("way", ["view", "twice"])
def test_positions_all_examples_share_are_unbiased(way):
    """Where their sum with the examples is not seen: with labels sampled independently the summed draw is unbiased."""
    model = Positions(way)
    engine = Engine(model, LOSS, kf.Preconditioner(kf.KFAC()), Settings(draws=100))
    x, y = torch.randn(5, 3, 4), torch.zeros(5, dtype=torch.int64)
    with engine.captured() as seen:
        f = model(x)
    many = [drawn_from(engine, seen, f, y, turn)["position"] for turn in range(40)]
    assert (many[0].draws, many[0].batch, many[0].shared) == (100, 1, 3)
    found = sum(kf.dense(r)[0] for r in many) / len(many)
    draws = kf.type2(LOSS, f.detach())
    wanted = np.zeros_like(found)
    for v in draws:
        for i in range(5):
            (g,) = torch.autograd.grad(f[i], model.position.weight, v[i], retain_graph=True)
            j = g.T.reshape(-1).numpy()
            wanted += np.outer(j, j) / 5
    assert np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.b(checkpoint(lambda x: torch.tanh(self.a(x)), x, use_reentrant=reentrant))

    model = Checkpointed()
    pre = kt.Preconditioner(model, nn.CrossEntropyLoss(), kf.KFAC(), fisher=kf.empirical)
    x, y = torch.randn(5, 4, requires_grad=True), torch.randint(0, 3, (5,))
    with pre.capture():
        f = model(x)
    if not reentrant:
        pre.loss(f, y).backward()
        records, _ = kt.records(model, nn.CrossEntropyLoss(), x, y, fisher=kf.empirical)
        mean = records["a"].examples().sum((0, 1, 2)) / 5
        np.testing.assert_allclose(mean[:, :4], model.a.weight.grad.numpy(), rtol=1e-10)
        pre.step()
        return
    pre.loss(f, y).backward()
    with pytest.raises(ValueError, match=r"'a' has a gradient but none.*use_reentrant"):
        pre.step()


def test_compiled_models_run_eagerly_when_seen():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))
    compiled = torch.compile(model, backend="eager")
    x, y = torch.randn(5, 4), torch.randint(0, 3, (5,))
    compiled(x)
    engine = Engine(compiled, LOSS, kf.Preconditioner(kf.KFAC()), Settings(fisher=kf.empirical))
    _, records = recorded(engine, x, y)
    plain = Engine(model, LOSS, kf.Preconditioner(kf.KFAC()), Settings(fisher=kf.empirical))
    _, wanted = recorded(plain, x, y)
    assert set(records) == set(wanted) == {"0", "2"}
    np.testing.assert_array_equal(records["0"].g, wanted["0"].g)


def test_a_call_on_rows_that_all_examples_share_joins_those_of_each():
    model = nn.Linear(4, 3)
    engine = Engine(model, LOSS, kf.Preconditioner(kf.KFAC()), Settings())
    with engine.captured() as seen:
        f = model(torch.randn(5, 4)) + model(torch.randn(1, 4))
    (record,) = drawn_from(engine, seen, f, torch.zeros(5, dtype=torch.int64)).values()
    assert (record.batch, record.shared) == (1, 6)


def test_a_forward_that_differentiates_itself_is_refused():
    """A differential equation's residual: peers ran such a loss without a word and diverged."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))

        def forward(self, x):
            x = x.requires_grad_()
            (u,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
            return u.sum(1, keepdim=True)

    model = Residual()
    engine = Engine(model, kf.Gaussian(), kf.Preconditioner(kf.KFAC()), Settings())
    with pytest.raises(ValueError, match=r"create_graph=True.*kfaccore_torch\.taylor"):
        recorded(engine, torch.randn(5, 2), torch.zeros(5, 1))
