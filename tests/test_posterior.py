"""Oracles of the posterior: linear models, where the Gaussian is exact, and plain linear algebra otherwise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import kfaccore as kf
from conftest import NAMESPACES
from kfaccore.linalg.cg import CG, Residual
from kfaccore.posterior import (
    apart,
    apart_mean,
    columns,
    damage,
    given,
    in_units,
    in_units_mean,
    modes,
    quantise,
    reading,
    removal,
    rows,
    slope,
    weights,
)

TIGHT = CG(Residual(1e-15), 500)
N, D, OUT = 30, 5, 3
EAGER = pytest.mark.parametrize(
    "xp", [n for n in NAMESPACES if n.name not in ("jax", "readonly")], ids=lambda n: n.name
)


class Regression:
    """y = W x + noise of variance sigma2, a prior N(0, I / p): the record's draws are the outputs."""

    def __init__(self, rng, p=0.7, sigma2=0.4):
        self.x = rng.normal(size=(N, D)) * np.arange(1, D + 1)
        self.y = self.x @ rng.normal(size=(D, OUT)) + rng.normal(size=(N, OUT))
        self.p = p
        self.sigma2 = sigma2
        self.A = self.x.T @ self.x / sigma2 + p * np.eye(D)
        self.mean = np.linalg.solve(self.A, self.x.T @ self.y / sigma2).T
        self.record = kf.Record(self.x, np.eye(OUT)[:, None, :].repeat(N, 1), float(N))
        self.residual = self.x @ self.mean.T - self.y

    def posterior(self, method=None, put=np.asarray, p=None):
        record = kf.Record(put(self.x), put(self.record.g), float(N))
        curvature = kf.fit(method or kf.KFAC(), [{"w": record}])
        return kf.Posterior({"w": put(self.mean)}, curvature, p or self.p, N / self.sigma2), {"w": record}

    def loss(self, mean=None):
        residual = self.x @ (self.mean if mean is None else mean).T - self.y
        return 0.5 * (residual**2).sum() / self.sigma2 + 0.5 * N * OUT * np.log(2 * np.pi * self.sigma2)

    def log_marginal(self, p):
        """log N(y; 0, sigma2 I + x x^T / p), output by output."""
        K = self.sigma2 * np.eye(N) + self.x @ self.x.T / p
        fits = np.einsum("ni,nm,mi->", self.y, np.linalg.inv(K), self.y)
        return -0.5 * (fits + OUT * (np.linalg.slogdet(K)[1] + N * np.log(2 * np.pi)))


@pytest.fixture
def linear(rng):
    return Regression(rng)


@pytest.fixture
def network(rng):
    """Two layers, one of two blocks, under a curvature that is no product, and the dense L of each."""
    records = {
        "a": kf.Record(rng.normal(size=(7, 4)), rng.normal(size=(2, 7, 3)), 7.0),
        "b": kf.Record(rng.normal(size=(2, 7, 3, 3)), rng.normal(size=(2, 2, 7, 3, 2)), 7.0),
    }
    mean = {"a": rng.normal(size=(3, 4)), "b": rng.normal(size=(2, 2, 3))}
    return mean, records


def dense(P):
    """L of each layer, (blocks, D, D)."""
    found = {}
    for name, basis in P.curvature.layers.items():
        size = basis.shape[1] * basis.shape[2]
        units = np.eye(size).reshape(size, 1, *basis.shape[1:]).repeat(basis.shape[0], 1)
        product = P.matvec({name: units})[name]
        found[name] = product.reshape(size, basis.shape[0], size).transpose(1, 2, 0)
    return found


def close(got, want, rtol=1e-10):
    np.testing.assert_allclose(got, want, rtol=rtol, atol=1e-11)


