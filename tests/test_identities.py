"""Small closed forms of K-FAC and of its basics, float64: KFAC-3 to KFAC-8 and SCRATCH-B."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from oracle import Chain, column_major, jacobian
from test_catalogue import kronecker, records, same


def test_vec_is_row_major(rng):
    """SCRATCH-B1: F vec V = vec(J <J, V>) with vec by rows."""
    g, a, v = rng.normal(size=(1, 2)), rng.normal(size=(1, 2)), np.array([[1.0, 2.0], [3.0, 4.0]])
    F = kf.dense(kf.Record(a, g, 1.0))[0]
    J = g.T @ a
    assert same(F @ np.array([1.0, 2.0, 3.0, 4.0]), (J * (J * v).sum()).ravel())
    assert same(column_major(F, 2, 2) @ np.array([1.0, 3.0, 2.0, 4.0]), (J * (J * v).sum()).T.ravel())


def test_jacobian_of_a_linear_layer(rng):
    """SCRATCH-B3: d(W x) / d vec W = I (x) x^T, and a record's examples are its rows."""
    x, W = rng.normal(size=(5, 4)), rng.normal(size=(3, 4))
    J = jacobian(lambda V: x @ V.T, W)
    np.testing.assert_allclose(J, np.stack([np.kron(np.eye(3), row[None]) for row in x]), atol=1e-15)
    draws = np.broadcast_to(np.eye(3)[:, None], (3, 5, 3))
    per_example = kf.Record(x, draws, 1.0).examples()[:, 0].reshape(3, 5, 12)
    np.testing.assert_allclose(per_example, J.transpose(1, 0, 2), atol=1e-15)


def test_matrix_free_products_are_the_dense_ones(rng):
    """SCRATCH-B4: matvec of Exact is (1/n) sum_n J_n <J_n, V>."""
    record = kf.Record(rng.normal(size=(5, 2, 4)), rng.normal(size=(2, 5, 2, 3)), 5.0)
    v = rng.normal(size=(1, 3, 4))
    method, state = kf.Exact(), kf.settle(kf.Exact(), record)
    J = record.examples()[:, 0]
    want = np.einsum("vboi,vb->oi", J, np.einsum("vboi,oi->vb", J, v[0])) / 5
    assert same(method.matvec(state, v, kf.Hyper(0, 0.0, 0.0))[0], want)


def test_block_of_linear_regression(rng):
    """SCRATCH-B7: F = I (x) 2 sum x x^T by rows, 2 sum x x^T (x) I by columns."""
    x = rng.normal(size=(6, 4))
    draws = np.broadcast_to(np.eye(3)[:, None], (3, 6, 3))
    F = kf.dense(kf.Record(x, draws, 0.5))[0]
    assert same(F, np.kron(np.eye(3), 2 * x.T @ x))
    assert same(column_major(F, 3, 4), np.kron(2 * x.T @ x, np.eye(3)))


@pytest.mark.parametrize("alpha", [1.0, 10.0])
def test_gauss_newton_of_rosenbrock(alpha):
    """SCRATCH-B8: 2 [[1 + 4 k x0^2, -2 k x0], [-2 k x0, k]], which is not the Hessian."""
    x0, x1 = 0.7, -1.3
    J = np.array([[-1.0, 0.0], [-2 * alpha**0.5 * x0, alpha**0.5]])
    F = kf.dense(kf.Record(np.ones((1, 1)), J[:, None, :], 0.5))[0]
    want = 2 * np.array([[1 + 4 * alpha * x0**2, -2 * alpha * x0], [-2 * alpha * x0, alpha]])
    assert same(F, want)
    hessian = 2 * np.array([[1 + 6 * alpha * x0**2 - 2 * alpha * x1, -2 * alpha * x0], [-2 * alpha * x0, alpha]])
    assert not same(F, hessian, 1e-3)


def test_backward_is_the_linearisation(rng):
    """SCRATCH-B9: examples of a record with unit draws are the rows of df / dW."""
    net = Chain((4, 3, 2), "tanh", bias=True)
    weights, x = net.init(rng), rng.normal(size=(5, 3, 4))
    f = net.run(weights, x)[0]
    for layer, record in enumerate(records(net, weights, x, kf.type2(kf.Gaussian(), f), 1.0)):
        J = jacobian(lambda W, at=layer: net.run([*weights[:at], W, *weights[at + 1 :]], x)[0], weights[layer])
        J = J.reshape(5, 6, -1)
        assert same(record.examples()[:, 0].reshape(6, 5, -1), J.transpose(1, 0, 2))


def test_monte_carlo_in_one_go_or_one_by_one(rng):
    """SCRATCH-B10: M draws together are M single draws over sqrt(M)."""
    f = rng.normal(size=(100, 3))
    noise = kf.draw_noise(kf.Gaussian(), f.shape, 7, np.random.default_rng(42))
    together = kf.monte_carlo(kf.Gaussian(), f, noise)
    single = np.concatenate([kf.monte_carlo(kf.Gaussian(), f, noise[i : i + 1]) for i in range(7)]) / 7**0.5
    a = rng.normal(size=(100, 4))
    assert same(kf.dense(kf.Record(a, together, 100.0)), kf.dense(kf.Record(a, single, 100.0)))


