"""Batches that the NumPy shell is given now and then: targets of another dtype, no label at all, NaN, a sure label."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
import kfaccore_numpy as kn
from kfaccore_numpy.equations.smooth import derivatives

NETWORK = kn.Sequential((4,), (kn.Dense(5), kn.Tanh(), kn.Dense(3)))


def prepared(rng, dtype=np.float64):
    x = rng.normal(size=(12, 4)).astype(dtype)
    return NETWORK.init(rng, lambda W: W.astype(dtype)), x


def copied(params):
    return {name: W.copy() for name, W in params.items()}


@pytest.mark.parametrize("dtype", ["f8", "i8", "?"])
@pytest.mark.parametrize("loss", [kf.Bernoulli(), kf.Gaussian()], ids=repr)
def test_targets_of_another_dtype_than_the_parameters(loss, dtype, rng):
    params, x = prepared(rng, np.float32)
    y = rng.integers(0, 2, (12, 3))

    def losses(target):
        pre = kf.Preconditioner(kf.KFAC(), step=kf.SelfTuning())
        return [r.loss for r in kn.fit(NETWORK, copied(params), (x, target), loss, pre, batch=8, steps=3)]

    assert losses(y.astype(dtype)) == losses(y.astype(np.float32))


@pytest.mark.parametrize("rule", [kf.Fixed(), kf.SelfTuning(), kf.LineSearch()], ids=lambda r: type(r).__name__)
def test_a_batch_without_labels_is_refused(rule, rng):
    params, x = prepared(rng)
    loss, y = kf.SoftmaxCrossEntropy(ignore=-100), rng.integers(0, 3, 12)
    pre = kf.Preconditioner(kf.KFAC(), step=rule)

    def steps(*targets):
        held, state = copied(params), kn.initial_state(NETWORK, params, pre)
        for index, target in enumerate(targets):
            before = copied(held)
            value, state, info = kn.step(NETWORK, held, (x, target), loss, pre, state, index, np.random.default_rng(0))
        return value, info.counts(), [np.abs(held[name] - before[name]).max() for name in held]

    value, codes, moved = steps(y, np.full(12, -100))
    assert np.isnan(value)
    assert (codes, moved) == ({kf.Code.NONFINITE: 2}, [0.0, 0.0])
    value, codes, moved = steps(y, np.full(12, -100), y)
    assert np.isfinite(value)
    assert codes == {kf.Code.OK: 2}
    assert min(moved) > 0


@pytest.mark.parametrize("optimiser", [kn.SGD(0.1), kn.Adam(0.1)], ids=lambda o: type(o).__name__)
def test_a_batch_without_labels_has_no_slope(optimiser, rng):
    params, x = prepared(rng)
    held, state = copied(params), optimiser.init(params)
    loss = kf.SoftmaxCrossEntropy(ignore=-100)
    value, _, _ = kn.step(NETWORK, held, (x, np.full(12, -100)), loss, optimiser, state, 0, rng)
    assert np.isnan(value)
    assert all(np.array_equal(held[name], params[name]) for name in params)


@pytest.mark.parametrize("activation", [kn.ReLU(), kn.Tanh(), kn.Sigmoid(), kn.GELU()], ids=repr)
def test_nan_is_handed_on(activation, rng):
    net = kn.Sequential((4,), (kn.Dense(5), activation, kn.Dense(3)))
    x = rng.normal(size=(3, 4)).astype(np.float32)
    x[0, 3] = np.nan
    f, _ = net.forward(net.init(rng), x)
    assert np.isnan(f[0]).all()
    assert np.isfinite(f[1:]).all()
    assert np.isnan(derivatives(activation, np.array([np.nan]), 0)[0])


@pytest.mark.parametrize("gap", [1.0, 120.0, 1e4, np.inf])
def test_the_margin_of_a_sure_label(gap, rng):
    """The log odds of a label go by the others' chances among themselves, however small."""
    f = rng.normal(size=(5, 4)).astype(np.float32)
    y = rng.integers(0, 4, 5).astype(np.uint8)
    own = np.arange(4) == y[:, None]
    sure = np.where(own, f + np.float32(gap), f)
    rest = np.where(own, 0, np.exp(f.astype(float)))
    np.testing.assert_allclose(kn.margin(sure, y), own - rest / rest.sum(1, keepdims=True), rtol=1e-5)
    assert kn.margin(sure, y).dtype == np.float32
    with pytest.raises(ValueError, match="label 4"):
        kn.margin(sure, np.full(5, 4))