@pytest.mark.parametrize("method", [kf.KFAC(), kf.EKFAC(), kf.Exact()], ids=["kfac", "ekfac", "exact"])
def test_evidence_of_a_linear_regression(linear, method):
    P, _ = linear.posterior(method)
    want = linear.log_marginal(linear.p)
    assert kf.evidence(P, linear.loss()) == pytest.approx(want, rel=1e-12)
    step = 1e-5
    around = []
    for p in (linear.p - step, linear.p + step):
        other = Regression(np.random.default_rng(0), p, linear.sigma2)
        around.append(other.log_marginal(p))
    model = Regression(np.random.default_rng(0), linear.p, linear.sigma2)
    Q, _ = model.posterior(method)
    assert slope(Q)["w"] == pytest.approx((around[1] - around[0]) / (2 * step), rel=1e-7)


def test_evidence_in_every_namespace(linear, xp):
    P, _ = linear.posterior(put=xp.put)
    assert float(xp.get(kf.evidence(P, linear.loss()))) == pytest.approx(linear.log_marginal(linear.p), rel=1e-12)
    center = {"w": xp.put(np.ones((OUT, D)))}
    away = kf.evidence(P, linear.loss(), center)
    want = linear.log_marginal(linear.p) - 0.5 * linear.p * (((linear.mean - 1) ** 2) - linear.mean**2).sum()
    assert float(xp.get(away)) == pytest.approx(want, rel=1e-12)


def test_predictive_covariance_of_a_linear_regression(linear, xp):
    P, records = linear.posterior(put=xp.put)
    inverse = np.linalg.inv(linear.A)
    one = np.einsum("ni,ij,nj->n", linear.x, inverse, linear.x)
    close(xp.get(P.covariance(records)), one[:, None, None] * np.eye(OUT))
    close(xp.get(P.covariance(records, diagonal=True)), one[:, None].repeat(OUT, 1))
    between = xp.get(P.cross(records, records)).reshape(OUT, N, OUT, N)
    close(between, np.einsum("cd,nm->cndm", np.eye(OUT), linear.x @ inverse @ linear.x.T))


def test_the_matrix_and_its_functions(network, xp):
    mean, records = network
    P = kf.Posterior(mean, kf.fit(kf.EKFAC(), [records]), {"a": 0.3, "b": 0.2}, 4.0)
    placed = kf.tree.map(xp.put, P.curvature)
    Q = kf.Posterior({k: xp.put(v) for k, v in mean.items()}, placed, {"a": 0.3, "b": 0.2}, 4.0)
    L = dense(P)
    flat = {name: x.reshape(len(L[name]), -1) for name, x in mean.items()}
    given_ = {name: xp.put(x) for name, x in mean.items()}
    for name, matrix in L.items():
        close(matrix, matrix.mT)
        inverse = np.linalg.inv(matrix)
        shape = mean[name].shape
        close(xp.get(Q.matvec(given_)[name]), np.einsum("bij,bj->bi", matrix, flat[name]).reshape(shape))
        close(xp.get(Q.solve(given_)[name]), np.einsum("bij,bj->bi", inverse, flat[name]).reshape(shape))
        close(xp.get(Q.diagonal()[name]), np.diagonal(inverse, axis1=1, axis2=2).reshape(shape))
        prior = np.linalg.slogdet(P.prior(name) * np.eye(matrix.shape[-1]))[1]
        assert float(xp.get(Q.logdet()[name])) == pytest.approx((np.linalg.slogdet(matrix)[1] - prior).sum(), rel=1e-11)
        gamma = matrix.shape[0] * matrix.shape[1] - P.prior(name) * np.trace(inverse, axis1=1, axis2=2).sum()
        assert float(xp.get(Q.gamma()[name])) == pytest.approx(gamma, rel=1e-10)
    other = {name: xp.put(2 * x + 1) for name, x in mean.items()}
    energy = sum(0.5 * np.einsum("bi,bij,bj->", v + 1, L[name], v + 1) for name, v in flat.items())
    assert float(xp.get(Q.energy(other))) == pytest.approx(energy, rel=1e-11)


