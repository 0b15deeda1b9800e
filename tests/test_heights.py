"""A loss with no end at 0: a constant added to it changes no step; and the unit of a run, which no one batch makes."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from kfaccore.step.height import Mean

LOSS = kf.Gaussian()


def network(rng):
    return {"a": rng.normal(size=(16, 6)) * 0.4, "b": rng.normal(size=(2, 17)) * 0.2}


def ones(x):
    return np.concatenate([x, np.ones((len(x), 1))], axis=1)


def trained(rule, shift=0.0, steps=40, ends=None, fresh=False, easy=None, break_at=None):
    """(losses before each step and after the last, without the shift; steps that stayed; parameters) of a regression
    whose loss has a constant added: on one batch, or on `fresh` ones of which the first is fitted to `easy`."""
    rng = np.random.default_rng(0)
    W, T = network(rng), rng.normal(size=(6, 2))
    pre = kf.Preconditioner(kf.KFAC(), clocks=kf.Clocks(1, 5), step=rule)
    state = pre.init({n: kf.Block(*w.shape) for n, w in W.items()}, T)
    x, losses, kept = ones(rng.normal(size=(64, 5))), [], 0
    y = np.sin(x @ T) + 0.05 * rng.normal(size=(64, 2))

    def forward(W):
        h = np.tanh(x @ W["a"].T)
        return h, ones(h), ones(h) @ W["b"].T

    def loss(W):
        return float(LOSS.value(forward(W)[2], y)) / 64 + shift

    for k in range(steps):
        if fresh:
            x = ones(rng.normal(size=(64, 5)))
            y = np.sin(x @ T)
            y = forward(W)[2] + easy * rng.normal(size=y.shape) if easy and not k else y
        h, a, f = forward(W)
        rows = {"a": (x, lambda g, h=h, V=W["b"]: (g @ V[:, :-1]) * (1 - h**2)), "b": (a, lambda g: g)}
        draws, slope = kf.type2(LOSS, f, y), LOSS.gradient(f, y)
        records = {n: kf.Record(r, back(draws), n=64) for n, (r, back) in rows.items()}
        own = {n: kf.Record(r, back(slope)[None], n=64) for n, (r, back) in rows.items()}
        grads = {n: back(slope).T @ r / 64 for n, (r, back) in rows.items()}
        losses.append(loss(W) - shift)
        before = losses[-1] + shift
        updates, state, _ = pre.step(state, records, grads, loss=before, own=own, nonnegative=ends)
        new = {n: W[n] - updates[n] for n in W}
        share = 1.0
        if rule.judges:
            share, state = pre.judge(state, before, lambda _: None, lambda new=new: loss(new))
        W, kept = (new, kept + 1) if share else (W, kept)
        if k == break_at:
            state = kf.io.unflatten(kf.flatten(state), state)
    return np.array([*losses, loss(W) - shift]), kept, W


@pytest.mark.parametrize("rule", [kf.SelfTuning(), kf.Fixed(rescale=kf.Noise())], ids=["SelfTuning", "Noise"])
@pytest.mark.parametrize("shift", [-10.0, -0.5, 3.0])
def test_a_constant_changes_no_step_of_a_loss_without_an_end(rule, shift):
    want, kept, W = trained(rule, ends=False)
    found, stayed, V = trained(rule, shift, ends=False)
    assert kept == stayed == 40
    np.testing.assert_allclose(found, want, rtol=1e-9)
    for name in W:
        np.testing.assert_allclose(V[name], W[name], rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("shift", [-0.5, -2.0, -10.0])
def test_a_value_below_0_ends_the_belief_in_an_end(shift):
    """Of a loss of which nothing was said, one that starts above 0 gets below too."""
    plain, _, _ = trained(kf.SelfTuning())
    found, kept, _ = trained(kf.SelfTuning(), shift)
    assert kept == 40
    assert found[-1] < 2 * plain[-1]


def test_a_first_value_that_is_0_but_for_rounding():
    start = trained(kf.SelfTuning(), steps=0)[0][0]
    one, two = (trained(kf.SelfTuning(), e - start) for e in (1e-9, -1e-9))
    assert one[1] == two[1] == 40
    np.testing.assert_allclose(one[0], two[0], rtol=1e-6)
    assert one[0][-1] < 0.06


def test_what_was_seen_of_the_end_is_saved():
    want = trained(kf.SelfTuning(), -0.5)[0]
    np.testing.assert_array_equal(trained(kf.SelfTuning(), -0.5, break_at=20)[0], want)


def test_an_end_that_is_known_stays_however_much_a_model_promises():
    """As long as no value is below it: draws of a net that is sure of itself promise anything."""
    far = trained(kf.SelfTuning(), 1e-9 - trained(kf.SelfTuning(), steps=0)[0][0], steps=1, ends=True)[0]
    assert far[0] - far[1] < 1.1e-9


@pytest.mark.parametrize("rule", [kf.SelfTuning(), kf.Fixed(rescale=kf.Noise())], ids=["SelfTuning", "Noise"])
@pytest.mark.parametrize("ends", [True, False])
def test_the_unit_of_a_run_does_not_hang_on_its_first_batch(rule, ends):
    want = trained(rule, steps=60, fresh=True, ends=ends)[0]
    for easy in (1e-1, 1e-4):
        found = trained(rule, steps=60, fresh=True, ends=ends, easy=easy)[0]
        assert found[30:60].mean() < 2 * want[30:60].mean()


def unit(heights):
    mean, found = Mean(), 0.0
    for x in heights:
        mean = mean.moved(x)
        found = mean.unit(found)
    return found


def test_the_unit_is_the_first_height_unless_a_mean_exceeds_it():
    assert unit([3.0, 2.5, 2.0, 1.0, 0.5]) == 3.0  # to the bit
    assert unit([3.0, 2.5, 1e6, 2.0, 1.0]) == 3.0  # an outburst
    assert unit([0.0, 0.0, 3.0]) == 3.0  # nothing yet
    assert unit([1e-8, 1.0, 1.0]) == pytest.approx(0.95 * (1e-8 + 1) / 1.95 + 0.05 / 1.95, rel=0.03)
    assert 0.9 < unit([1e-8, *[1.0] * 60]) < 1.0


def test_losses_say_whether_they_have_an_end():
    assert kf.Gaussian().nonnegative
    assert kf.Bernoulli().nonnegative
    assert kf.SoftmaxCrossEntropy(0.1, (1.0, 0.0)).nonnegative
    assert not kf.SoftmaxCrossEntropy(weights=(1.0, -0.5)).nonnegative
    assert kf.Joint({"a": kf.Gaussian(), "b": kf.Bernoulli()}).nonnegative
    assert not kf.Joint({"a": kf.Gaussian(), "b": kf.SoftmaxCrossEntropy(weights=(-1.0, 1.0))}).nonnegative
