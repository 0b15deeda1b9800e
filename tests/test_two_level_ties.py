"""Coarse spaces of eigenvectors where eigenvalues are equal: rounding picks a basis of their space; nothing moves."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from jax_needed import jax, jnp
from kfaccore import network as net
from kfaccore.linalg import equal
from kfaccore.network.two_level.matrices import kronecker

SPACES = {"spectral": net.Spectral(), "enriched-3": net.Enriched(3), "enriched-9": net.Enriched(9)}
METHODS = {
    "kfac": kf.KFAC(),
    "ekfac": kf.EKFAC(),
    "tkfac": kf.TKFAC(),
    "tekfac": kf.TEKFAC(),
    "diagonal": kf.Diagonal(),
}
HYPER = kf.Hyper(0, 0.0, 0.01)
CLASSES = 5


def two_layers(kind):
    """(a, g) of two layers whose factors have equal eigenvalues."""
    rng = np.random.default_rng(3)
    loss = kf.SoftmaxCrossEntropy()
    if kind == "zero head":  # G = (I - 1 1^T / C) / C
        x = rng.normal(size=(40, 6))
        h = np.tanh(x @ rng.normal(size=(6, 4)))
        f = np.zeros((40, CLASSES))
    elif kind == "wide":  # fewer examples than inputs: null spaces
        x = rng.normal(size=(4, 9))
        h = np.maximum(x @ rng.normal(size=(9, 7)), 0)
        f = h @ rng.normal(size=(7, CLASSES))
    else:  # one-hot inputs, as many of each, and dead units
        x = np.eye(6)[np.arange(36) % 6]
        h = np.maximum(x @ rng.normal(size=(6, 4)), 0)
        h[:, 1:3] = 0
        f = h @ rng.normal(size=(4, CLASSES))
    g = kf.type2(loss, f, rng.integers(CLASSES, size=len(f)))
    return {"first": (x, (g @ rng.normal(size=(CLASSES, h.shape[1]))) * (h != 0)), "head": (h, g)}


def records(layers, rows, put=np.asarray):
    return {n: kf.Record(put(a)[rows], put(g)[:, rows], float(len(a))) for n, (a, g) in layers.items()}


def step(two, layers, order, put=np.asarray):
    """A step on other records after two refreshes on `layers` in that order."""
    rng = np.random.default_rng(5)
    seen = records(layers, order, put)
    hypers = dict.fromkeys(seen, HYPER)
    blocks = {n: kf.Block.of(r) for n, r in seen.items()}
    state = two.init(blocks, put(np.zeros(1)))
    for _ in range(2):
        state = two.update(state, two.measure(state, seen, hypers), hypers)
        state = two.refresh(state, hypers)
    new = {n: (rng.normal(size=a.shape), rng.normal(size=g.shape)) for n, (a, g) in layers.items()}
    grads = {n: put(rng.normal(size=(b.d_out, b.d_in))) for n, b in blocks.items()}
    return two.solve(state, grads, hypers, records(new, slice(None), put))


@pytest.mark.parametrize("matrix", [net.exact, kronecker], ids=["exact", "kronecker"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("kind", ["zero head", "wide", "one-hot"])
def test_examples_in_another_order_move_nothing(kind, space, method, matrix):
    layers = two_layers(kind)
    two = kf.TwoLevel(METHODS[method], SPACES[space], matrix=matrix)
    count = len(layers["first"][0])
    want = step(two, layers, np.arange(count))
    for seed in range(2):
        got = step(two, layers, np.random.default_rng(seed).permutation(count))
        for name, x in want.direction.items():
            np.testing.assert_allclose(got.direction[name], x, rtol=0, atol=1e-9 * np.abs(x).max())


@pytest.mark.parametrize("space", SPACES)
def test_a_trace_picks_the_same(space):
    layers = two_layers("wide")
    two = kf.TwoLevel(space=SPACES[space])
    want = step(two, layers, np.arange(4)).direction
    got = jax.jit(lambda order: step(two, layers, order, jnp.asarray).direction)(jnp.asarray([2, 0, 3, 1]))
    for name, x in want.items():
        np.testing.assert_allclose(got[name], x, rtol=0, atol=1e-9 * np.abs(x).max())


def test_all_eigenvectors_span_everything_whatever_is_equal():
    """Enriched by all modes of one layer is exact where K-FAC's factors have null spaces."""
    a, g = two_layers("wide")["head"]
    seen = {"head": kf.Record(a, g, float(len(a)))}
    two = kf.TwoLevel(space=net.Enriched(1 + 7 * CLASSES))
    hypers = {"head": HYPER}
    state = two.init({"head": kf.Block(CLASSES, 7)}, np.zeros(1))
    state = two.refresh(two.update(state, two.measure(state, seen, hypers), hypers), hypers)
    V = np.random.default_rng(6).normal(size=(CLASSES, 7))
    F = kf.dense(seen["head"])[0] + 0.01 * np.eye(7 * CLASSES)
    got = two.solve(state, {"head": V}, hypers, seen).direction["head"]
    np.testing.assert_allclose(got.ravel(), np.linalg.solve(F, V.ravel()), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_settled_basis_spans_the_same_spaces(dtype):
    """Eigenvalues 0 0 0 1 2 2: the spaces stay, their bases do not depend on what came, and what is alone stays."""
    rng = np.random.default_rng(0)
    values = np.array([[0, 0, 0, 1, 2, 2]], dtype)
    Q = np.linalg.qr(rng.normal(size=(1, 6, 6)))[0].astype(dtype)
    other = Q.copy()
    for space in (slice(0, 3), slice(4, 6)):
        turn = np.linalg.qr(rng.normal(size=(1, 6, 6))[:, space, space])[0].astype(dtype)
        other[:, :, space] = Q[:, :, space] @ turn
    first, second = equal.settled(values, Q), equal.settled(values, other)
    rounding = 100 * np.finfo(dtype).eps
    assert np.abs(Q - other).max() > 0.1
    np.testing.assert_allclose(np.abs(first), np.abs(second), atol=rounding)
    np.testing.assert_allclose(first.mT @ first, np.eye(6)[None], atol=rounding)
    np.testing.assert_allclose((first * values) @ first.mT, (Q * values) @ Q.mT, atol=rounding)
    np.testing.assert_array_equal(np.abs(first[..., 3]), np.abs(Q[..., 3]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("order", [2, 3])
def test_vectors_that_depend_on_each_other_change_nothing(dtype, order):
    """M^-1 v of an eigenvector v is v again: Krylov of Spectral has the coarse space of Spectral, and its step."""
    layers = two_layers("zero head")
    rows = np.arange(40)

    def put(x):
        return np.asarray(x, dtype)

    want = step(kf.TwoLevel(space=net.Spectral()), layers, rows)
    got = step(kf.TwoLevel(space=net.Krylov(net.Spectral(), order)), layers, rows, put)
    assert int(got.info["coarse"][0]) in (kf.Code.JITTERED, kf.Code.FLOAT64)
    for name, x in want.direction.items():
        np.testing.assert_allclose(got.direction[name], x, rtol=0, atol=1e5 * np.finfo(dtype).eps * np.abs(x).max())


@pytest.mark.parametrize("seed", range(6))
def test_ones_beside_all_eigenvectors_are_exact(seed):
    """One vector more than parameters: whether the factorisation sees that they depend on each other is rounding's."""
    rng = np.random.default_rng(seed)
    d_out, d_in = rng.integers(2, 6, size=2)
    seen = {"x": kf.Record(rng.normal(size=(4, 3, d_in)), rng.normal(size=(4, 3, d_out)), 4.0)}
    hypers = {"x": kf.Hyper(0, 0.0, 10.0 ** rng.uniform(-4, 0))}
    two = kf.TwoLevel(space=net.Enriched(int(1 + d_out * d_in)))
    V = rng.normal(size=(d_out, d_in))
    state = two.init({"x": kf.Block.of(seen["x"])}, V)
    state = two.refresh(two.update(state, two.measure(state, seen, hypers), hypers), hypers)
    F = kf.dense(seen["x"])[0] + hypers["x"].damping * np.eye(V.size)
    want = np.linalg.solve(F, V.ravel())
    got = two.solve(state, {"x": V}, hypers, seen).direction["x"].ravel()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-9 * np.abs(want).max())