@EAGER
def test_the_root_of_the_covariance(network, xp):
    mean, records = network
    P = kf.Posterior(mean, kf.fit(kf.EKFAC(), [records]), 0.3, 4.0)
    Q = kf.Posterior({k: xp.put(v) for k, v in mean.items()}, kf.tree.map(xp.put, P.curvature), 0.3, 4.0)
    L = dense(P)
    for name, matrix in L.items():
        blocks, size, _ = matrix.shape
        units = np.eye(size).reshape(size, 1, *P.curvature.layers[name].shape[1:]).repeat(blocks, 1)
        drawn = xp.get(Q.sample({name: xp.put(units)})[name]).reshape(size, blocks, size)
        R = drawn.transpose(1, 2, 0) - mean[name].reshape(blocks, size, 1)
        close(R @ R.mT, np.linalg.inv(matrix))


@EAGER
def test_leave_one_out_of_ridge_regression(linear, xp):
    """All examples; the leverage-free score is far from it."""
    P, records = linear.posterior(put=xp.put)
    place = np.random.default_rng(5).normal(size=(4, D)) * np.arange(1, D + 1)
    query = {"w": kf.Record(xp.put(place), xp.put(np.eye(OUT)[:, None, :].repeat(4, 1)), 4.0)}
    hessian = xp.put(np.eye(OUT)[None].repeat(N, 0) / linear.sigma2)
    residual = xp.put(linear.residual / linear.sigma2)
    got, codes = removal(P, hessian, residual, query, records)
    assert not xp.get(codes).any()
    want = np.empty((OUT, 4, N))
    for t in range(N):
        keep = np.arange(N) != t
        A = linear.x[keep].T @ linear.x[keep] / linear.sigma2 + linear.p * np.eye(D)
        refitted = np.linalg.solve(A, linear.x[keep].T @ linear.y[keep] / linear.sigma2).T
        want[:, :, t] = (refitted - linear.mean) @ place.T
    close(xp.get(got), want.reshape(-1, N), 1e-9)
    loss = {"w": kf.Record(xp.put(linear.x), residual, float(N))}
    first = xp.get(kf.scores(P, query, [loss]))
    assert np.abs(first - want.reshape(-1, N)).max() > 0.05 * np.abs(want).max()


def test_removal_where_nothing_would_be_left(linear):
    P, records = linear.posterior()
    hessian = np.eye(OUT)[None].repeat(N, 0) * np.where(np.arange(N) == 3, 1e6, 1.0)[:, None, None]
    got, codes = removal(P, hessian, linear.residual, records, records)
    assert list(codes) == [int(kf.Code.INDEFINITE) if t == 3 else 0 for t in range(N)]
    loss = {"w": kf.Record(linear.x, linear.residual, float(N))}
    close(got[:, 3], kf.scores(P, records, [loss])[:, 3])
    with pytest.raises(ValueError, match=r"residual has shape \(30, 2\)"):
        removal(P, hessian, linear.residual[:, :2], records, records)


@EAGER
@pytest.mark.parametrize("start", [1e-8, 1e8])
def test_tuned_precisions_are_the_maximum(network, start, xp):
    mean, records = network
    P = kf.Posterior(
        {k: xp.put(v) for k, v in mean.items()}, kf.tree.map(xp.put, kf.fit(kf.EKFAC(), [records])), start, 50.0
    )
    best, codes = kf.tuned(P)
    assert not any(xp.get(code).any() for code in codes.values())
    for name, value in slope(best).items():
        gamma = float(xp.get(best.gamma()[name]))
        p = float(xp.get(best.precision[name]))
        assert abs(float(xp.get(value))) < 1e-11 * gamma / p
        top = float(xp.get(kf.evidence(best, 0.0)))
        for factor in (0.99, 1.01):
            near = replace(best, precision={**best.precision, name: best.precision[name] * factor})
            assert float(xp.get(kf.evidence(near, 0.0))) < top


def test_layers_tuned_together(network):
    mean, records = network
    P = kf.Posterior(mean, kf.fit(kf.EKFAC(), [records]), 1.0, 50.0)
    one, _ = kf.tuned(P, together=(("a", "b"),))
    assert one.precision["a"] == one.precision["b"]
    assert abs(sum(slope(one).values())) < 1e-10
    assert list(one.precision) == list(mean)
    with pytest.raises(ValueError, match=r"together has \['c', 'a'\]"):
        kf.tuned(P, together=(("a", "a"), ("c",)))


