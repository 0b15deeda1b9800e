"""Streams of the adapters: per-example gradients from autograd or differences, one example at a time."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
import kfaccore_numpy as kn

torch = pytest.importorskip("torch")
kt = pytest.importorskip("kfaccore_torch")


class Mixed(torch.nn.Module):
    """An embedding, a convolution with batch statistics, dropout and a head; one layer is never reached."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(5, 4)
        self.conv = torch.nn.Conv1d(4, 3, 2)
        self.norm = torch.nn.BatchNorm1d(3)
        self.drop = torch.nn.Dropout(0.5)
        self.head = torch.nn.Linear(3, 3)
        self.idle = torch.nn.Linear(2, 2)

    def forward(self, index):
        x = self.conv(self.table(index).mT)
        return self.head(self.drop(torch.tanh(self.norm(x))).mean(-1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    found = Mixed().double()
    found(torch.randint(0, 5, (9, 6)))  # batch statistics that are not the first ones
    return found.train()


@pytest.fixture
def batches():
    rng = torch.Generator().manual_seed(1)
    x = torch.randint(0, 5, (7, 6), generator=rng)
    y = torch.randint(0, 3, (7,), generator=rng)
    return [(x[:3], y[:3]), (x[3:], y[3:])]


def gradients(model, value):
    """The matrices of d value / d parameters, in eval mode."""
    names = kt.plan(model).layers
    every = [(name, role, p) for name, layer in names.items() for role, p in layer.parameters.items()]
    found = torch.autograd.grad(value, [p for *_, p in every], retain_graph=True, allow_unused=True)
    tensors = {}
    for (name, role, p), g in zip(every, found, strict=True):
        tensors.setdefault(name, {})[role] = torch.zeros_like(p) if g is None else g
    return {name: np.asarray(names[name].matrix(given)) for name, given in tensors.items()}


def one_by_one(model, batches, pull):
    """{layer: (draws, examples, *matrix)} of pull(f (1, C), y (1,)) -> list of scalars."""
    model.eval()
    found = {}
    for x, y in batches:
        for i in range(len(x)):
            for draw, value in enumerate(pull(model(x[i : i + 1]), y[i : i + 1])):
                for name, g in gradients(model, value).items():
                    found.setdefault(name, {}).setdefault(draw, []).append(g)
    model.train()
    return {name: np.stack([np.stack(rows) for rows in draws.values()]) for name, draws in found.items()}


def joined(stream):
    """{layer: (draws, examples, *matrix)} of all batches."""
    every = list(stream)
    assert all(list(batch) == list(every[0]) for batch in every)
    parts = {name: [batch[name].examples().swapaxes(1, 2) for batch in every] for name in every[0]}
    return {name: np.concatenate(part, 1) for name, part in parts.items()}, every


def check(got, want):
    assert set(got) == set(want)
    for name, g in got.items():
        np.testing.assert_allclose(g.reshape(want[name].shape), want[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_stream_has_each_examples_gradient_and_its_share_of_the_mean(model, batches, reduction):
    cross_entropy = torch.nn.functional.cross_entropy
    before = {name: x.clone() for name, x in model.state_dict().items()}
    loss = torch.nn.CrossEntropyLoss(reduction=reduction)
    stream = kt.Stream(model, loss, batches, fisher=kf.empirical)
    got, every = joined(stream)
    assert [batch["head"].n for batch in every] == [3, 4]
    check(got, one_by_one(model, batches, lambda f, y: [cross_entropy(f, y)]))
    assert loss.reduction == reduction
    assert all(module.training for module in model.modules())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not got["idle"].any()
    assert "conv" in str(stream.coverage)


def test_draws_are_the_same_in_every_pass(model, batches):
    stream = kt.Stream(model, torch.nn.CrossEntropyLoss(), batches, draws=2, seed=3)
    first, again = joined(stream)[0], joined(stream)[0]
    assert first["head"].shape[:2] == (2, 7)
    for name, g in first.items():
        assert np.array_equal(g, again[name])
    kf.fit(kf.EKFAC(), stream)


def test_training_mode_is_left_where_it_is(model, batches):
    before = model.norm.running_mean.clone()
    list(kt.Stream(model, torch.nn.CrossEntropyLoss(), batches, train=True))
    assert torch.equal(model.norm.running_mean, before)
    assert model.norm.num_batches_tracked == 1


def test_outputs_and_predictive_covariance(model, batches):
    stream = kt.outputs(model, batches)
    got, every = joined(stream)
    want = one_by_one(model, batches, lambda f, y: list(f[0]))
    check(got, want)
    P = kf.Posterior(kt.matrices(model), kf.fit(kf.KFAC(), kt.Stream(model, torch.nn.CrossEntropyLoss(), batches)), 0.5)
    V = np.concatenate([P.covariance(records) for records in every])
    solved = P.solve({name: g.reshape(3 * 7, *P.curvature.layers[name].shape) for name, g in want.items()})
    dense = sum(
        np.einsum("vbd,wbd->bvw", want[name].reshape(3, 7, -1), x.reshape(3, 7, -1)) for name, x in solved.items()
    )
    np.testing.assert_allclose(V, dense, rtol=1e-9, atol=1e-12)
    some, _ = joined(kt.outputs(model, [x for x, _ in batches], select=lambda f: f[:, 1:]))
    check(some, {name: g[1:] for name, g in want.items()})


def test_measured_gradients(model, batches):
    def margin(f, y):
        return f.gather(1, y[:, None])[:, 0] - f.logsumexp(1)

    got, every = joined(kt.measured(model, margin, batches))
    check(got, one_by_one(model, batches, lambda f, y: [margin(f, y)[0]]))
    assert [batch["conv"].n for batch in every] == [3, 4]
    with pytest.raises(ValueError, match=r"measure gave shape \(\)"):
        list(kt.measured(model, lambda f, y: f.sum(), batches))
    with pytest.raises(ValueError, match=r"outputs got a prediction of \(3,\).*give `select`"):
        list(kt.outputs(model, batches, select=lambda f: f[:, 0]))


def test_matrices_and_back(model):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = kt.matrices(model)
    kt.assign(model, {name: 2 * np.asarray(W) for name, W in found.items()})
    covered = {path for layer in kt.plan(model).layers.values() for path in layer.paths.values()}
    for name, p in model.named_parameters():
        assert torch.equal(p, (2 if name in covered else 1) * before[name])
    with pytest.raises(ValueError, match=r"the model has no layers \['x'\]"):
        kt.assign(model, {"x": found["head"]})
    with pytest.raises(ValueError, match="layer 'head' got a matrix of"):
        kt.assign(model, {"head": np.zeros((2, 2))})


def test_a_language_models_last_position(batches):
    """Positions shared by one example; `select` picks the last."""

    class Tokens(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(5, 4)
            self.mix = torch.nn.Linear(4, 4)
            self.head = torch.nn.Linear(4, 5)

        def forward(self, index):
            x = self.table(index)
            return self.head(torch.tanh(self.mix(x).cumsum(1)))

    torch.manual_seed(2)
    model = Tokens().double()
    got, _ = joined(kt.outputs(model, batches, select=lambda f: f[:, -1, :2]))
    check(got, one_by_one(model, batches, lambda f, y: list(f[0, -1, :2])))


NETWORK = kn.Sequential((5, 5, 1), (kn.Conv2d(2, kf.Window((2, 2))), kn.Tanh(), kn.Flatten(), kn.Dense(3)))


def test_streams_of_a_sequential():
    """Against central differences of every parameter, example by example."""
    rng = np.random.default_rng(0)
    params = NETWORK.init(rng, np.asarray)
    x, y = rng.normal(size=(4, 5, 5, 1)), rng.integers(0, 3, 4)
    batches = [(x[:1], y[:1]), (x[1:], y[1:])]
    loss = kf.SoftmaxCrossEntropy()

    def difference(function):
        """{layer: (draws, examples, *matrix)} of function(f, y) -> (examples, draws)."""
        found = {}
        for name, W in params.items():
            columns = []
            for i in np.ndindex(W.shape):
                sides = []
                for step in (1e-6, -1e-6):
                    moved = W.copy()
                    moved[i] += step
                    sides.append(function(NETWORK.forward({**params, name: moved}, x)[0], y))
                columns.append((sides[0] - sides[1]) / 2e-6)
            found[name] = np.stack(columns, -1).reshape(*columns[0].shape, *W.shape).swapaxes(0, 1)
        return found

    def close(stream, want):
        got, every = joined(stream)
        assert len(stream) == len(every) == 2
        for name, g in got.items():
            np.testing.assert_allclose(g.reshape(want[name].shape), want[name], rtol=1e-6, atol=1e-8)
        assert [batch["dense3"].n for batch in every] == [1, 3]

    def log_odds(f, y):
        others = np.where(np.arange(3) == y[:, None], -np.inf, f)
        return (f[np.arange(4), y] - np.log(np.exp(others).sum(1)))[:, None]

    def losses(f, y):
        return (np.log(np.exp(f).sum(1)) - f[np.arange(4), y])[:, None]

    close(kn.outputs(NETWORK, params, batches), difference(lambda f, y: f))
    close(kn.measured(NETWORK, params, kn.margin, batches), difference(log_odds))
    stream = kn.Stream(NETWORK, params, loss, batches, kf.empirical)
    close(stream, difference(losses))
    for fisher, draws in ((kf.monte_carlo, 2), (kf.type2, 3), (kf.forward_only, 0)):
        given = kn.Stream(NETWORK, params, loss, batches, fisher, draws=2)
        assert next(iter(given))["conv2d0"].draws == draws
    P = kf.Posterior(params, kf.fit(kf.EKFAC(), stream), 0.1)
    assert kf.scores(P, next(iter(stream)), stream).shape == (1, 4)
    with pytest.raises(ValueError, match="need one of kfaccore's"):
        kn.Stream(NETWORK, params, loss, batches, len)


class Spread(torch.nn.Module):
    """One layer, whose rows every prediction is made of."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(3, 2)

    def forward(self, x):
        return self.a(x).softmax(0).cumsum(0)


def test_outputs_of_layers_that_all_mix_examples_are_refused():
    model = Spread().double()
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for stream in (kt.outputs(model, [x]), kt.measured(model, lambda f, y: f[:, 0], [(x, None)])):
        with pytest.raises(ValueError, match=r"batch 0: rows of layers \['a'\] are shared by examples, or mix them"):
            next(iter(stream))
    (records,) = kt.outputs(model, [x[:1]])
    assert records["a"].batch == 1
