"""What is counted is what is there: padding, batches, positions and passes, not sizes and keys."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
import kfaccore_numpy as kn
from kfaccore.cli.compare import _joint
from kfaccore.network.two_level.matrices import kronecker
from kfaccore.posterior import reading


def padded(record, more):
    """The same examples, and `more` that are padding."""
    batch, shared = record.a.shape[-3:-1]

    def wide(x):
        return np.concatenate([x, np.zeros((*x.shape[:-3], more, *x.shape[-2:]))], -3)

    exists = np.concatenate([np.ones((batch, shared), bool), np.zeros((more, shared), bool)])
    return kf.Record(wide(record.a[0]), wide(record.g[:, 0]), record.n, exists)


def test_padding_is_no_example_of_the_noise(rng):
    record = kf.Record(rng.normal(size=(6, 3, 4)) + 1, rng.normal(size=(6, 3, 2)) + 1, 6.0)
    grad = np.einsum("bso,bsi->oi", record.g[0, 0], record.a[0]) / 6
    found = []
    for one in (record, padded(record, 4)):
        posterior = kf.Posterior({"l": 0 * grad}, kf.fit(kf.KFAC(), [{"l": one}]), 0.1)
        row = kf.analysis.report({"l": one}, grads={"l": grad}).rows[0]
        found.append([*reading(posterior, {"l": one}, {"l": grad})["l"].noise, row.noise, row.examples])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-12)


def test_padding_is_no_position_of_a_coarse_matrix(rng):
    records = {n: kf.Record(rng.normal(size=(6, 3, 5)), rng.normal(size=(2, 6, 3, 4)), 6.0) for n in "ab"}
    grads = {n: rng.normal(size=(4, 5)) for n in "ab"}
    found = []
    for more in (0, 6):
        pre = kf.Preconditioner(network=kf.TwoLevel(matrix=kronecker), schedules=kf.Schedules(damping=0.2))
        state = pre.init({n: kf.Block(4, 5) for n in "ab"}, like=grads["a"])
        given = {n: padded(r, more) if more else r for n, r in records.items()}
        found.append(pre.step(state, given, grads)[0])
    for name in "ab":
        np.testing.assert_allclose(found[1][name], found[0][name], rtol=1e-10)


@pytest.mark.parametrize("draws", [0, 2])
def test_an_id_where_nothing_exists_is_no_stranger(rng, draws):
    index = np.array([[0, 1, -1], [2, -1, 9]])
    exists = (index >= 0) & (index < 4)
    g = rng.normal(size=(draws, 2, 3, 2))
    one = kf.Record(kf.Ids(index, 4), g, 2.0, exists)
    other = kf.Record(kf.Ids(np.where(exists, index, 0), 4), g, 2.0, exists)
    assert one.n == 2.0
    np.testing.assert_array_equal(one.g, other.g)
    stranger = kf.Record(kf.Ids(index, 4), g, 2.0, np.ones_like(exists))
    assert not np.isfinite(stranger.n if draws == 0 else stranger.g.sum())


def test_an_empty_list_is_no_record_and_an_iterator_is_one(rng):
    grads = {"l": rng.normal(size=(3, 4))}
    parts = [kf.Record(rng.normal(size=(4, 4)), rng.normal(size=(4, 3)), 4.0) for _ in range(2)]
    pre = kf.Preconditioner(kf.KFAC())
    state = pre.init({"l": kf.Block(3, 4)}, grads["l"])
    with pytest.raises(ValueError, match=r"an empty sequence of micro-batches came[^\n]*\nin layer 'l'"):
        pre.step(state, {"l": []}, grads)
    found = [pre.step(state, {"l": given}, grads)[0]["l"] for given in (parts, iter(parts))]
    np.testing.assert_array_equal(found[1], found[0])


class Passes:
    """Batches that come otherwise in a later pass."""

    def __init__(self, *orders):
        self.orders = iter(orders)

    def __iter__(self):
        return iter(next(self.orders))


def test_scores_of_several_passes_need_one_order(rng, tmp_path):
    batches = [{"l": kf.Record(rng.normal(size=(4, 4)), rng.normal(size=(4, 3)), 4.0)} for _ in range(3)]
    queries = {"l": kf.Record(rng.normal(size=(4, 4)), rng.normal(size=(4, 3)), 4.0)}
    posterior = kf.Posterior({"l": np.zeros((3, 4))}, kf.fit(kf.KFAC(), batches), 0.1)
    whole = kf.scores(posterior, queries, batches)
    few = 2 * 12 * 8  # bytes: two groups of queries, a pass each
    np.testing.assert_allclose(kf.scores(posterior, queries, Passes(batches, batches), memory=few), whole, rtol=1e-12)
    for out in (None, tmp_path / "scores.npy"):
        with pytest.raises(ValueError, match="batch 0 of pass 2 is not as in the first: queries are scored in groups"):
            kf.scores(posterior, queries, Passes(batches, batches[::-1]), memory=few, out=out)
    with pytest.raises(ValueError, match="pass 2 ended after 2 of 3 batches"):
        kf.scores(posterior, queries, Passes(batches, batches[:2]), memory=few)


def test_a_layer_that_stands_twice_has_both_its_gradients(rng):
    """Layers of `kfaccore_numpy` are values: the first one is known by its place."""
    twice = kn.Dense(4)
    loss = kf.Gaussian()
    x = rng.normal(size=(5, 4))
    y = rng.normal(size=(5, 4))
    for layers in ((twice, kn.Tanh(), twice), (twice, kn.Residual((kn.Tanh(), twice)))):
        net = kn.Sequential((4,), layers)
        params = net.init(np.random.default_rng(1), np.float64)
        f, tape = net.forward(params, x)
        grads = net.gradients(tape, net.backward(params, tape, kf.empirical(loss, f, y)[0]), 5.0, factored=False)
        assert grads.keys() == params.keys()
        for name in params:
            step = np.zeros_like(params[name])
            step[1, 2] = 1e-6
            values = [loss.value(net.forward({**params, name: params[name] + s * step}, x)[0], y) for s in (1, -1)]
            assert grads[name][1, 2] == pytest.approx((np.sum(values[0]) - np.sum(values[1])) / 2e-6 / 5, rel=1e-6)


def test_joint_errors_do_not_overflow():
    assert _joint([(3.0, 1e200), (4.0, 1e200)]) == pytest.approx(12.5**0.5, rel=1e-12)
    assert _joint([(1e300, 1.0)]) == float("inf")
    assert np.isnan(_joint([(1.0, 0.0)]))


def test_masked_arrays_are_refused(tmp_path, rng):
    x = np.ma.masked_array(rng.normal(size=(4, 3)), mask=np.eye(4, 3) > 0)
    with pytest.raises(TypeError, match=r"a is a masked array, shape \(4, 3\): give its data, and mask="):
        kf.Record(x, np.ones((4, 2)), 4.0)
    for bad in (x, np.ones(2, complex)):
        with pytest.raises(TypeError, match=r"leaf 'x' is a .*need arrays of real numbers"):
            kf.save(tmp_path / "x.safetensors", {"x": bad})
