"""The two forms over records against per-example gradients written out, for every kind of record and basis."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from conftest import FEW, NAMESPACES
from kfaccore.linalg import forms
from kfaccore.posterior import Projected
from kfaccore.posterior.curvature import basis
from kfaccore.posterior.lowrank import thin
from kfaccore.xp import chunks

CLOSE = {"rtol": 1e-11, "atol": 1e-12}
METHODS = {"kfac": kf.KFAC(), "ekfac": kf.EKFAC(), "diagonal": kf.Diagonal(), "exact": kf.Exact()}


def records(rng):
    """Blocks, draws, shared positions, masks, ids and patches; ids repeat inside an example."""
    shared = rng.normal(size=(2, 2, 5, 3, 3))
    image = rng.normal(size=(2, 5, 4, 4, 2))
    mask = rng.random((5, 9)) < 0.7
    return {
        "plain": kf.Record(rng.normal(size=(5, 4)), rng.normal(size=(3, 5, 2)), 5.0),
        "blocks": kf.Record(rng.normal(size=(2, 5, 1, 4)), rng.normal(size=(2, 2, 5, 1, 3)), 5.0),
        "shared": kf.Record(rng.normal(size=(2, 5, 3, 4)), shared, 5.0, rng.random((5, 3)) < 0.6),
        "ids": kf.Record(kf.Ids(rng.integers(0, 3, (5, 4)), 6), rng.normal(size=(2, 5, 4, 2)), 5.0),
        "ids-mask": kf.Record(
            kf.Ids(rng.integers(0, 3, (5, 4)), 6), rng.normal(size=(2, 5, 4, 2)), 5.0, rng.random((5, 4)) < 0.6
        ),
        "patches": kf.Record(kf.Patches(image, kf.Window((2, 2)), bias=True), rng.normal(size=(2, 2, 5, 9, 3)), 5.0),
        "patches-mask": kf.Record(kf.Patches(image, kf.Window((2, 2))), rng.normal(size=(2, 2, 5, 9, 3)), 5.0, mask),
    }


KINDS = list(records(np.random.default_rng(0)))
DENSEST = ("shared", "ids-mask", "patches-mask")  # for namespaces that compile each operation


def placed_kinds():
    """(kind, namespace): all kinds where operations are cheap."""
    every = [(kind, space) for space in NAMESPACES for kind in KINDS if space.name != "jax" or kind in DENSEST]
    return pytest.mark.parametrize(("kind", "xp"), every, ids=lambda x: x if isinstance(x, str) else x.name)


def moved(record, put):
    """The record in another namespace."""
    a = record.a
    if isinstance(a, kf.Ids):
        a = kf.Ids(put(a.index), a.size)
    else:
        a = kf.Patches(put(a.image), a.window, a.bias) if isinstance(a, kf.Patches) else put(a)
    return kf.Record(a, put(record.g), record.n, None if record.mask is None else put(record.mask))


def fitted(method, record, put=np.asarray):
    """A basis, and weights in it, (blocks, d_out, d_in)."""
    found = basis(method, kf.settle(method, record), kf.Block.of(record))
    W = np.random.default_rng(3).uniform(0.5, 2.0, found.shape)
    placed = kf.Basis(put(found.values), put(found.Qg), () if isinstance(found.Qa, tuple) else put(found.Qa))
    return placed, put(W), dense(found, W)


def dense(found, W):
    """(Q) diag(W) (Q)^T of each block from its definition, (blocks, D, D)."""
    blocks = []
    for b in range(len(W)):
        Q = found.Qg[b]
        if not isinstance(found.Qa, tuple):
            Qg = np.diag(found.Qg[b]) if found.Qg.ndim == 2 else found.Qg[b]
            Qa = np.diag(found.Qa[b]) if found.Qa.ndim == 2 else found.Qa[b]
            Q = np.kron(Qg, Qa)
        blocks.append(Q @ np.diag(W[b].ravel()) @ Q.T)
    return np.stack(blocks)


def jacobian(record):
    """J (draws, batch, blocks, D), one example and draw at a time."""
    rows = record.rows()
    found = np.zeros((record.draws, record.batch, record.blocks, record.d_out * record.d_in))
    for v in range(record.draws):
        for b in range(record.batch):
            for block in range(record.blocks):
                pairs = zip(record.g[v, block, b], rows[block, b], strict=True)
                found[v, b, block] = sum(np.outer(g, a) for g, a in pairs).ravel()
    return found


@pytest.mark.parametrize("held", [1 << 22, 30], ids=["whole", "chunks"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_forms_are_their_definitions(kind, method, held, rng, monkeypatch):
    monkeypatch.setattr(chunks, "HELD", held)
    record = records(rng)[kind]
    found, W, matrix = fitted(METHODS[method], record)
    J = jacobian(record)
    want = np.einsum("vbkd,kde,wbke->bvw", J, matrix, J)
    np.testing.assert_allclose(forms.quadratic(record, found, W), want, **CLOSE)
    np.testing.assert_allclose(forms.quadratic(record, found, W, True), np.einsum("bvv->bv", want), **CLOSE)
    U = forms.queries(record, found, W)
    flat = J.reshape(-1, *J.shape[2:])
    np.testing.assert_allclose(U.reshape(len(flat), J.shape[2], -1), np.einsum("kde,qke->qkd", matrix, flat), **CLOSE)
    crossed = np.einsum("qkd,kde,tke->qt", flat, matrix, flat)
    np.testing.assert_allclose(forms.cross(U, record), crossed, **CLOSE)
    each = forms.cross(U, record, positions=True)
    assert each.shape == (*crossed.shape, record.shared)
    np.testing.assert_allclose(each.sum(-1), crossed, **CLOSE)
    few = forms.cross(U[:1], record)  # fewer queries than inputs: rows, not Jacobians
    np.testing.assert_allclose(few, crossed[:1], **CLOSE)


@placed_kinds()
def test_forms_in_every_namespace(kind, xp, rng):
    record = records(rng)[kind]
    method = kf.EKFAC()
    here, W, _ = fitted(method, record)
    there, V, _ = fitted(method, record, xp.put)
    elsewhere = moved(record, xp.put)
    for diagonal in (False, True):
        got = forms.quadratic(elsewhere, there, V, diagonal)
        np.testing.assert_allclose(xp.get(got), forms.quadratic(record, here, W, diagonal), **CLOSE)
    U = forms.queries(record, here, W)
    np.testing.assert_allclose(xp.get(forms.queries(elsewhere, there, V)), U, **CLOSE)
    for positions in (False, True):
        got = forms.cross(xp.put(U), elsewhere, positions)
        np.testing.assert_allclose(xp.get(got), forms.cross(U, record, positions), **CLOSE)


@pytest.mark.parametrize("kind", ["ids", "ids-mask"])
def test_ids_are_never_one_hot(kind, rng, monkeypatch):
    record = records(rng)[kind]
    found, W, _ = fitted(kf.KFAC(), record)
    want = forms.cross(forms.queries(record, found, W), record)

    def refused(self):
        raise AssertionError("one-hot rows")

    monkeypatch.setattr(kf.Record, "rows", refused)
    U = forms.queries(record, found, W)
    np.testing.assert_allclose(forms.cross(U, record), want, **CLOSE)
    forms.quadratic(record, found, W)
    project = Projected(1, 2)
    assert project.of(record).a.shape == (1, 5, 4, 2)


@pytest.mark.parametrize("xp", [n for n in NAMESPACES if n.name in ("numpy", "strict", "torch")], ids=lambda n: n.name)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["a", "g"])
def test_a_bad_example_spoils_only_its_own(kind, where, xp, rng):
    record = records(rng)[kind]
    found, W, _ = fitted(kf.EKFAC(), record)
    want = forms.quadratic(record, found, W)
    U = forms.queries(record, found, W)
    crossed = forms.cross(U, record)
    a = record.a
    g = record.g.copy()
    mask = record.mask if record.mask is None else record.mask | (np.arange(5) == 2)[:, None]
    if where == "g" or isinstance(a, kf.Ids):
        g[:, :, 2] = np.nan
    elif isinstance(a, kf.Patches):
        image = a.image.copy()
        image[:, 2] = np.nan
        a = kf.Patches(image, a.window, a.bias)
    else:
        a = a.copy()
        a[:, 2] = np.nan
    bad = moved(kf.Record(a, g, record.n, mask), xp.put)
    placed = kf.Basis(xp.put(found.values), xp.put(found.Qg), xp.put(found.Qa))
    got = xp.get(forms.quadratic(bad, placed, xp.put(W)))
    keep = [0, 1, 3, 4]
    assert np.isnan(got[2]).all()
    np.testing.assert_allclose(got[keep], want[keep], **CLOSE)
    got = xp.get(forms.cross(xp.put(U), bad)).reshape(len(U), record.draws, 5)
    assert np.isnan(got[:, :, 2]).all()
    np.testing.assert_allclose(got[:, :, keep], crossed.reshape(got.shape)[:, :, keep], **CLOSE)
    ready = xp.get(forms.queries(bad, placed, xp.put(W))).reshape(record.draws, 5, *U.shape[1:])
    assert np.isnan(ready[:, 2]).any()
    np.testing.assert_allclose(ready[:, keep], U.reshape(ready.shape)[:, keep], **CLOSE)


@pytest.mark.parametrize("xp", FEW, ids=lambda n: n.name)
@pytest.mark.parametrize("kind", KINDS)
def test_low_rank_queries(kind, xp, rng):
    record = records(rng)[kind]
    found = kf.fit(kf.KFAC(), [{"x": record}])
    mean = {"x": np.zeros(found.layers["x"].shape)}
    P = kf.Posterior(mean, found, 0.3)
    U = P.queries({"x": record})["x"]
    u, s, vt = np.linalg.svd(U)
    for rank in (1, 2):
        cut = (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]
        got = thin(P, {"x": record}, rank)["x"]
        got = type(got)(xp.put(got.u), xp.put(got.v))
        for positions in (False, True):
            want = forms.cross(cut, record, positions)
            np.testing.assert_allclose(xp.get(got.cross(moved(record, xp.put), positions)), want, **CLOSE)


@pytest.mark.parametrize("xp", FEW, ids=lambda n: n.name)
@pytest.mark.parametrize("kind", KINDS)
def test_projected_gradients_are_projections_of_gradients(kind, xp, rng):
    record = records(rng)[kind]
    project = Projected(2, 3, seed=1)
    got = project.of(moved(record, xp.put))
    eye_a = np.eye(record.d_in)
    eye_g = np.eye(record.d_out)
    P_i, P_o = (np.random.default_rng([1, side, d]).normal(size=(k, d)) / np.sqrt(k) if k < d else np.eye(d)
                for side, k, d in ((1, 3, record.d_in), (0, 2, record.d_out)))  # fmt: skip
    assert P_i.shape[1] == len(eye_a)
    assert P_o.shape[1] == len(eye_g)
    want = P_o @ record.examples() @ P_i.T
    np.testing.assert_allclose(xp.get(got.examples()), want, **CLOSE)


def test_leading_projections_keep_the_largest_sums(rng):
    record = records(rng)["blocks"]
    found = kf.fit(kf.EKFAC(), [{"x": record}])
    project = Projected.leading(found, 2, 3)
    got = project({"x": record})["x"].examples()
    values = found.layers["x"].values
    for b in range(2):
        out = np.argsort(-values[b].sum(1))[:2]
        into = np.argsort(-values[b].sum(0))[:3]
        Qg = found.layers["x"].Qg[b][:, out]
        Qa = found.layers["x"].Qa[b][:, into]
        np.testing.assert_allclose(got[:, b], Qg.T @ record.examples()[:, b] @ Qa, **CLOSE)
    with pytest.raises(ValueError, match="no projection for layers \\['y'\\]"):
        project({"y": record})
    with pytest.raises(ValueError, match="dense block, which has no sides"):
        Projected.leading(kf.fit(kf.Exact(), [{"x": record}]), 1, 1)


def test_zero_draws_have_no_gradients(rng):
    record = kf.Record(rng.normal(size=(5, 4)), np.zeros((0, 5, 2)), 5.0)
    found = kf.fit(kf.KFAC(), [{"x": record}])
    P = kf.Posterior({"x": np.zeros((2, 4))}, found, 1.0)
    for use in (P.covariance, P.queries):
        with pytest.raises(ValueError, match=r"zero draws .*no gradients"):
            use({"x": record})
    with pytest.raises(ValueError, match=r"zero draws .*no gradients"):
        kf.scores(P, {"x": record}, [{"x": record}])
