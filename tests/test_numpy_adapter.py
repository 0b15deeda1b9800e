"""The NumPy network against finite differences and dense curvature; baselines against their formulas."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
import kfaccore_numpy as kn
from kfaccore_numpy.tasks import autoencoder, curves

W3 = kf.Window((3, 3), padding=1)
NETS = {
    "dense": kn.Sequential((5,), (kn.Dense(4), kn.Tanh(), kn.Dense(3), kn.Sigmoid(), kn.Dense(3))),
    "residual": kn.Sequential(
        (5,), (kn.Dense(4), kn.ReLU(), kn.Residual((kn.Tanh(), kn.Dense(4), kn.GELU())), kn.Dense(3))
    ),
    "cnn": kn.Sequential(
        (6, 6, 2),
        (
            kn.Conv2d(3, W3),
            kn.Tanh(),
            kn.MaxPool(2),
            kn.Residual((kn.Conv2d(3, W3), kn.GELU())),
            kn.Conv2d(2, kf.Window((2, 2), stride=2, padding=1, dilation=2)),
            kn.Flatten(),
            kn.Dense(3),
        ),
    ),
    "flattened twice": kn.Sequential(
        (5,), (kn.Flatten(), kn.Dense(4), kn.Tanh(), kn.Flatten(), kn.Tanh(), kn.Flatten(), kn.Dense(3))
    ),
    "pooled": kn.Sequential((4, 4, 2), (kn.Conv2d(3, W3), kn.Sigmoid(), kn.AvgPool(4), kn.Flatten(), kn.Dense(3))),
}
nets = pytest.mark.parametrize("net", NETS.values(), ids=NETS)


def prepared(net, rng, batch=4):
    return net.init(rng, np.asarray), rng.normal(size=(batch, *net.inputs)), rng.normal(size=(batch, 3))


def numeric(function, W, step=1e-6):
    out = np.empty_like(W)
    for i in range(W.size):
        kept = W.flat[i]
        W.flat[i] = kept + step
        up = function()
        W.flat[i] = kept - step
        out.flat[i] = (up - function()) / (2 * step)
        W.flat[i] = kept
    return out


def dense_gradients(net, params, x, y, factored=False):
    f, tape = net.forward(params, x)
    return net.gradients(tape, net.backward(params, tape, f - y), x.shape[0], factored)


@nets
def test_gradients_are_finite_differences(net, rng):
    params, x, y = prepared(net, rng)
    for name, got in dense_gradients(net, params, x, y).items():

        def loss():
            return 0.5 * ((net.forward(params, x)[0] - y) ** 2).sum() / len(x)

        want = numeric(loss, params[name])
        np.testing.assert_allclose(got, want, atol=1e-7 * max(1.0, np.abs(want).max()), err_msg=name)


@nets
def test_records_give_the_blocks_of_the_gauss_newton_matrix(net, rng):
    params, x, _ = prepared(net, rng)
    f, tape = net.forward(params, x)
    records = net.records(tape, net.backward(params, tape, kf.type2(kf.Gaussian(), f)), len(x))
    for name, record in records.items():
        rows = (numeric(lambda o=o: net.forward(params, x)[0].ravel()[o], params[name]) for o in range(f.size))
        J = np.stack([row.ravel() for row in rows])
        want = J.T @ J / len(x)
        np.testing.assert_allclose(kf.dense(record)[0], want, atol=1e-6 * np.abs(want).max(), err_msg=name)
        assert kf.Block.of(record) == net.blocks()[name]


@nets
def test_factored_gradients_and_folded_draws(net, rng):
    params, x, y = prepared(net, rng, 2)
    dense, factored = (dense_gradients(net, params, x, y, flag) for flag in (False, True))
    for name, got in factored.items():
        got = got.dense()[0] if isinstance(got, kf.Factored) else got
        np.testing.assert_allclose(got, dense[name], rtol=1e-11, atol=1e-14)
    assert any(isinstance(g, kf.Factored) for g in factored.values())
    f, tape = net.forward(params, x)
    draws = rng.normal(size=(3, *f.shape))
    together = net.backward(params, tape, draws)
    for i, draw in enumerate(draws):
        for name, g in net.backward(params, tape, draw).items():
            np.testing.assert_allclose(together[name][i], g, rtol=1e-12, atol=1e-14)


@nets
@pytest.mark.parametrize("name", ["strict", "torch"])
def test_other_namespaces(net, name, rng):
    space = pytest.importorskip({"strict": "array_api_strict", "torch": "torch"}[name])
    params, x, y = prepared(net, rng)
    moved = {k: space.asarray(v) for k, v in params.items()}
    want = dense_gradients(net, params, x, y)
    got = dense_gradients(net, moved, space.asarray(x), space.asarray(y))
    for key, value in want.items():
        np.testing.assert_allclose(np.asarray(got[key]), value, rtol=1e-10, atol=1e-13)


@nets
def test_inputs_are_left_alone(net, rng):
    params, x, y = prepared(net, rng)
    kept = x.copy(), y.copy(), {k: v.copy() for k, v in params.items()}
    f, tape = net.forward(params, x)
    gf = f - y
    before = gf.copy()
    net.backward(params, tape, gf)
    assert np.array_equal(x, kept[0])
    assert np.array_equal(gf, before)
    assert all(np.array_equal(params[k], v) for k, v in kept[2].items())


@nets
def test_inputs_are_not_kept(net, rng):
    """A loader may refill its buffers: what is asked of a tape is of the batch that made it."""
    params, x, y = prepared(net, rng)
    loss = kf.Gaussian()
    data = [(rng.normal(size=x.shape), rng.normal(size=y.shape)) for _ in range(3)]
    found = []
    for reuse in (True, False):

        def batches(reuse=reuse):
            for one, other in data:
                x[...] = one
                y[...] = other
                yield (x, y) if reuse else (one, other)

        records = list(kn.Stream(net, params, loss, batches(), fisher=kf.type2))
        found.append(kf.fit(kf.KFAC(), records).layers)
    for name, basis in found[0].items():
        assert np.array_equal(basis.values, found[1][name].values)
    f, tape = net.forward(params, x)
    g = net.backward(params, tape, f - y)
    wanted = net.gradients(tape, g, 4.0, False)
    x[...] = 0
    for name, grad in net.gradients(tape, g, 4.0, False).items():
        assert np.array_equal(grad, wanted[name])


@nets
def test_half_precision_is_widened_and_integers_are_refused(net, rng):
    params, x, _ = prepared(net, rng)
    params = {name: W.astype(np.float32) for name, W in params.items()}
    f, _ = net.forward(params, x.astype(np.float16))
    assert f.dtype == np.float32
    assert np.array_equal(f, net.forward(params, x.astype(np.float16).astype(np.float32))[0])
    with pytest.raises(TypeError, match="x has dtype int64; need a real floating dtype"):
        net.forward(params, x.astype(np.int64))


def test_adam_and_sgd_are_their_formulas(rng):
    W, grads = rng.normal(size=(3, 4)), rng.normal(size=(5, 3, 4))
    for optimiser in (kn.Adam(0.1), kn.SGD(0.1), kn.SGD(0.1, 0.0)):
        params = {"w": W.copy()}
        state = optimiser.init(params)
        want, m, v = W.copy(), 0, 0
        for t, g in enumerate(grads):
            optimiser.step(params, {"w": g.copy()}, state, t)
            if isinstance(optimiser, kn.Adam):
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
                want = want - 0.1 * (m / (1 - 0.9 ** (t + 1))) / (np.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-8)
            else:
                m = optimiser.momentum * m + g
                want = want - 0.1 * m
        np.testing.assert_allclose(params["w"], want, rtol=1e-10)


def test_resuming_continues_bit_for_bit(rng, tmp_path):
    net, data = autoencoder((6, 4, 6)), (rng.normal(size=(20, 6)),) * 2
    options = {"batch": 8, "seed": 3}

    def run(start, steps, params, state):
        pre = kf.Preconditioner(kf.EKFAC(), step=kf.Fixed(0.1, 0.9), clocks=kf.Clocks(2, 3))
        for p in kn.fit(net, params, data, kf.Gaussian(), pre, steps=steps, start=start, state=state, **options):
            last = p
        return last

    fresh = net.init(np.random.default_rng(0), np.asarray)
    whole = run(0, 9, {k: v.copy() for k, v in fresh.items()}, None)
    half = run(0, 4, fresh, None)
    tree = {"params": half.params, "state": half.state}
    kf.save(tmp_path / "half.safetensors", tree)
    again = kf.load(tmp_path / "half.safetensors", like=tree)
    resumed = run(4, 9, again["params"], again["state"])
    assert all(np.array_equal(whole.params[k], resumed.params[k]) for k in fresh)


def test_misfits_are_named():
    with pytest.raises(ValueError, match=r"put Flatten\(\) before it"):
        kn.Sequential((4, 4, 1), (kn.Dense(3),))
    with pytest.raises(ValueError, match="must keep the shape"):
        kn.Sequential((4,), (kn.Residual((kn.Dense(3),)),))
    for layer in (kn.Conv2d(3, W3), kn.MaxPool(2)):
        with pytest.raises(
            ValueError, match=r"got examples of shape \(4,\); need 2 axes of positions and the channels"
        ):
            kn.Sequential((4,), (layer,))
    with pytest.raises(ValueError, match="does not divide"):
        kn.Sequential((5, 5, 1), (kn.MaxPool(2),))
    with pytest.raises(ValueError, match=r"x has shape \(2, 3\); need \(batch, \*\(4,\)\)"):
        kn.Sequential((4,), (kn.Dense(3),)).forward({}, np.ones((2, 3)))


def test_curves_are_the_same_every_time():
    first = curves(4)
    assert first.shape == (4, 784)
    assert np.array_equal(first, curves(4))
    assert first.min() >= 0.0
    assert 0.5 < first.max() <= 1.0