def test_precisions_without_a_maximum(network):
    mean, records = network
    curvature = kf.fit(kf.EKFAC(), [records])
    mean_eigenvalue = curvature.layers["a"].values.mean()
    zero = {"a": np.zeros((3, 4)), "b": mean["b"]}
    P, codes = kf.tuned(kf.Posterior(zero, curvature, 1.0))
    assert codes["a"] == kf.Code.UNCONVERGED
    assert codes["b"] == kf.Code.OK
    assert P.precision["a"] == pytest.approx(1e12 * mean_eigenvalue)
    flat = kf.Curvature({**curvature.layers, "a": replace(curvature.layers["a"], values=np.zeros((1, 3, 4)))})
    P, codes = kf.tuned(kf.Posterior(mean, flat, 1.0))
    assert codes["a"] == kf.Code.UNCONVERGED
    assert P.precision["a"] == pytest.approx(1e-12)


def test_slope_of_any_group_of_weights(network):
    """Against central differences of the dense evidence with a diagonal prior."""
    mean, records = network
    P = kf.Posterior(mean, kf.fit(kf.EKFAC(), [records]), 0.3, 4.0)
    mask = np.zeros((3, 4))
    mask[1, :2] = 1
    F = dense(P)["a"][0] - 0.3 * np.eye(12)

    def dense_evidence(p):
        prior = np.where(mask.ravel() > 0, p, 0.3)
        fit = np.linalg.slogdet(F + np.diag(prior))[1] - np.log(prior).sum()
        return -0.5 * (fit + prior @ mean["a"].ravel() ** 2)

    want = (dense_evidence(0.3 + 1e-5) - dense_evidence(0.3 - 1e-5)) / 2e-5
    assert slope(P, {"a": mask})["a"] == pytest.approx(want, rel=1e-8)
    whole = slope(P, {name: np.ones(v.shape) for name, v in mean.items()})
    for name, value in slope(P).items():
        assert whole[name] == pytest.approx(value, rel=1e-10)


def test_a_prior_a_column(linear):
    """ARD: records and mean in units of the prior have the evidence of a prior a column, and its slope."""
    columns_ = np.random.default_rng(1).uniform(0.3, 3.0, D)

    def dense_evidence(p):
        K = linear.sigma2 * np.eye(N) + linear.x @ np.diag(1 / p) @ linear.x.T
        fits = np.einsum("ni,nm,mi->", linear.y, np.linalg.inv(K), linear.y)
        return -0.5 * (fits + OUT * (np.linalg.slogdet(K)[1] + N * np.log(2 * np.pi)))

    A = linear.x.T @ linear.x / linear.sigma2 + np.diag(columns_)
    mean = np.linalg.solve(A, linear.x.T @ linear.y / linear.sigma2).T
    given_ = {"w": columns_}
    curvature = kf.fit(kf.KFAC(), [in_units({"w": linear.record}, given_)])
    P = kf.Posterior(in_units_mean({"w": mean}, given_), curvature, 1.0, N / linear.sigma2)
    assert kf.evidence(P, linear.loss(mean)) == pytest.approx(dense_evidence(columns_), rel=1e-12)
    for i in range(D):
        mask = np.zeros((OUT, D))
        mask[:, i] = 1
        step = 1e-5 * np.eye(D)[i]
        want = (dense_evidence(columns_ + step) - dense_evidence(columns_ - step)) / 2e-5
        assert slope(P, {"w": mask})["w"] / columns_[i] == pytest.approx(want, rel=1e-7, abs=1e-9)


