"""Numbers that multiply a loss or a part of it: of outputs, of examples and of the penalty."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

import kfaccore as kf
from tf_shared import SGD, L, crossentropy, keras, kt, tf
from tf_shared import double as double

UNDAMPED = kf.Schedules(1e-9, 0.0)


def flat(net):
    return np.concatenate([np.ravel(v) for v in net.trainable_variables])


@pytest.mark.parametrize("weights", [0.25, [0.25], {"a": 0.25}], ids=["number", "list", "dict"])
@pytest.mark.parametrize("fisher", [kf.type2, kf.monte_carlo, kf.empirical])
def test_the_weight_of_a_loss_is_that_of_its_curvature(fisher, weights, rng):
    """Undamped, a weight of the loss changes no direction; under the empirical Fisher it is divided by the weight."""
    x, targets = rng.normal(size=(32, 4)), rng.normal(size=(32, 3))
    found = []
    for one in (None, weights):
        keras.utils.set_random_seed(1)
        i = keras.Input((4,))
        net = keras.Model(i, L.Dense(3, name="a")(i))
        model = kt.KFACModel(net, fisher=fisher, method=kf.Exact(), schedules=UNDAMPED)
        model.compile(SGD(1.0), keras.losses.MeanSquaredError(), loss_weights=one)
        before = flat(net)
        model.train_on_batch(x, targets)
        found.append(before - flat(net))
    factor = 0.25 if fisher is kf.empirical else 1.0
    np.testing.assert_allclose(found[1] * factor, found[0], rtol=1e-4, atol=1e-6 * np.abs(found[0]).max())


@pytest.mark.parametrize("several", [False, True])
def test_the_step_of_a_sum_is_that_of_the_mean_under_as_much_damping(several, rng):
    """And its records over a data set are those of the mean."""
    x, y = rng.normal(size=(6, 4)), rng.integers(0, 3, 6)
    targets = {"a": y, "b": rng.normal(size=6)} if several else y
    found = []
    for reduction, damping in (("sum_over_batch_size", 1e-2), ("sum", 6e-2)):
        keras.utils.set_random_seed(1)
        i = keras.Input((4,))
        h = L.Dense(5, "tanh")(i)
        net = keras.Model(i, {"a": L.Dense(3)(h), "b": L.Dense(1)(h)} if several else L.Dense(3)(h))
        loss: Any = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
        loss = {"a": loss, "b": keras.losses.MeanSquaredError(reduction=reduction)} if several else loss
        records = next(iter(kt.Stream(net, loss, [(x, targets)], fisher=kf.type2)))
        assert {record.n for record in records.values()} == {6.0}
        step = {"method": kf.Exact(), "fisher": kf.type2, "schedules": kf.Schedules(damping, 0.0)}
        kt.Optimizer(net, loss, SGD(1.0), **step).step(x, targets)
        found.append(flat(net))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weights", [[None, 2.0], {"a": None, "b": 2.0}, [1, 2.0]], ids=["list", "dict", "numbers"])
def test_a_weight_that_is_none_is_one(weights, rng):
    x, targets = rng.normal(size=(6, 4)), [rng.integers(0, 3, 6), rng.normal(size=(6, 2))]
    i = keras.Input((4,))
    net = keras.Model(i, [L.Dense(3, name="a")(i), L.Dense(2, name="b")(i)])
    model = kt.KFACModel(net)
    loss = [crossentropy(), keras.losses.MeanSquaredError()]
    model.compile(
        SGD(0.1), loss if isinstance(weights, list) else dict(zip("ab", loss, strict=True)), loss_weights=weights
    )
    model.train_on_batch(x, targets)
    assert model.engine.objective.weights == {"a": 1.0, "b": 2.0}
    assert kt.objective(crossentropy(), weights=[None]).scale == 1.0


def test_weights_of_losses_that_have_no_fisher_are_refused():
    model = kt.KFACModel(keras.Sequential([keras.Input((4,)), L.Dense(3)]))
    with pytest.raises(ValueError, match=r"takes no loss_weights: give them to kfaccore\.Joint"):
        model.compile(SGD(1.0), kf.Gaussian(), loss_weights=2.0)
    model.compile(SGD(1.0), crossentropy(), loss_weights=-1.0)
    with pytest.raises(ValueError, match=r"loss_weights is -1\.0 for one loss; need one number, not negative"):
        model.train_on_batch(np.ones((2, 4)), np.zeros(2, int))


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("several", [1, 3])
def test_a_schedule_of_the_penalty_is_asked_at_each_step(mapped, several, rng):
    """Also in graphs of several steps; the first step has none."""
    x, y = rng.normal(size=(16, 4)), rng.integers(0, 3, 16)
    schedule = lambda step: 0.5 * (step > 0)  # noqa: E731
    net = keras.Sequential([keras.Input((4,)), L.Dense(3, use_bias=False, name="it")])
    weight = np.asarray(net.layers[0].kernel)
    l2 = {"it": schedule} if mapped else schedule
    model = kt.KFACModel(net, method=kf.Identity(), schedules=kf.Schedules(l2=l2))
    model.compile(SGD(0.1), crossentropy(), steps_per_execution=several)
    model.fit(np.tile(x, (4, 1)), np.tile(y, 4), batch_size=16, verbose=0, shuffle=False)
    for step in range(4):
        p = np.asarray(tf.nn.softmax(x @ weight))
        weight = weight - 0.1 * (x.T @ (p - np.eye(3)[y]) / 16 + schedule(step) * weight)
    np.testing.assert_allclose(net.layers[0].kernel, weight, rtol=1e-12)


class Kept(type(kf.LineSearch())):
    """Notes the losses that a step is judged by."""

    def judge(self, motion, share, before, found):
        SEEN.append((before, found))
        return share, motion


SEEN: list = []


def test_a_step_is_judged_under_the_penalty_that_it_was_made_with(rng):
    x, y = rng.normal(size=(16, 4)), rng.integers(0, 3, 16)
    SEEN.clear()
    net = keras.Sequential([keras.Input((4,)), L.Dense(3)])
    step = kt.Optimizer(net, crossentropy(), step=Kept(), schedules=kf.Schedules(l2=lambda step: 0.5 * (step + 1)))
    for number in range(2):
        step.step(x, y)
        squares = sum(float(tf.reduce_sum(v**2)) for v in net.trainable_variables)
        want = float(crossentropy()(y, net(x))) + 0.25 * (number + 1) * squares
        assert SEEN[-1][1] == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("settings", [{"optimizer": SGD}, {}], ids=["fixed", "judged"])
def test_negative_weights_have_the_curvature_of_their_size_and_are_named_once(settings, rng):
    """As of a policy gradient: the update is the natural gradient of that metric."""
    x, y, w = rng.normal(size=(8, 4)), rng.integers(0, 3, 8), rng.normal(size=8)
    net = keras.Sequential([keras.Input((4,)), L.Dense(3, use_bias=False)])
    fixed = "optimizer" in settings
    method = kf.Exact() if fixed else kf.KFAC()
    schedules = kf.Schedules(0.1, 0.0)
    step = kt.Optimizer(
        net, crossentropy(), SGD(1.0) if fixed else None, fisher=kf.type2, method=method, schedules=schedules
    )
    before = np.asarray(net.layers[0].kernel)
    with pytest.warns(UserWarning, match=r"sample_weight is negative: the Fisher is that of its size"):
        step.step(x, y, w)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step.step(x, y, w)
    assert step.info.counts() == {kf.Code.OK: 1}
    if not fixed:
        return
    net.layers[0].kernel.assign(before)
    step = kt.Optimizer(net, crossentropy(), SGD(1.0), fisher=kf.type2, method=method, schedules=schedules)
    with pytest.warns(UserWarning, match="sample_weight"):
        step.step(x, y, w)
    p = np.asarray(tf.nn.softmax(x @ before))
    hessians = np.abs(w)[:, None, None] * (np.einsum("bi,ij->bij", p, np.eye(3)) - np.einsum("bi,bj->bij", p, p))
    F = np.einsum("bi,bkl,bj->kilj", x, hessians, x).reshape(12, 12) / 8
    g = np.einsum("b,bk,bi->ki", w, p - np.eye(3)[y], x).ravel() / 8
    want = np.linalg.solve(F + 0.1 * np.eye(12), g).reshape(3, 4).T
    np.testing.assert_allclose(before - net.layers[0].kernel, want, rtol=1e-9, atol=1e-12)


NETS = {
    "products": lambda: [L.Flatten(), L.Dense(5, "tanh"), L.LayerNormalization(), L.Dense(3)],
    "convolution": lambda: [L.Conv1D(4, 3, activation="tanh"), L.GlobalAveragePooling1D(), L.Dense(3)],
    "recurrent": lambda: [L.GRU(3), L.Dense(3)],
}


@pytest.mark.parametrize("sharing", [kf.expand, kf.reduce])
@pytest.mark.parametrize("how", ["weight", "label"])
@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_examples_that_do_not_count_leave_no_trace(make, how, sharing, rng):
    x, y = rng.normal(size=(6, 5, 4)), rng.integers(0, 3, 6)
    found = []
    for pad in (0, 3, 20):
        keras.utils.set_random_seed(1)
        net = keras.Sequential([keras.Input((5, 4)), *make()])
        options = {"fisher": kf.type2, "method": kf.KFAC(sharing=sharing), "schedules": kf.Schedules(1e-3, 0.0)}
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1 if how == "label" else None)
        step = kt.Optimizer(net, loss, SGD(1.0), **options)
        order = rng.permutation(6 + pad)
        inputs = np.concatenate([x, rng.normal(size=(pad, 5, 4))])[order]
        labels = np.concatenate([y, np.full(pad, -1 if how == "label" else 0)])[order]
        weight = np.concatenate([np.ones(6), np.zeros(pad)])[order] * (6 + pad) / 6
        step.step(inputs, labels, weight if how == "weight" else None)
        found.append(flat(net))
    for one in found[1:]:
        np.testing.assert_allclose(one, found[0], rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:a batch in which nothing counts")
def test_a_batch_of_no_weight_is_left_out(rng):
    net = keras.Sequential([keras.Input((4,)), L.Dense(3)])
    step = kt.Optimizer(net, crossentropy())
    x, y = rng.normal(size=(6, 4)), rng.integers(0, 3, 6)
    step.step(x, y, np.ones(6))
    before = flat(net)
    step.step(x, y, np.zeros(6))
    np.testing.assert_array_equal(flat(net), before)


SPREAD = {
    "one weight": ((4,), 3, lambda x: (np.arange(6) % 3, np.array(0.5)), lambda x: (np.arange(6) % 3, np.full(6, 0.5))),
    "of positions": (
        (6, 4),
        3,
        lambda x: (np.arange(36).reshape(6, 6) % 3, np.arange(6.0)),
        lambda x: (np.arange(36).reshape(6, 6) % 3, np.tile(np.arange(6.0), (6, 1))),
    ),
    "a target for all outputs": ((4,), 3, lambda x: (x[:, :1], None), lambda x: (np.tile(x[:, :1], (1, 3)), None)),
    "a target for all examples": ((4,), 3, lambda x: (x[0, :3], None), lambda x: (np.tile(x[0, :3], (6, 1)), None)),
    "an output of positions": (
        (5, 4),
        1,
        lambda x: (x[..., 0], np.arange(6.0)),
        lambda x: (x[..., :1], np.tile(np.arange(6.0)[:, None], (1, 5))),
    ),
}


@pytest.mark.parametrize(("shape", "outputs", "given", "whole"), SPREAD.values(), ids=SPREAD)
def test_targets_and_weights_spread_as_those_of_keras(shape, outputs, given, whole, rng):
    """By a Keras loss: what is spread and what was written out take the same step."""
    x = rng.normal(size=(6, *shape))
    found = []
    for make in (given, whole):
        keras.utils.set_random_seed(1)
        y, weight = make(x)
        loss = crossentropy() if y.dtype.kind == "i" else keras.losses.MeanSquaredError()
        net = keras.Sequential([keras.Input(shape), L.Dense(5, "tanh"), L.Dense(outputs)])
        wanted = float(loss(y, net(x), sample_weight=weight))
        step = kt.Optimizer(net, loss, SGD(1.0), fisher=kf.type2)
        assert float(step.step(x, y, weight)) == pytest.approx(wanted, rel=1e-12)
        found.append(np.concatenate([np.ravel(v) for v in net.trainable_variables]))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-10, atol=1e-13)