def test_scaling_the_inputs_leaves_the_function_step(rng):
    """KFAC-4: a -> k a and V -> k V give X -> X / k, so X a is unchanged at no damping."""
    a, g = rng.normal(size=(9, 4)), rng.normal(size=(9, 3))
    grad, k = g.T @ a / 9, 3.0
    step = kf.direction(kf.Record(a, g, 9.0), grad, damping=0.0)
    scaled = kf.direction(kf.Record(k * a, g, 9.0), k * grad, damping=0.0)
    assert same(scaled, step / k, 1e-11)


def test_affine_maps_of_the_inputs_leave_the_function_step(rng):
    """KFAC-5: a -> P a and V -> V P^T give X -> X P^-1, so X a is unchanged at no damping."""
    a, g, P = rng.normal(size=(30, 4)), rng.normal(size=(30, 3)), rng.normal(size=(4, 4))
    grad = g.T @ a / 30
    step = kf.direction(kf.Record(a, g, 30.0), grad, damping=0.0)
    moved = kf.direction(kf.Record(a @ P.T, g, 30.0), grad @ P.T, damping=0.0)
    assert same(moved @ P, step, 1e-8 * np.linalg.cond(P))


def test_solving_factor_by_factor_is_the_dense_solve(rng):
    """KFAC-3: (G (x) A)^-1 vec V = vec(G^-1 V A^-1)."""
    record = kf.Record(rng.normal(size=(40, 4)), rng.normal(size=(40, 3)), 40.0)
    A, G = kronecker(record)
    v = rng.normal(size=(3, 4))
    want = np.linalg.solve(np.kron(G, A), v.ravel()).reshape(3, 4)
    assert same(kf.direction(record, v, damping=0.0), want, 1e-10)


def test_scale_conventions_give_one_product(rng):
    """KFAC-6: the tutorial's factors, A = R sum a a^T and B = sum g g^T / (N S), against means and shares."""
    a, g, R = rng.normal(size=(6, 5, 4)), rng.normal(size=(2, 6, 5, 3)), 0.3
    A, G = kronecker(kf.Record(a, g, 1 / R))
    rows, gs = a.reshape(-1, 4), g.reshape(-1, 3)
    assert same(np.kron(G, A), np.kron(gs.T @ gs / 30, R * rows.T @ rows), 1e-14)
    A, G = kronecker(kf.Record(a, g, 1 / R), kf.reduce)
    rows, gs = a.sum(1), g.sum(2).reshape(-1, 3)
    assert same(np.kron(G, A), np.kron(gs.T @ gs / (6 * 25), R * rows.T @ rows), 1e-14)


def test_permuting_and_duplicating_leave_the_factors(rng):
    """KFAC-7: permuting or duplicating the batch leaves A and G; with n kept, F doubles."""
    a, g = rng.normal(size=(6, 5, 4)), rng.normal(size=(2, 6, 5, 3))
    A, G = kronecker(kf.Record(a, g, 6.0))
    order = rng.permutation(6)
    for other in (kf.Record(a[order], g[:, order], 6.0), kf.concat(*[kf.Record(a, g, 6.0)] * 2)):
        assert same(kronecker(other)[0], A, 1e-14)
        assert same(kronecker(other)[1], G, 1e-14)
    doubled = kf.Record(np.concatenate([a, a]), np.concatenate([g, g], 1), 1.0)
    assert same(kf.dense(doubled), 2 * kf.dense(kf.Record(a, g, 1.0)), 1e-14)


def test_traces_of_the_block_of_kfac_and_of_ekfac(rng):
    """KFAC-8: tr F = sum |J_n|^2 / n, tr(G (x) A) = tr A tr G, and EKFAC's trace is that of F."""
    a, g = rng.normal(size=(6, 1, 4)), rng.normal(size=(2, 6, 1, 3))
    record = kf.Record(a, g, 6.0)
    J = record.examples()
    assert np.trace(kf.dense(record)[0]) == pytest.approx((J**2).sum() / 6, rel=1e-13)
    A, G = kronecker(record)
    state = kf.settle(kf.KFAC(), record)
    K = [kf.KFAC().matvec(state, e.reshape(1, 3, 4), kf.Hyper(0, 0.0, 0.0)).ravel() for e in np.eye(12)]
    assert np.trace(np.stack(K)) == pytest.approx(np.trace(A) * np.trace(G), rel=1e-13)
    ekfac, fitted = kf.EKFAC(), kf.settle(kf.EKFAC(), record)
    E = [ekfac.matvec(fitted, e.reshape(1, 3, 4), kf.Hyper(0, 0.0, 0.0)).ravel() for e in np.eye(12)]
    assert np.trace(np.stack(E)) == pytest.approx((J**2).sum() / 6, rel=1e-12)
