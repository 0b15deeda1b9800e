"""Moments of EKFAC and TEKFAC where a factor has no full rank: rounding picks the basis there, and changes nothing."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from jax_needed import jax, jnp
from kfaccore.methods.kronecker.moments import moments
from kfaccore.record.squares import squares

METHODS = [kf.EKFAC(), kf.TEKFAC()]
IDS = ["ekfac", "tekfac"]
B, D_IN, D_OUT, LIVE = 6, 9, 5, 2
NOW = kf.Hyper(1, 0.9, 0.01)


def records(order=slice(None)):
    """Of two batches: G has rank 2 in spaces that differ, A at most 6 of 9."""
    rng = np.random.default_rng(5)
    found = []
    for _ in range(2):
        live = rng.normal(size=(LIVE, D_OUT))
        a, g = rng.normal(size=(B, D_IN)), rng.normal(size=(B, LIVE)) @ live
        found.append(kf.Record(a[order], g[order][None], 6.0))
    return found, rng.normal(size=(D_OUT, D_IN))


def stepped(method, given, put):
    """The state whose basis is of the first batch, with moments of the second."""
    first, second = (kf.Record(put(r.a), put(r.g), r.n) for r in given)
    state = method.init(kf.Block(D_OUT, D_IN), put(np.zeros(1)))
    state = method.update(state, method.measure(state, first, NOW), NOW)
    state = method.refresh(state, NOW)
    return method.update(state, method.measure(state, second, NOW), NOW)


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_a_permuted_batch_moves_nothing(method):
    """NumPy, and JAX under jit, where rounding is another."""
    plain, V = records()
    turned, _ = records(np.random.default_rng(0).permutation(B))
    want = method.solve(stepped(method, plain, np.asarray), V, NOW).direction
    got = method.solve(stepped(method, turned, np.asarray), V, NOW).direction
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)
    traced = jax.jit(lambda v: method.solve(stepped(method, turned, jnp.asarray), v, NOW).direction)
    np.testing.assert_allclose(traced(jnp.asarray(V)), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_only_the_null_space_is_one(method):
    """Moments of eigenvectors that are somebody's are their own; of the others the mean, the trace is what it was."""
    (first, second), _ = records()
    state = stepped(method, (first, second), np.asarray)
    own = squares(second, state.basis.Qa, state.basis.Qg)[0] / second.n
    S = moments(state)[0]
    out, ins = D_OUT - LIVE, D_IN - B  # eigenvalues ascend
    np.testing.assert_allclose(S[out:, ins:], own[out:, ins:], rtol=1e-12)
    np.testing.assert_allclose(S[:out, ins:], np.broadcast_to(own[:out, ins:].mean(0), (out, B)), rtol=1e-12)
    np.testing.assert_allclose(
        S[out:, :ins], np.broadcast_to(own[out:, :ins].mean(1)[:, None], (LIVE, ins)), rtol=1e-12
    )
    np.testing.assert_allclose(S[:out, :ins], own[:out, :ins].mean(), rtol=1e-12)
    np.testing.assert_allclose(S.sum(), own.sum(), rtol=1e-12)
    assert own[:out, ins:].std(0).max() > 0.1


def test_a_diagonal_side_is_left_alone():
    """Rows of a table are somebody's even where no batch has read them."""
    rng = np.random.default_rng(7)
    first, second = (
        kf.Record(kf.Ids(ids[:, None], 4), rng.normal(size=(1, 1, 6, 1, 3)), 6.0)
        for ids in (np.array([0, 1, 0, 1, 0, 1]), np.array([0, 2, 2, 3, 3, 3]))
    )
    method = kf.EKFAC()
    state = method.init(kf.Block(3, 4, diagonal_in=True), np.zeros(1))
    state = method.refresh(method.update(state, method.measure(state, first, NOW), NOW), NOW)
    state = method.update(state, method.measure(state, second, NOW), NOW)
    own = squares(second, None, state.basis.Qg)[0] / second.n
    np.testing.assert_allclose(moments(state)[0], own, rtol=1e-12)