def test_a_bias_of_its_own(rng):
    x = np.concatenate([rng.normal(size=(8, 3)), np.ones((8, 1))], 1)
    record = kf.Record(x, rng.normal(size=(2, 8, 2)), 8.0)
    found = apart({"w": record, "v": record}, ["w"])
    assert list(found) == ["w", "w.bias", "v"]
    close(kf.dense(found["w"]), kf.dense(record)[:, [0, 1, 2, 4, 5, 6]][:, :, [0, 1, 2, 4, 5, 6]])
    close(kf.dense(found["w.bias"]), kf.dense(record)[:, [3, 7]][:, :, [3, 7]])
    mean = apart_mean({"w": np.arange(8.0).reshape(2, 4), "v": x}, ["w"])
    assert mean["w.bias"].tolist() == [[3.0], [7.0]]
    image = rng.normal(size=(8, 4, 4, 1))
    patches = kf.Record(kf.Patches(image, kf.Window((3, 3)), bias=True), rng.normal(size=(8, 4, 2)), 8.0)
    both = apart({"c": patches}, ["c"])
    close(both["c"].examples(), patches.examples()[..., :-1])
    close(both["c.bias"].examples(), patches.examples()[..., -1:])
    with pytest.raises(ValueError, match="last column of layer 'w' is not ones"):
        apart({"w": kf.Record(x[:, ::-1].copy(), record.g, 8.0)}, ["w"])
    with pytest.raises(ValueError, match=r"no layers \['u'\]"):
        apart({"w": record}, ["u"])
    with pytest.raises(ValueError, match=r"the precision of a column is -1"):
        in_units({"w": record}, {"w": np.array([1.0, -1.0, 1.0, 1.0])})


@pytest.mark.parametrize("method", [kf.EKFAC(), kf.Exact(), kf.Diagonal()], ids=["ekfac", "exact", "diagonal"])
def test_saliencies_are_the_energies_of_the_cheapest_way(network, method):
    """OBS of every weight, row and column by the KKT system; `given` reaches the same energy."""
    mean, records = network
    P = kf.Posterior(mean, kf.fit(method, [records]), 0.3, 4.0)
    L = dense(P)
    for name, theta in mean.items():
        shape = P.curvature.layers[name].shape
        full = theta.reshape(shape)
        places = np.arange(shape[1] * shape[2]).reshape(shape[1:])
        for block in range(shape[0]):
            Sigma = np.linalg.inv(L[name][block])
            part = full[block].ravel()

            def cost(group, Sigma=Sigma, part=part):
                return 0.5 * part[group] @ np.linalg.solve(Sigma[np.ix_(group, group)], part[group])

            got = weights(P)[name].reshape(shape)[block]
            close(got.ravel(), [cost(np.array([i])) for i in places.ravel()])
            close(rows(P)[name][block], [cost(places[o]) for o in range(shape[1])])
            close(columns(P)[name][block], [cost(places[:, i]) for i in range(shape[2])])
            close(
                damage(P)[name].reshape(shape)[block].ravel(), 0.5 * full[block].ravel() ** 2 * np.diag(L[name][block])
            )
            energy = 0.5 * full[block].ravel() @ L[name][block] @ full[block].ravel()
            assert modes(P)[name][block].sum() == pytest.approx(energy, rel=1e-10)
    fixed = {"a": np.zeros((3, 4), bool), "b": np.zeros((2, 2, 3), bool)}
    fixed["a"][1] = True
    theta, codes = given(P, 0.0, fixed, TIGHT)
    assert not any(code.any() for code in codes.values())
    assert not theta["a"][1].any()
    close(theta["b"], mean["b"])
    assert P.energy(theta) == pytest.approx(rows(P)["a"][0, 1], rel=1e-10)


@EAGER
@pytest.mark.parametrize("count", [1, 5])
def test_pruned_weights_are_a_refit_without_them(linear, count, xp):
    P, _ = linear.posterior(put=xp.put)
    gone = np.zeros((OUT, D), bool)
    gone.ravel()[np.random.default_rng(2).permutation(OUT * D)[:count]] = True
    theta, _ = given(P, {"w": xp.put(np.zeros((OUT, D)))}, {"w": xp.put(gone)}, TIGHT)
    want = np.zeros((OUT, D))
    for o in range(OUT):
        keep = ~gone[o]
        want[o, keep] = np.linalg.solve(
            linear.A[np.ix_(keep, keep)], linear.x[:, keep].T @ linear.y[:, o] / linear.sigma2
        )
    close(xp.get(theta["w"]), want)


