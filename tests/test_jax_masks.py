"""Padding: a mask makes any number of padded positions give the same records' factors and the same step."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from jax_models import normal
from jax_needed import jax, jnp, kj

P = dict(zip("ewqkvo", normal((7, 4), (4, 4), (4, 2, 4), (4, 2, 4), (4, 2, 4), (2, 4, 3)), strict=True))


def apply(p, ids):
    """Masked attention of two heads over tokens of id > 0, a label a token; runs at any length."""
    x = jnp.tanh(p["e"][ids] @ p["w"])
    q, k, v = (jnp.einsum("btd,dhe->bthe", x, p[name]) for name in "qkv")
    scores = jnp.einsum("bthe,bshe->bhts", q, k)
    weights = jax.nn.softmax(jnp.where((ids > 0)[:, None, None, :], scores, -1e30))
    return jnp.einsum("bhts,bshe,hef->btf", weights, v, p["o"])


def batch(length):
    ids = np.zeros((4, length), int)
    rng = np.random.default_rng(3)
    for i, n in enumerate((3, 5, 2, 4)):
        ids[i, :n] = rng.integers(1, 7, n)
    return jnp.asarray(ids)


def step(length, given=None, run=apply):
    ids = batch(length)
    mask = ids > 0
    plan = kj.plan(run, P, ids)
    noise = np.zeros((*ids.shape, 3))
    noise[np.asarray(mask)] = np.random.default_rng(5).normal(size=(14, 3))

    @jax.jit
    def stepped(params):
        captured = kj.capture(plan, params, ids)
        f = captured.prediction
        draws = kf.monte_carlo(kf.Gaussian(), f, jnp.asarray(noise)[None], mask=mask)
        records = captured.records(draws, mask.sum(), mask=mask if given is None else given(mask))
        grads = captured.gradients(f * mask[..., None] / mask.sum())
        tx = kj.kfac(plan, kf.KFAC(), schedules=kf.Schedules(0.1, 0.9))
        return tx.update(grads, tx.init(params), records=records)[0], records

    return stepped(P)


def test_padding_changes_nothing():
    want, records = step(5)
    assert {name: record.mask is None for name, record in records.items()} == dict.fromkeys(records, False)
    got, _ = step(20)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
    unmasked, _ = step(20, lambda mask: {})
    assert not np.allclose(unmasked["w"], want["w"], rtol=1e-3)


def test_rows_without_positions_need_no_mask():
    """A pooled layer has one row an example."""
    ids = batch(6)
    params = {"w": normal((7, 4)), "v": normal((4, 3))}
    plan = kj.plan(lambda p, ids: (p["w"][ids] * (ids > 0)[..., None]).sum(1) @ p["v"], params, ids)
    records = kj.capture(plan, params, ids).records(jnp.ones((1, 4, 3)), 4, mask=ids > 0)
    assert records["v"].mask is None
    np.testing.assert_array_equal(records["w"].mask, ids > 0)


def test_masks_by_layer_and_what_cannot_be_seen():
    ids = batch(6)
    params = {"w": normal((7, 4)), "p": normal((6, 4)), "v": normal((4, 3)), "u": normal((2, 3))}

    def fixed(p, ids):  # a table of positions: runs at one length alone
        x = p["w"][ids] + p["p"]
        return x.sum(1) @ p["v"] + (x.reshape(len(ids), 12, 2) @ p["u"]).sum(1)

    plan = kj.plan(fixed, params, ids)
    captured = kj.capture(plan, params, ids)
    draws = jnp.ones((1, 4, 3))
    with pytest.raises(ValueError, match=r"layer 'u' has rows of shape \(1, 12\) an example"):
        captured.records(draws, 4, mask=ids > 0)
    mask = {"w": ids > 0, "p": ids > 0, "u": jnp.repeat(ids > 0, 2, 1)}
    records = captured.records(draws, 4, mask=mask)
    np.testing.assert_array_equal(records["u"].mask, mask["u"])
    with pytest.raises(ValueError, match=r"mask has layers \['x'\]"):
        captured.records(draws, 4, mask={"x": ids > 0})
    with pytest.raises(ValueError, match=r"mask has shape \(3, 6\); need \(4, \*positions\)"):
        captured.records(draws, 4, mask=ids[:3] > 0)
