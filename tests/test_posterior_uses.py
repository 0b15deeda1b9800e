"""Fitting, scores over batches, links, files, tracing, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import kfaccore as kf
from conftest import FEW, NAMESPACES
from kfaccore.analysis import operator
from kfaccore.linalg import forms, side
from kfaccore.linalg.basis import Basis
from kfaccore.posterior import Projected, bridge, cosine, influence, lds, monte_carlo_link, passes, probit, regression
from kfaccore.record.chunks import parts

FITTED = {
    "kfac": kf.KFAC(),
    "reduce": kf.KFAC(sharing=kf.reduce),
    "ekfac": kf.EKFAC(),
    "tkfac": kf.TKFAC(),
    "tekfac": kf.TEKFAC(),
    "kpsvd": kf.KPSVD(),
    "diagonal": kf.Diagonal(),
    "identity": kf.Identity(),
    "exact": kf.Exact(),
    "deflation": kf.Deflation(),
    "lanczos": kf.Lanczos(),
    "corrected": kf.KFACCorrected(),
}


def batch(rng, count=6):
    """Two layers, one of two blocks with positions."""
    return {
        "a": kf.Record(rng.normal(size=(count, 4)), rng.normal(size=(2, count, 3)), float(count)),
        "b": kf.Record(rng.normal(size=(2, count, 3, 3)), rng.normal(size=(2, 2, count, 3, 2)), float(count)),
    }


def pieces(records, many):
    """The same examples as smaller batches, whose shares add up."""
    columns = [[replace(p, n=p.n * p.batch / record.batch) for p in parts(record, many)] for record in records.values()]
    return [dict(zip(records, row, strict=True)) for row in zip(*columns, strict=True)]


def posterior(records, method=None, precision=0.3, scale=1.0):
    curvature = kf.fit(method or kf.EKFAC(), [records])
    mean = {name: np.random.default_rng(9).normal(size=basis.shape) for name, basis in curvature.layers.items()}
    return kf.Posterior(mean, curvature, precision, scale)


def matrices(curvature):
    return {name: basis.back(units(basis)) for name, basis in curvature.layers.items()}


def units(basis):
    size = basis.shape[1] * basis.shape[2]
    eye = np.eye(size).reshape(size, 1, *basis.shape[1:])
    return basis.values * basis.into(eye.repeat(basis.shape[0], 1))


@pytest.mark.parametrize("name", FITTED)
def test_a_fit_is_settle_and_the_states_own_matrix(name, rng):
    method = FITTED[name]
    records = batch(rng)
    got = matrices(kf.fit(method, [records]))
    states = {k: kf.settle(method, r) for k, r in records.items()}
    whole = operator(method, states, {k: kf.Block.of(r) for k, r in records.items()})
    for layer, found in got.items():
        shape = found.shape[1:]
        size = shape[1] * shape[2]
        want = np.stack(
            [whole.layers[layer].matvec(u.repeat(shape[0], 0)) for u in np.eye(size).reshape(-1, 1, *shape[1:])]
        )
        np.testing.assert_allclose(found, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["kfac", "ekfac", "tekfac", "exact", "diagonal"])
def test_a_fit_does_not_depend_on_how_data_come(name, rng):
    """In batches, permuted, and twice."""
    records = batch(rng)
    want = matrices(kf.fit(FITTED[name], [records]))
    order = np.array([3, 1, 0, 5, 2, 4])
    permuted = {k: kf.Record(r.a[:, order], r.g[:, :, order], r.n) for k, r in records.items()}
    for given in (pieces(records, 4), [permuted], [records, records]):
        for layer, found in matrices(kf.fit(FITTED[name], given)).items():
            np.testing.assert_allclose(found, want[layer], rtol=1e-9, atol=1e-12)


def test_methods_without_a_curvature_are_named(rng):
    record = batch(rng)["a"]
    for method in (kf.SKFAC(), kf.CGFAC(), kf.SINGD(), kf.RandomizedKFAC(), kf.FNGD()):
        with pytest.raises(ValueError, match=r"keeps no curvature .* take KFAC, EKFAC"):
            kf.Curvature.of(
                method, {"x": method.init(kf.Block(3, 4, rows=8, samples=8), record.g)}, {"x": kf.Block(3, 4)}
            )
    with pytest.raises(ValueError, match=r"these are in one only: \['y'\]"):
        kf.Curvature.of(kf.KFAC(), {}, {"y": kf.Block(3, 4)})


def test_two_terms_are_multiplied_out_up_to_a_limit():
    state = kf.Deflation().init(kf.Block(50, 50), np.zeros(1))
    with pytest.raises(ValueError, match="2500 parameters a block has no basis of its own"):
        kf.Curvature.of(kf.Deflation(), {"x": state}, {"x": kf.Block(50, 50)})


def test_batches_that_cannot_be_fitted(rng):
    records = batch(rng)
    cases = [
        (iter([records]), "an iterator, which one pass spends"),
        ([], r"batches gave nothing; need at least one \{layer: Record\}"),
        (records, "batches is one mapping"),
        ([records, {"a": records["a"]}], r"they differ in \['b'\]"),
        ([{}], r"batch 0 has layers \[\], the first one \[\]"),
        ([records, {**records, "a": records["b"]}], "batch 1 has layer 'a' as Block.* the first one as Block"),
    ]
    for given, message in cases:
        with pytest.raises(ValueError, match=message):
            kf.fit(kf.EKFAC(), given)

    with pytest.raises(ValueError, match=r"method has no entry for layers \['b'\]; it has \['a'\]"):
        kf.fit({"a": kf.KFAC()}, [records])
    spoiled = records["a"].g.copy()
    spoiled[0, 0, -1, 0, 0] = np.nan
    bad = {**records, "a": kf.Record(records["a"].a, spoiled, records["a"].n)}
    for method in (kf.KFAC(), kf.EKFAC(), kf.TEKFAC(), kf.TKFAC(), kf.KPSVD(), kf.Diagonal(), kf.Exact()):
        with pytest.raises(ValueError, match="layer 'a': the records of some batch hold values that are not finite"):
            kf.fit(method, [records, bad])

    class Once:
        asked = 0

        def __iter__(self):
            self.asked += 1
            return iter([records] if self.asked < 2 else [])

    with pytest.raises(ValueError, match="gave nothing when they were asked for again"):
        kf.fit(kf.EKFAC(), Once())


def test_one_pass_takes_an_iterator(rng):
    records = batch(rng)
    mixed = {"a": kf.KFAC(), "b": kf.Diagonal()}
    got = matrices(kf.fit(mixed, iter([records])))
    np.testing.assert_array_equal(got["a"], matrices(kf.fit(kf.KFAC(), [records]))["a"])
    np.testing.assert_array_equal(got["b"], matrices(kf.fit(kf.Diagonal(), [records]))["b"])


def test_scores_over_batches_and_memory(rng):
    records = batch(rng, 7)
    queries = batch(np.random.default_rng(1), 5)
    P = posterior(records)
    want = P.cross(queries, records).reshape(10, 2, 7)
    given = pieces(records, 3)
    apart = np.concatenate([want[:, :, s].reshape(10, -1) for s in (slice(0, 3), slice(3, 6), slice(6, 7))], 1)
    for memory in (1 << 30, 900, 1):
        np.testing.assert_allclose(kf.scores(P, queries, given, memory), apart, rtol=1e-11, atol=1e-13)
    assert passes(P, queries) == 1
    assert passes(P, queries, memory=1) == 5
    one = kf.Posterior({"b": P.mean["b"]}, kf.Curvature({"b": P.curvature.layers["b"]}), 0.3)
    each = kf.scores(one, {"b": queries["b"]}, [{"b": records["b"]}], positions=True)
    np.testing.assert_allclose(
        each.sum(-1), one.cross({"b": queries["b"]}, {"b": records["b"]}), rtol=1e-11, atol=1e-13
    )
    assert each.shape == (10, 14, 3)
    full = kf.scores(P, queries, given, rank=3)
    np.testing.assert_allclose(full, apart, rtol=1e-10, atol=1e-12)
    low = kf.scores(P, queries, given, memory=1, rank=1)
    assert 0.1 < np.linalg.norm(low - apart) / np.linalg.norm(apart) < 0.9
    self_influence = P.covariance(records, diagonal=True)
    crossed = P.cross(records, records)
    np.testing.assert_allclose(self_influence.T.ravel(), np.diag(crossed), rtol=1e-11)


@pytest.mark.parametrize("xp", FEW, ids=lambda n: n.name)
def test_a_rank_above_a_layers_own_is_all_of_it(xp, rng):
    """Layers of 3 x 4 and 2 x 3 have fewer singular terms than some wider layer beside them."""
    put = lambda r: kf.Record(xp.put(r.a), xp.put(r.g), r.n)  # noqa: E731
    given = {name: put(r) for name, r in batch(rng).items()}
    mean = {"a": xp.put(np.zeros((1, 3, 4))), "b": xp.put(np.zeros((2, 2, 3)))}
    P = kf.Posterior(mean, kf.fit(kf.EKFAC(), [given]), 0.3)
    want = xp.get(P.cross(given, given))
    np.testing.assert_allclose(xp.get(kf.scores(P, given, [given], rank=5)), want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("method", [kf.EKFAC(), kf.Diagonal(), kf.Exact()])
@pytest.mark.parametrize(("size", "told", "outside"), [(4, True, 0), (4, False, 1), (2, False, 2), (12, True, 0)])
def test_queries_leave_the_eigenbasis_when_that_is_the_cheaper_way(rng, method, size, told, outside, monkeypatch):
    """Turning 2 queries of 3 x 4 back takes as many products as turning 2 * 3 * 4 (3 + 4) / (3^2 + 4^2) = 6 examples:
    those 12 are met outside where their batches tell how many there are, else all from the batch of the sixth on;
    sides of no basis, and a dense block, are outside at once."""
    records = {"a": batch(rng, 12)["a"]}
    records["a"] = replace(records["a"], g=records["a"].g[:1])
    queries = {"a": replace(records["a"], a=records["a"].a[:, :2], g=records["a"].g[:, :, 3:5], n=2.0)}
    P = posterior(records, method)
    turns = []
    met = forms.cross
    monkeypatch.setattr(forms, "cross", lambda U, record, positions: turns.append(1) or met(U, record, positions))
    back = []
    turned_back = Basis.back
    monkeypatch.setattr(Basis, "back", lambda basis, V: back.append(len(turns)) or turned_back(basis, V))
    batches = pieces(records, size)
    found = kf.scores(P, queries, batches if told else (part for part in batches))
    assert back == [outside if isinstance(method, kf.EKFAC) else 0]
    L = np.linalg.inv(matrices(P.curvature)["a"].reshape(12, 12) + 0.3 * np.eye(12))
    J = records["a"].examples().reshape(12, 12)
    asked = queries["a"].examples().reshape(2, 12)
    np.testing.assert_allclose(found, asked @ L @ J.T, rtol=1e-11, atol=1e-13)


class Interrupted:
    """Batches that end with Ctrl-C the first time they are asked for."""

    def __init__(self, batches):
        self.batches = batches
        self.asked = 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.asked += 1
        yield from self.batches[:2] if self.asked == 1 else self.batches
        if self.asked == 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize("options", [{}, {"memory": 900}, {"rank": 2}])
def test_scores_on_disk_go_on_where_they_were_stopped(rng, tmp_path, monkeypatch, options):
    records = batch(rng, 7)
    queries = batch(np.random.default_rng(1), 5)
    P = posterior(records)
    given = pieces(records, 3)
    want = kf.scores(P, queries, given, **options)
    parts = passes(P, queries, **options)
    made = []
    block = influence._block
    monkeypatch.setattr(influence, "_block", lambda *a: made.append(1) or block(*a))
    stopped = Interrupted(given)
    path = tmp_path / "scores.npy"
    with pytest.raises(KeyboardInterrupt):
        kf.scores(P, queries, stopped, out=path, **options)
    assert len(made) == 2
    assert not path.exists()
    got = kf.scores(P, queries, stopped, out=path, **options)
    assert len(made) == 3 * parts  # none of the first two again
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.load(path), want)
    assert [child.name for child in tmp_path.iterdir()] == ["scores.npy"]


def test_scores_on_disk_are_of_what_they_were_asked_for(rng, tmp_path):
    """Blocks of another posterior or of other batches are left alone."""
    records = batch(rng, 7)
    queries = batch(np.random.default_rng(1), 5)
    P = posterior(records)
    other = replace(P, precision=1.7)
    given = pieces(records, 3)
    path = tmp_path / "scores.npy"
    with pytest.raises(KeyboardInterrupt):
        kf.scores(P, queries, Interrupted(given), out=path)
    turned = [given[1], given[0], given[2]]
    again = tmp_path / "again.npy"
    with pytest.raises(KeyboardInterrupt):
        kf.scores(P, queries, Interrupted(given), out=again)
    np.testing.assert_array_equal(kf.scores(P, queries, turned, out=again), kf.scores(P, queries, turned))
    np.testing.assert_array_equal(kf.scores(other, queries, turned, out=path), kf.scores(other, queries, turned))
    each = kf.Posterior({"b": P.mean["b"]}, kf.Curvature({"b": P.curvature.layers["b"]}), 0.3)
    asked = (each, {"b": queries["b"]}, [{"b": r["b"]} for r in given])
    np.testing.assert_array_equal(
        kf.scores(*asked, positions=True, out=path, memory=1), kf.scores(*asked, positions=True, memory=1)
    )
    with pytest.raises(ValueError, match=r"need the name of an \.npy"):
        kf.scores(P, queries, given, out=tmp_path / "scores.csv")


def test_scores_that_cannot_be_had(rng):
    records = batch(rng)
    P = posterior(records)
    cases = [
        ((records, iter([records]), 1), {}, "an iterator, and 1 bytes hold the queries in 6 parts"),
        ((records, records), {}, "batches is one mapping"),
        ((records, []), {}, "batches gave nothing"),
        (({"a": records["a"]}, [records]), {}, r"records and curvature differ: .* second \['b'\]"),
        ((records, [{"a": records["a"]}]), {}, r"records and curvature differ: .* second \['b'\]"),
        ((records, [records]), {"rank": 0}, "rank is 0"),
        ((records, [records]), {"positions": True}, r"layers differ in positions: \{'a': 1, 'b': 3\}"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(ValueError, match=message):
            kf.scores(P, *arguments, **options)
    shared = {**records, "a": kf.Record(np.ones((1, 4)), np.ones((2, 1, 3)), 6.0)}
    with pytest.raises(ValueError, match=r"records differ in \(draws, batch\): .*'a': \(2, 1\)"):
        P.covariance(shared)
    other = {**records, "a": kf.Record(np.ones((6, 5)), np.ones((2, 6, 3)), 6.0)}
    with pytest.raises(ValueError, match=r"layer 'a' is of \(blocks, d_out, d_in\) = \(1, 3, 5\)"):
        P.covariance(other)


def test_projected_scores_are_of_the_small_space(rng):
    """LoGra: a fit and scores on projected records, damping joint and exact there."""
    records = batch(rng)
    project = Projected(2, 2, seed=4)
    small = project(records)
    P = posterior(small)
    F = {name: kf.dense(r) for name, r in small.items()}
    exact = posterior(small, kf.Exact())
    J = {name: r.examples().transpose(0, 2, 1, 3, 4).reshape(12, r.blocks, -1) for name, r in small.items()}
    want = 0
    for name, matrix in F.items():
        inverse = np.linalg.inv(matrix + 0.3 * np.eye(matrix.shape[-1]))
        want = want + np.einsum("qbi,bij,tbj->qt", J[name], inverse, J[name])
    np.testing.assert_allclose(kf.scores(exact, small, [small]), want, rtol=1e-10, atol=1e-12)
    assert P.curvature.layers["b"].shape == (2, 2, 2)
    with pytest.raises(ValueError, match="k_out=0"):
        Projected(0, 1)


def test_cosine_and_lds(rng):
    scores = rng.normal(size=(3, 8))
    inside = rng.random((20, 8)) < 0.5
    assert lds(scores, inside, -(inside @ scores.T)) == pytest.approx(1.0)
    assert lds(scores, [np.flatnonzero(row) for row in inside], np.exp(inside @ scores.T)) == pytest.approx(-1.0)
    from scipy.stats import spearmanr

    outcomes = np.round(rng.normal(size=(20, 3)), 1)
    want = np.mean([spearmanr(-(inside @ s), y).statistic for s, y in zip(scores, outcomes.T, strict=True)])
    assert lds(scores, inside, outcomes) == pytest.approx(want, rel=1e-12)
    x = rng.normal(size=(3, 4))
    y = rng.normal(size=(8, 4))
    got = cosine(x @ y.T, (x**2).sum(1), (y**2).sum(1))
    want = x @ y.T / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(y, axis=1)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    assert not cosine(np.zeros((1, 2)), np.zeros(1), np.ones(2)).any()
    with pytest.raises(ValueError, match=r"outcomes \(2, 3\)"):
        lds(scores, inside, outcomes[:2])
    with pytest.raises(ValueError, match="need \\(Q, T\\), \\(Q,\\) and \\(T,\\)"):
        cosine(scores, np.ones(8), np.ones(3))


@pytest.mark.parametrize("subset", [[1, 1, 0, 1], [0.0, 2.0], [True, False, True, False], [0, 8], [-1, 2], [[0, 1]]])
def test_places_of_a_subset_are_whole_and_each_there_once(subset, rng):
    """A list of 0 and 1 was read as the places 0 and 1."""
    scores = rng.normal(size=(3, 8))
    with pytest.raises(
        ValueError, match=r"need the places of its examples, whole numbers from 0 to 7, .* array \(M, T\)"
    ):
        lds(scores, [subset, [0, 1]], rng.normal(size=(2, 3)))
    with pytest.raises(ValueError, match=r"scores have shape \(8,\); need \(Q, T\)"):
        lds(scores[0], [[0], [1]], rng.normal(size=(2, 3)))


def test_uses_of_what_are_no_arrays_are_named(rng):
    f = rng.normal(size=(4, 3))
    V = np.broadcast_to(np.eye(3), (4, 3, 3))
    records = {"w": kf.Record(rng.normal(size=(9, 4)), rng.normal(size=(9, 3)), 9.0)}
    P = kf.Posterior({"w": rng.normal(size=(3, 4))}, kf.fit(kf.KFAC(), [records]), 0.3)
    stays = np.zeros((3, 4), bool)
    for call in (
        lambda: probit(f.tolist(), V),
        lambda: bridge(f, V.tolist()),
        lambda: regression(f.tolist(), V, 0.1),
        lambda: cosine(f, [1.0] * 4, np.ones(3)),
        lambda: kf.posterior.given(P, {"w": [[0.0] * 4] * 3}, {"w": stays}),
        lambda: kf.posterior.given(P, 0.0, {"w": stays.tolist()}),
        lambda: kf.posterior.quantise(f.tolist(), np.eye(3), np.round),
    ):
        with pytest.raises(TypeError, match="arrays must come from one Array API namespace, got builtins"):
            call()
    with pytest.raises(ValueError, match=r"fixed of layer 'w' has entries that are neither True nor False"):
        kf.posterior.given(P, 0.0, {"w": P.diagonal()["w"]})
    assert kf.posterior.given(P, 0.0, {"w": stays.astype(float)})[0]["w"].shape == (3, 4)
    with pytest.raises(ValueError, match=r"f has shape \(\) and V"):
        probit(np.array(1.0), np.array(1.0))


def softmax(f):
    e = np.exp(f - f.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("xp", [n for n in NAMESPACES if n.name not in ("readonly", "jax")], ids=lambda n: n.name)
def test_links(rng, xp):
    f = rng.normal(size=(4, 3))
    root = rng.normal(size=(4, 3, 3))
    V = root @ root.mT
    flat = np.diagonal(V, axis1=1, axis2=2)
    want = softmax(f / np.sqrt(1 + np.pi / 8 * flat))
    np.testing.assert_allclose(xp.get(probit(xp.put(f), xp.put(V))), want, rtol=1e-12)
    np.testing.assert_allclose(xp.get(probit(xp.put(f), xp.put(flat))), want, rtol=1e-12)
    one = probit(xp.put(f[:, :1]), xp.put(V[:, :1, :1]))
    logit = f[:, :1] / np.sqrt(1 + np.pi / 8 * V[:, :1, 0])
    np.testing.assert_allclose(xp.get(one), 1 / (1 + np.exp(-logit)), rtol=1e-12)
    rows = []
    for mean, cov in zip(f, V, strict=True):  # Hobbhahn et al. 2022, example by example
        total = cov.sum()
        m = mean - cov.sum(1) * mean.sum() / total
        c = np.diag(cov - np.outer(cov.sum(1), cov.sum(0)) / total)
        alpha = (1 - 2 / 3 + np.exp(m) / 9 * np.exp(-m).sum()) / c
        rows.append(alpha / alpha.sum())
    np.testing.assert_allclose(xp.get(bridge(xp.put(f), xp.put(V))), rows, rtol=1e-10)
    noise = rng.normal(size=(500, 4, 3))
    values, Q = np.linalg.eigh(V)
    S = (Q * np.sqrt(values)[:, None]) @ Q.mT
    want = softmax(f + np.einsum("bij,sbj->sbi", S, noise)).mean(0)
    got = monte_carlo_link(xp.put(f), xp.put(V), xp.put(noise))
    np.testing.assert_allclose(xp.get(got), want, rtol=1e-10)
    mean, variance = regression(xp.put(f), xp.put(V), 0.5)
    np.testing.assert_allclose(xp.get(variance), V + 0.5 * np.eye(3), rtol=1e-14)
    assert regression(f, flat, 0.5)[1].shape == (4, 3)


def test_vectors_of_other_shapes_are_refused(rng):
    records = {"w": kf.Record(rng.normal(size=(9, 4)), rng.normal(size=(9, 3)), 9.0)}
    P = kf.Posterior({"w": rng.normal(size=(3, 4))}, kf.fit(kf.KFAC(), [records]), 0.3)
    v = rng.normal(size=(3, 4))
    for form in (P.solve, P.matvec, P.root):
        flat = form({"w": v.ravel()})["w"]
        np.testing.assert_array_equal(flat.reshape(3, 4), form({"w": v})["w"])
        for wrong in (v.T, v[:, :3], v.ravel()[:6], v[None, None, :, :2]):
            with pytest.raises(ValueError, match=r"a vector has shape .* need \(blocks, d_out, d_in\) = \(1, 3, 4\)"):
                form({"w": wrong})
    op = operator(kf.KFAC(), {"w": kf.settle(kf.KFAC(), records["w"])}, {"w": kf.Block(3, 4)}, 0.1).layers["w"]
    with pytest.raises(ValueError, match="a vector has shape"):
        op.matvec(v.T)
    with pytest.raises(ValueError, match=r"theta of 'w' has shape \(1, 4\), the mean \(3, 4\)"):
        P.energy({"w": np.ones((1, 4))})


def test_the_bridge_of_logits_far_apart_is_finite():
    """Those of float64, where exp(100) is a number."""
    f = np.array([[50.0, 0.0, -50.0], [3.0, -80.0, 1.0]])
    V = np.stack([np.eye(3), np.diag([1.0, 2.0, 0.5])])
    found = bridge(f.astype(np.float32), V.astype(np.float32))
    np.testing.assert_allclose(found, bridge(f, V), rtol=1e-5, atol=1e-30)
    shifted = f - f.mean(1, keepdims=True)  # V of the first row has the identity's share of the sum
    variance = 1.0 - 1.0 / 3
    alpha = (1 - 2 / 3 + np.exp(shifted[0]) * np.exp(-shifted[0]).sum() / 9) / variance
    np.testing.assert_allclose(bridge(f, V)[0], alpha / alpha.sum(), rtol=1e-12)


def test_links_refuse_other_shapes(rng):
    f = rng.normal(size=(4, 3))
    for link in (probit, bridge):
        with pytest.raises(ValueError, match=r"f has shape \(4, 3\) and V \(4, 2, 2\)"):
            link(f, np.ones((4, 2, 2)))
    with pytest.raises(ValueError, match="or its diagonal"):
        probit(f, np.ones(4))
    with pytest.raises(ValueError, match="at least 2 classes"):
        bridge(f[:, :1], np.ones((4, 1, 1)))
    with pytest.raises(ValueError, match="noise has shape"):
        monte_carlo_link(f, np.ones((4, 3, 3)), np.ones((5, 4, 2)))


def test_what_has_no_density_is_refused(rng):
    record = batch(rng)["a"]
    low = kf.Record(record.a[:, :2], record.g[:, :, :2], record.n)  # 2 examples, 12 parameters
    curvature = kf.fit(kf.Exact(), [{"x": low}])
    mean = {"x": np.zeros((3, 4))}
    with pytest.raises(ValueError, match=r"layer 'x': scale F~ is singular.*need any precision > 0"):
        kf.Posterior(mean, replace_values(curvature, lambda s: np.where(s < 1e-10, 0.0, s)), 0.0)
    kf.Posterior(mean, curvature, 1e-9)
    bent = replace_values(curvature, lambda s: s - 0.5)
    with pytest.raises(ValueError, match=r"is indefinite, its smallest eigenvalue is -1\.?.*above 1"):
        kf.Posterior(mean, bent, 0.1, 2.0)
    rounding = replace_values(curvature, lambda s: np.where(s < 1e-10, -1e-16 * s.max(), s))
    P = kf.Posterior(mean, rounding, 0.1)
    assert P.eigenvalues("x").min() == 0
    for precision, scale in ((-1.0, 1.0), (np.nan, 1.0), (1.0, 0.0), (1.0, np.inf)):
        with pytest.raises(ValueError, match="need finite numbers, >= 0 and > 0"):
            kf.Posterior(mean, curvature, precision, scale)
    with pytest.raises(ValueError, match=r"mean and curvature differ: only in the first \['y'\]"):
        kf.Posterior({"y": mean["x"]}, curvature, 1.0)
    with pytest.raises(ValueError, match=r"precision and curvature differ"):
        kf.Posterior(mean, curvature, {"y": 1.0})
    with pytest.raises(ValueError, match=r"mean of layer 'x' has shape \(4, 3\); need .* \(1, 3, 4\)"):
        kf.Posterior({"x": np.zeros((4, 3))}, curvature, 1.0)
    with pytest.raises(ValueError, match=r"no curvature for layers \['z'\]"):
        P.solve({"z": mean["x"]})


def replace_values(curvature, function):
    return kf.Curvature({k: replace(b, values=function(b.values)) for k, b in curvature.layers.items()})


def test_files_name_their_classes(rng, tmp_path):
    records = batch(rng)
    P = posterior(records, precision={"a": 0.3, "b": 0.2}, scale=4.0)
    kf.save(tmp_path / "p.safetensors", P, task="here")
    got = kf.load(tmp_path / "p.safetensors")
    assert isinstance(got, kf.Posterior)
    assert got.precision == {"a": 0.3, "b": 0.2}
    assert kf.metadata(tmp_path / "p.safetensors") == {"task": "here"}
    np.testing.assert_array_equal(got.covariance(records), P.covariance(records))
    exact = {"deep/name": kf.fit(kf.Exact(), [{"x": records["a"]}])}
    kf.save(tmp_path / "c.safetensors", exact)
    found = kf.load(tmp_path / "c.safetensors")["deep/name"]
    assert isinstance(found, kf.Curvature)
    assert found.layers["x"].Qa == ()
    same = kf.load(tmp_path / "p.safetensors", like=P)
    assert same.scale == 4.0
    state = kf.settle(kf.KFAC(), records["a"])
    kf.save(tmp_path / "s.safetensors", state)
    assert set(kf.load(tmp_path / "s.safetensors")) >= {"A", "G", "weight"}


def test_the_operator_finds_eigenvectors_once(rng, monkeypatch):
    records = batch(rng)
    states = {k: kf.settle(kf.KFAC(), r) for k, r in records.items()}
    whole = operator(kf.KFAC(), states, {k: kf.Block.of(r) for k, r in records.items()}, 0.1)
    first = whole.logdet()
    calls = []
    monkeypatch.setattr(side, "eigh", lambda x: calls.append(x))
    assert whole.logdet() == first
    other = whole.damped(0.2)
    values = np.concatenate([layer.basis.values.ravel() for layer in whole.layers.values()])
    assert other.logdet() == pytest.approx(np.log(values + 0.2).sum(), rel=1e-12)
    layer = replace(whole.layers["a"], damping=0.3)
    assert layer.logdet() == pytest.approx(np.log(layer.basis.values + 0.3).sum(), rel=1e-12)
    assert not calls
    with pytest.raises(TypeError):  # another state is another operator
        replace(whole.layers["a"], state=states["a"], damping=0.3).logdet()


def test_logdet_of_a_singular_operator(rng):
    """Zeros of the factors are rounding noise, and still zeros."""
    a = rng.normal(size=(3, 12))
    record = kf.Record(a, rng.normal(size=(3, 2)), 3.0)
    whole = operator(kf.KFAC(), {"x": kf.settle(kf.KFAC(), record)}, {"x": kf.Block.of(record)})
    assert (whole.eigvalsh() != 0).any()
    assert whole.logdet() == -np.inf
    values = np.linalg.eigvalsh(np.kron(record.g[0, 0, :, 0].T @ record.g[0, 0, :, 0] / 3, a.T @ a / 3))
    want = np.log(np.maximum(values, 0) + 1e-20)
    assert whole.damped(1e-20).logdet() == pytest.approx(np.where(values < 1e-13, np.log(1e-20), want).sum(), rel=1e-6)


def test_a_saved_run_is_a_curvature(tmp_path, rng):
    pytest.importorskip("sklearn")
    from typer.testing import CliRunner

    from kfaccore.cli import app

    out = tmp_path / "run"
    for method in ("kfac", "ekfac"):
        arguments = ["train", "digits-classifier", "--method", method, "--steps", "6", "--out", str(out), "--json"]
        assert CliRunner().invoke(app, arguments).exit_code == 0
        run = kf.saved(out / "run.safetensors")
        assert run.meta["task"] == "digits-classifier"
        layers = kf.load(out / "run.safetensors")["state"]["layers"]
        for name, basis in run.curvature.layers.items():
            state = layers[name]
            if method == "kfac":
                want = np.trace(state["A"][0]) * np.trace(state["G"][0]) / state["weight"][0] ** 2
            else:
                want = state["S"].sum() / (state["S_weight"][0] or 1.0)  # 0: of the last refresh
            assert float(basis.values.sum()) == pytest.approx(want, rel=1e-4)
        kf.Posterior(run.params, run.curvature, 1.0)
    kf.save(tmp_path / "x.safetensors", {"a": np.zeros(1)})
    with pytest.raises(ValueError, match="holds no states of layers"):
        kf.saved(tmp_path / "x.safetensors")


def test_torch_differentiates_the_evidence(rng):
    torch = pytest.importorskip("torch")
    P = posterior(batch(rng), precision=0.3, scale=5.0)
    placed = kf.tree.map(torch.asarray, P.curvature)
    mean = {k: torch.asarray(v) for k, v in P.mean.items()}
    p = {name: torch.tensor(0.3, dtype=torch.float64, requires_grad=True) for name in mean}
    Q = kf.Posterior(mean, placed, p, 5.0)
    kf.evidence(Q, 1.0).backward()
    from kfaccore.posterior import slope

    for name, value in slope(P).items():
        assert float(p[name].grad) == pytest.approx(float(value), rel=1e-10)
    theta = {k: (v + 1).requires_grad_() for k, v in mean.items()}
    Q.energy(theta).backward()
    for name, g in P.matvec({k: np.ones(v.shape) for k, v in P.mean.items()}).items():
        np.testing.assert_allclose(theta[name].grad.numpy(), g, rtol=1e-10)


def test_jax_traces_evidence_and_operator(rng):
    jax = pytest.importorskip("jax")
    from kfaccore_jax.trees import register

    records = batch(rng)
    P = posterior(records, kf.KFAC(), precision=0.3, scale=5.0)
    placed = kf.tree.map(jax.numpy.asarray, P.curvature)
    mean = {k: jax.numpy.asarray(v) for k, v in P.mean.items()}
    states = {k: kf.settle(kf.KFAC(), r) for k, r in records.items()}
    there = register(kf.tree.map(jax.numpy.asarray, states))
    blocks = {k: kf.Block.of(r) for k, r in records.items()}

    @jax.jit
    def both(p, states):
        whole = operator(kf.KFAC(), states, blocks, p)
        return kf.evidence(kf.Posterior(mean, placed, p, 5.0), 1.0), whole.logdet(), whole.solve(mean), whole.trace()

    evidence, logdet, solved, trace = both(0.3, there)
    assert float(evidence) == pytest.approx(float(kf.evidence(P, 1.0)), rel=1e-11)
    whole = operator(kf.KFAC(), states, blocks, 0.3)
    assert float(logdet) == pytest.approx(whole.logdet(), rel=1e-11)
    assert float(trace) == pytest.approx(whole.trace(), rel=1e-11)
    for name, want in whole.solve(P.mean).items():
        np.testing.assert_allclose(solved[name], want, rtol=1e-10, atol=1e-12)
    hosted = jax.jit(lambda p: operator(kf.KFAC(), states, blocks, p).logdet())  # only the damping is traced
    assert float(hosted(0.3)) == pytest.approx(whole.logdet(), rel=1e-11)