def test_given_tells_where_it_stopped(network):
    mean, records = network
    P = kf.Posterior(mean, kf.fit(kf.EKFAC(), [records]), 1e-3, 4.0)
    fixed = {name: np.random.default_rng(0).random(v.shape) < 0.5 for name, v in mean.items()}
    theta, codes = given(P, 0.0, fixed, CG(Residual(1e-14), 1))
    assert codes["a"] == kf.Code.UNCONVERGED
    assert not theta["a"][fixed["a"]].any()
    with pytest.raises(ValueError, match="fixed has shape"):
        given(P, 0.0, {**fixed, "a": fixed["a"][:2]})


@EAGER
def test_quantising_is_rounding_and_conditional_means(rng, xp):
    """6 x 8, bit for bit, whatever the block; and in another order."""
    W = rng.normal(size=(6, 8))
    x = rng.normal(size=(40, 8))
    A = x.T @ x / 40
    curvature = kf.fit(kf.KFAC(), [{"w": kf.Record(x, np.zeros((0, 40, 6)), 40.0)}])
    grid = lambda column: np.round(column * 4) / 4  # noqa: E731
    there = lambda column: xp.put(grid(xp.get(column)))  # noqa: E731
    for order in (np.arange(8), rng.permutation(8)):
        theta = W
        fixed = np.zeros((6, 8), bool)
        for j in order:
            fixed[:, j] = True
            values = np.where(fixed, theta, 0.0)
            values[:, j] = grid(theta[:, j])
            P = kf.Posterior({"w": theta}, curvature, 0.0)
            theta = given(P, {"w": values}, {"w": fixed}, TIGHT)[0]["w"]
        for block in (1, 3, 128):
            got = xp.get(quantise(xp.put(W), xp.put(A), there, order, block))
            assert np.array_equal(got, theta)
    with pytest.raises(ValueError, match="A has no inverse: add damping"):
        quantise(W, np.zeros((8, 8)), grid)
    with pytest.raises(ValueError, match="order must hold each of the 8 columns once"):
        quantise(W, A, grid, np.zeros(8, int))


@EAGER
def test_merged_shards_are_training_on_all(linear, xp):
    """Each shard with half of the prior; EWC in sequence ends there too."""
    half = np.arange(N) < 12
    posteriors = []
    for part in (half, ~half):
        x = linear.x[part]
        A = x.T @ x / linear.sigma2 + linear.p / 2 * np.eye(D)
        mean = np.linalg.solve(A, x.T @ linear.y[part] / linear.sigma2).T
        record = kf.Record(xp.put(x), xp.put(np.eye(OUT)[:, None, :].repeat(len(x), 1)), float(len(x)))
        curvature = kf.fit(kf.KFAC(), [{"w": record}])
        posteriors.append(kf.Posterior({"w": xp.put(mean)}, curvature, linear.p / 2, len(x) / linear.sigma2))
    mean, codes = kf.merge(posteriors, TIGHT)
    assert not xp.get(codes["w"]).any()
    close(xp.get(mean["w"]), linear.mean)
    x = linear.x[~half]
    past = dense_of(posteriors[0], xp)
    A = x.T @ x / linear.sigma2 + linear.p / 2 * np.eye(D)
    old = xp.get(posteriors[0].mean["w"])
    # argmin of the new loss, half the prior, and the energy of the past
    total = np.kron(np.eye(OUT), A) + past
    right = (x.T @ linear.y[~half] / linear.sigma2).T.ravel() + past @ old.ravel()
    close(np.linalg.solve(total, right).reshape(OUT, D), linear.mean)


def dense_of(P, xp):
    units = np.eye(OUT * D).reshape(-1, 1, OUT, D)
    return xp.get(P.matvec({"w": xp.put(units)})["w"]).reshape(OUT * D, OUT * D)


