"""The Fisher operator of fitted states against dense float64 matrices."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import block_diag
from scipy.sparse.linalg import eigsh

import kfaccore as kf
from kfaccore.analysis import operator
from kfaccore.record.jacobian import adjoint, products
from rows import arrays

METHODS = {
    "kfac": kf.KFAC(),
    "kfac-eigh": kf.KFAC(inverse=kf.eigh),
    "ekfac": kf.EKFAC(),
    "diagonal": kf.Diagonal(),
    "identity": kf.Identity(),
    "exact": kf.Exact(),
}
DAMPING = 0.07


def records(rng):
    """A layer of two blocks with shared positions, a convolution and an embedding, of unequal sizes."""
    image = kf.Patches(rng.normal(size=(7, 4, 4, 2)), kf.Window((2, 2)), bias=True)
    return {
        "fc": kf.Record(*arrays(rng), 5.0),
        "conv": kf.Record(image, rng.normal(size=(2, 7, 9, 3)), 7.0),
        "table": kf.Record(kf.Ids(rng.integers(0, 6, (7, 2)), 6), rng.normal(size=(2, 7, 2, 2)), 7.0),
    }


def reference(method, state, record):
    """F~ from the formulas of the methods, (blocks, D, D), in plain NumPy."""
    if isinstance(method, kf.Identity):
        return np.eye(record.d_out * record.d_in)[None].repeat(record.blocks, 0)
    if isinstance(method, kf.Exact):
        return kf.dense(record)
    if isinstance(method, kf.Diagonal):
        return np.stack([np.diag(np.diag(F)) for F in kf.dense(record)])
    a = record.rows().reshape(record.blocks, -1, record.d_in)
    g = record.g.transpose(1, 0, 2, 3, 4).reshape(record.blocks, -1, record.d_out)
    found = []
    for block in range(record.blocks):
        A, G = a[block].T @ a[block] / len(a[block]), g[block].T @ g[block] / record.n
        if isinstance(method, kf.KFAC):
            found.append(np.kron(G, A))
        else:
            Qa = np.diag(state.basis.Qa[block]) if state.basis.Qa.ndim == 2 else state.basis.Qa[block]
            Q = np.kron(state.basis.Qg[block], Qa)
            found.append(Q @ np.diag(np.diag(Q.T @ kf.dense(record)[block] @ Q)) @ Q.T)
    return np.stack(found)


@pytest.mark.parametrize("name", METHODS)
def test_every_figure_is_the_dense_one(name, rng):
    method, given = METHODS[name], records(rng)
    states = {n: kf.settle(method, r, damping=DAMPING) for n, r in given.items()}
    whole = operator(method, states, {n: kf.Block.of(r) for n, r in given.items()}, DAMPING)
    blocks = {n: reference(method, states[n], r) for n, r in given.items()}
    matrix = block_diag(*(F for stack in blocks.values() for F in stack))
    damped = matrix + DAMPING * np.eye(len(matrix))
    v = {n: rng.normal(size=layer.shape) for n, layer in whole.layers.items()}
    flat = whole.join(v)
    close = {"rtol": 1e-10, "atol": 1e-10}
    np.testing.assert_allclose(whole.join(whole.matvec(v)), damped @ flat, **close)
    np.testing.assert_allclose(whole.linear_operator() @ flat, damped @ flat, **close)
    np.testing.assert_allclose(whole.join(whole.solve(v)), np.linalg.solve(damped, flat), **close)
    assert whole.trace() == pytest.approx(np.trace(damped), rel=1e-11)
    assert whole.logdet() == pytest.approx(np.linalg.slogdet(damped)[1], rel=1e-10)
    values = np.linalg.eigvalsh(matrix)
    np.testing.assert_allclose(whole.eigvalsh(), values + DAMPING, **close)
    np.testing.assert_allclose(eigsh(whole.linear_operator(), 3)[0], values[-3:] + DAMPING, rtol=1e-9)
    share = np.clip(values, 1e-300, None) / values.sum()
    assert whole.effective_rank() == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-8)
    assert whole.effective_dimension() == pytest.approx((values / (values + DAMPING)).sum(), rel=1e-9)
    layer = whole.layers["conv"]
    np.testing.assert_allclose(layer.dense()[0], blocks["conv"][0] + DAMPING * np.eye(27), **close)
    assert np.array_equal(whole.join(whole.split(flat)), flat)


def test_states_of_every_namespace(xp, rng):
    a, g = arrays(rng)
    block = kf.Block(3, 4, 2)
    got, want = (
        operator(kf.EKFAC(), {"x": kf.settle(kf.EKFAC(), kf.Record(put(a), put(g), 5.0))}, {"x": block}, DAMPING)
        for put in (xp.put, np.array)
    )
    np.testing.assert_allclose(got.eigvalsh(), want.eigvalsh(), rtol=1e-9)


class Opaque:
    """A method of which nothing but products is known."""

    cycles = 1

    def matvec(self, state, v, hyper):
        return state @ v


def test_a_method_that_only_multiplies(rng):
    G = np.cov(rng.normal(size=(3, 20)))[None]
    for limit in (100, 5):
        whole = operator(Opaque(), {"x": G}, {"x": kf.Block(3, 4)}, {"x": DAMPING}, limit)
        v = rng.normal(size=(3, 4))
        want = np.linalg.solve(G[0] + DAMPING * np.eye(3), v)
        np.testing.assert_allclose(whole.solve({"x": v})["x"], want, rtol=1e-9)
    assert operator(Opaque(), {"x": G}, {"x": kf.Block(3, 4)}).trace() == pytest.approx(4 * np.trace(G[0]))
    with pytest.raises(ValueError, match=r"Opaque has no eigensystem and 12 parameters a block; .* limit=5"):
        whole.trace()


def test_singular_and_indefinite_are_told(rng):
    low = np.diag([1.0, 1.0, 0.0])[None]
    op = operator(Opaque(), {"x": low}, {"x": kf.Block(3, 2)})
    assert op.logdet() == -np.inf
    with pytest.raises(ValueError, match=r"singular .*: give damping"):
        op.solve({"x": np.ones((3, 2))})
    with pytest.raises(ValueError, match="indefinite"):
        operator(Opaque(), {"x": low - 0.5 * np.eye(3)}, {"x": kf.Block(3, 2)}).logdet()


@pytest.mark.parametrize("layer", ["fc", "conv", "table"])
def test_products_and_their_adjoint(xp, rng, layer):
    """J v and J^T w against the rows of J, and <J v, w> = <v, J^T w>."""
    record = records(rng)[layer]
    J = record.examples().transpose(0, 2, 1, 3, 4).reshape(record.draws, record.batch, -1)
    v, w = rng.normal(size=(record.blocks, record.d_out, record.d_in)), rng.normal(size=J.shape[:2])
    a = record.a
    if isinstance(a, kf.Ids):
        a = kf.Ids(xp.put(a.index), a.size)
    else:
        a = kf.Patches(xp.put(a.image), a.window, a.bias) if isinstance(a, kf.Patches) else xp.put(a)
    moved = kf.Record(a, xp.put(record.g), record.n)
    np.testing.assert_allclose(xp.get(products(moved, xp.put(v))[0]), J @ v.ravel(), rtol=1e-11, atol=1e-12)
    want = np.einsum("vbd,vb->d", J, w).reshape(v.shape)
    np.testing.assert_allclose(xp.get(adjoint(moved, xp.put(w))), want, rtol=1e-11, atol=1e-12)
