"""Moments of EKFAC and TEKFAC where eigenvalues of a factor are equal: rounding picks the basis; nothing moves."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from jax_needed import jax, jnp
from kfaccore.linalg.inverse import Eigenpairs
from kfaccore.methods.kronecker.clusters import levelled
from kfaccore.methods.kronecker.moments import moments
from kfaccore.record.squares import squares

METHODS = [kf.EKFAC(), kf.TEKFAC()]
IDS = ["ekfac", "tekfac"]
CLASSES, B, D_IN = 7, 100, 6
NOW = kf.Hyper(1, 0.9, 0.01)


def stepped(method, parts, put=np.asarray):
    """A refresh where a softmax head is zero, so that G is (I - 1 1^T / C) / C; then moments where it is not."""
    rng = np.random.default_rng(2)
    a = rng.normal(size=(B, D_IN))
    y = rng.integers(CLASSES, size=B)
    state = method.init(kf.Block(CLASSES, D_IN), put(np.zeros(1)))
    for f in (np.zeros((B, CLASSES)), rng.normal(size=(B, CLASSES))):
        g = kf.type2(kf.SoftmaxCrossEntropy(), f, y)
        records = [kf.Record(put(a[rows]), put(g[:, rows]), float(len(rows))) for rows in parts]
        state = measured(method, state, records)
        state = state if f.any() else method.refresh(state, NOW)
    return state


def measured(method, state, records):
    stats = method.measure(state, records[0], NOW)
    for record in records[1:]:
        stats = method.combine(stats, method.measure(state, record, NOW))
    return method.update(state, stats, NOW)


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_the_head_that_begins_at_zero(method):
    """C - 1 eigenvalues of G are one: examples in another order or in two batches, and under jit, move nothing."""
    V = np.random.default_rng(3).normal(size=(CLASSES, D_IN))
    order = np.random.default_rng(4).permutation(B)
    want = method.solve(stepped(method, [np.arange(B)]), V, NOW).direction
    for parts in ([order], [np.arange(20), np.arange(20, B)]):
        got = method.solve(stepped(method, parts), V, NOW).direction
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)
    traced = jax.jit(lambda v: method.solve(stepped(method, [order], jnp.asarray), v, NOW).direction)
    np.testing.assert_allclose(traced(jnp.asarray(V)), want, rtol=1e-10, atol=1e-10)


def test_eigenvectors_on_one_coordinate_are_nobodys_choice():
    """One-hot inputs with equal counts: moments stay those of each column, as of a table's rows."""
    rng = np.random.default_rng(7)
    record = kf.Record(np.eye(4)[[0, 1, 2, 3, 0, 1, 2, 3]], rng.normal(size=(1, 8, 3)), 8.0)
    method = kf.EKFAC()
    state = method.init(kf.Block(3, 4), np.zeros(1))
    state = method.refresh(method.update(state, method.measure(state, record, NOW), NOW), NOW)
    state = method.update(state, method.measure(state, record, NOW), NOW)
    own = squares(record, state.basis.Qa, state.basis.Qg)[0] / record.n
    assert state.basis.a.std() == 0
    np.testing.assert_allclose(moments(state)[0], own, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_dense_tail_is_not_equal(dtype):
    """Of 1,000 eigenvalues i^-2 the last neighbours are as near as rounding, and 16 times apart from first to last."""
    rng = np.random.default_rng(8)
    values = (np.arange(1000, 0, -1.0) ** -2).astype(dtype)
    values[-1] = values[-2] * (1 + np.finfo(dtype).eps)
    Q = np.linalg.qr(rng.normal(size=(1000, 1000)))[0].astype(dtype)
    one = np.ones((1, 1), dtype)
    S = rng.uniform(1, 2, size=(1, 1, 1000)).astype(dtype)
    got = levelled(S, Eigenpairs(values[None], one, Q[None], one[None]))
    tail = slice(10, 900)
    np.testing.assert_allclose(got[..., tail], S[..., tail], rtol=4 * np.finfo(dtype).eps)
    np.testing.assert_allclose(got[0, 0, -2:], S[0, 0, -2:].mean(), rtol=4 * np.finfo(dtype).eps)