@EAGER
@pytest.mark.parametrize("precision", [0.0, 0.3])
def test_two_kronecker_products_are_merged_without_an_iteration(rng, xp, precision):
    """One iteration is allowed: without a precision none is needed, with one it is too few."""
    posteriors = []
    for count in (9, 11):
        record = kf.Record(xp.put(rng.normal(size=(count, D))), xp.put(rng.normal(size=(count, OUT))), float(count))
        mean = {"w": xp.put(rng.normal(size=(OUT, D)))}
        posteriors.append(kf.Posterior(mean, kf.fit(kf.KFAC(), [{"w": record}]), precision, 2.0 * count))
    L = [dense_of(P, xp) for P in posteriors]
    right = sum(a @ xp.get(P.mean["w"]).ravel() for a, P in zip(L, posteriors, strict=True))
    want = np.linalg.solve(L[0] + L[1], right).reshape(OUT, D)
    mean, codes = kf.merge(posteriors, CG(Residual(1e-13), 1))
    if precision:
        assert xp.get(codes["w"]).tolist() == [int(kf.Code.UNCONVERGED)]
        assert np.abs(xp.get(mean["w"]) - want).max() > 1e-6
        mean, codes = kf.merge(posteriors, TIGHT)
    assert xp.get(codes["w"]).tolist() == [int(kf.Code.OK)]
    close(xp.get(mean["w"]), want)


def test_merging_other_models(network):
    mean, records = network
    P = kf.Posterior(mean, kf.fit(kf.EKFAC(), [records]), 0.3)
    with pytest.raises(ValueError, match="merge got no posteriors"):
        kf.merge([])
    only = kf.Posterior({"a": mean["a"]}, kf.Curvature({"a": P.curvature.layers["a"]}), 0.3)
    with pytest.raises(ValueError, match=r"layers of the posteriors differ: only in the first \['b'\]"):
        kf.merge([P, only])
    assert kf.merge([P, P], CG(Residual(1e-16), 1))[0]["a"].shape == (3, 4)


def test_reading_of_a_batch(network):
    """newton and both noises from per-example gradients and the dense L."""
    mean, records = network
    own = {name: replace(r, g=r.g[:1]) for name, r in records.items()}
    grads = {name: r.examples()[0].sum(1) / r.n for name, r in own.items()}
    P = kf.Posterior(mean, kf.fit(kf.EKFAC(), [records]), 0.3, 4.0)
    L = dense(P)
    found = reading(P, own, grads)
    for name, r in own.items():
        J = r.examples()[0].transpose(1, 0, 2, 3).reshape(r.batch, r.blocks, -1)
        values = np.linalg.eigvalsh(L[name])
        inverse = np.linalg.inv(L[name])
        g = grads[name].reshape(r.blocks, -1)
        got = found[name]
        assert got.trace == pytest.approx((values - 0.3).sum(), rel=1e-10)
        assert got.top == pytest.approx(values.max() - 0.3, rel=1e-10)
        assert got.condition == pytest.approx(values.max() / values.min(), rel=1e-10)
        assert got.newton == pytest.approx(np.einsum("bi,bij,bj->", g, inverse, g), rel=1e-10)
        eye = np.eye(L[name].shape[-1])[None].repeat(r.blocks, 0)
        for value, M in zip(got.noise, (eye, inverse), strict=True):
            away = J - g
            trace = np.einsum("nbi,bij,nbj->", away, M, away) / (r.batch - 1)
            true = np.einsum("bi,bij,bj->", g, M, g) - trace / r.batch
            assert value == pytest.approx(trace / true if true > 0 else np.inf, rel=1e-9)
    # a share of the mean that is no count of the examples changes no noise: gradients are over it, too
    shares = {name: replace(r, n=3 * r.n) for name, r in own.items()}
    again = reading(P, shares, {name: g / 3 for name, g in grads.items()})
    for name in own:
        assert again[name].noise == pytest.approx(found[name].noise, rel=1e-9)
    with pytest.raises(ValueError, match="has 2 draws of 7 examples; need one draw"):
        reading(P, records, grads)
