"""Losses of several heads, of which some have no label in a batch."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf

CE = kf.SoftmaxCrossEntropy(ignore=-100)
WEIGHED = kf.SoftmaxCrossEntropy(weights=(2.0, 0.0))
FISHERS = [kf.type2, kf.monte_carlo, kf.empirical]


def case(rng, xp, silent):
    """(f, target, mask) by head; head b has nothing that counts, in one of three ways."""
    f = {"a": rng.normal(size=(6, 3)), "b": rng.normal(size=(6, 2))}
    y = {"a": rng.integers(0, 3, 6), "b": np.full(6, -100 if silent == "ignored" else 1)}
    mask = {"b": np.zeros(6, bool)} if silent == "masked" else None
    put = lambda x: None if x is None else {head: xp.put(v) for head, v in x.items()}  # noqa: E731
    return put(f), put(y), put(mask)


@pytest.mark.parametrize("silent", ["ignored", "masked", "weightless"])
def test_a_head_in_which_nothing_counts_adds_nothing(silent, xp, rng):
    """0 / 0 is no loss: the others train as if alone."""
    f, y, mask = case(rng, xp, silent)
    joint = kf.Joint({"a": CE, "b": WEIGHED if silent == "weightless" else CE}, {"a": 0.5})
    alone = kf.Joint({"a": CE}, {"a": 0.5})
    only = {"a": f["a"]}
    assert float(joint.normaliser(f, y, mask)) == 6
    assert float(joint.value(f, y, mask)) == pytest.approx(float(alone.value(only, y)), rel=1e-14)
    noise = joint.noise({head: xp.get(x) for head, x in f.items()}, 2, rng)
    noise = {head: xp.put(x) for head, x in noise.items()}
    for fisher in FISHERS:
        sampled = fisher is kf.monte_carlo
        found = fisher(joint, f, noise, y, mask) if sampled else fisher(joint, f, y, mask)
        wanted = fisher(alone, only, {"a": noise["a"]}, y) if sampled else fisher(alone, only, y)
        count = wanted["a"].shape[0]
        np.testing.assert_allclose(xp.get(found["a"])[:count], xp.get(wanted["a"]), rtol=1e-14)
        assert not xp.get(found["b"]).any()


@pytest.mark.parametrize("silent", ["ignored", "masked"])
def test_where_nothing_counts_in_any_head_n_is_0(silent, xp, rng):
    """As a single loss has it, which makes the mean one that is refused."""
    f, y, mask = case(rng, xp, silent)
    f, y = {"b": f["b"]}, {"b": y["b"]}
    joint = kf.Joint({"b": CE})
    assert float(joint.normaliser(f, y, mask)) == 0
    assert float(joint.value(f, y, mask)) == 0
    assert joint.normaliser(f) == 6


def test_a_head_without_labels_in_some_batches_under_jit(rng):
    jax = pytest.importorskip("jax")
    kj = pytest.importorskip("kfaccore_jax")
    x, target = rng.normal(size=(12, 4)), rng.integers(0, 2, 12)
    params = {head: rng.normal(size=(4, 2)) for head in "ab"}
    none = np.full(12, -100)

    def apply(params, x):
        return {head: x @ w for head, w in params.items()}

    step = kj.step(kj.plan(apply, params, x), kf.Joint({"a": CE, "b": CE}))
    held = jax.tree.map(jax.numpy.array, params)
    held, state, first = step(held, step.init(held), (x, {"a": target, "b": none}), jax.random.PRNGKey(0))
    logits = x @ params["a"]
    alone = float(CE.value(logits, target)) / 12
    assert float(first["loss"]) == pytest.approx(alone, rel=1e-12)
    np.testing.assert_array_equal(held["b"], params["b"])
    assert np.abs(held["a"] - params["a"]).max() > 1e-3
    _, _, second = step(held, state, (x, {"a": none, "b": none}), jax.random.PRNGKey(1))
    assert np.isnan(second["loss"])
