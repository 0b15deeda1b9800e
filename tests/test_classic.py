"""Identities of the classic blocks, dense against factored, and two terms under jit."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from oracle import matrix
from rows import arrays

HYPER = kf.Hyper(0, 0.0, 0.0)


def record_of(rng, batch=64):
    a, g = arrays(rng, 1, batch, 1, 7, 5, 1)
    return kf.Record(a, g * (0.2 + a[..., :1] ** 2), float(batch))


def factors_of(record):
    a, g = record.a[0, :, 0], record.g[0, 0, :, 0]
    return a.T @ a / len(a), g.T @ g / record.n


def apart(x, y):
    return np.linalg.norm(x - y) / np.linalg.norm(y)


def fitted(method, record):
    return matrix(method, kf.settle(method, record), HYPER, (1, record.d_out, record.d_in))[0]


def test_kfac_is_the_dense_solve(rng):
    """KFAC-1: X = (G + c_G I)^-1 V (A + c_A I)^-1 solves ((G + c_G I) (x) (A + c_A I)) vec X = vec V."""
    record, v = record_of(rng), rng.normal(size=(5, 7))
    A, G = factors_of(record)
    pi = np.sqrt(np.trace(A) / 7 / (np.trace(G) / 5))
    dense = np.kron(G + 0.3**0.5 / pi * np.eye(5), A + pi * 0.3**0.5 * np.eye(7))
    assert apart(kf.direction(record, v, kf.KFAC(), 0.3).ravel(), np.linalg.solve(dense, v.ravel())) < 1e-12


def test_factored_damping_adds_two_cross_terms_of_least_trace_at_pi(rng):
    """KFAC-2: (G + gamma/p) (x) (A + p gamma) - G (x) A - gamma^2 I has the trace of its two cross terms, least at
    pi."""
    A, G = factors_of(record_of(rng))
    gamma, pi = 0.4, np.sqrt(np.trace(A) / 7 / (np.trace(G) / 5))

    def excess(p):
        whole = np.kron(G + gamma / p * np.eye(5), A + p * gamma * np.eye(7))
        return whole - np.kron(G, A) - gamma**2 * np.eye(35)

    cross = pi * gamma * np.kron(G, np.eye(7)) + gamma / pi * np.kron(np.eye(5), A)
    assert apart(excess(pi), cross) < 1e-12
    grid = pi * np.geomspace(0.1, 10, 41)
    assert min(np.trace(excess(p)) for p in grid) == pytest.approx(np.trace(excess(pi)), rel=1e-13)
    scales = [kf.damping.Scale.of_factor(x[None]) for x in (A, G)]
    d_a, d_g = kf.pi.shifts(*scales, gamma**2)
    assert (d_a[0], d_g[0]) == pytest.approx((pi * gamma, gamma / pi), rel=1e-13)


@pytest.mark.parametrize("method", [kf.KFAC(), kf.EKFAC(), kf.TKFAC(), kf.TEKFAC(), kf.KPSVD(), kf.Lanczos()])
def test_one_position_is_a_dense_layer(rng, method):
    """KFAC-9: a convolution of one position has the direction of a dense layer.

    A window as large as the image: its one patch is the row."""
    image, g, v = rng.normal(size=(30, 2, 2, 2)), rng.normal(size=(30, 1, 4)), rng.normal(size=(4, 9))
    patches = kf.Record(kf.Patches(image, kf.Window((2, 2)), bias=True), g, 30.0)
    rows = kf.Record(patches.rows()[0, :, 0], g[:, 0], 30.0)
    assert apart(kf.direction(patches, v, method, 0.1), kf.direction(rows, v, method, 0.1)) < 1e-10


def test_ekfac_has_the_best_diagonal_in_its_basis(rng):
    """EKFAC-1: S = diag(Q^T F Q), so tr EKFAC = tr F and |EKFAC - F| <= |KFAC - F|."""
    record = record_of(rng)
    F, K, E = kf.dense(record)[0], fitted(kf.KFAC(), record), fitted(kf.EKFAC(), record)
    state = kf.settle(kf.EKFAC(), record)
    Q = np.kron(state.basis.Qg[0], state.basis.Qa[0])
    assert apart(np.diag(Q.T @ F @ Q), (state.S[0] / state.S_weight[0]).ravel()) < 1e-12
    assert apart(E, Q @ np.diag(np.diag(Q.T @ F @ Q)) @ Q.T) < 1e-12
    assert np.trace(E) == pytest.approx(np.trace(F), rel=1e-13)
    assert np.linalg.norm(E - F) <= np.linalg.norm(K - F)


@pytest.mark.parametrize("method", [kf.TKFAC(), kf.TEKFAC(), kf.KPSVD(), kf.Deflation(), kf.Lanczos()])
@pytest.mark.parametrize("rows", [3, 6, 20])
def test_gradients_as_rows_have_the_direction_of_their_product(rng, method, rows):
    """KFAC-10: V = y_g^T y_a / n as rows and multiplied out have one direction."""
    record = record_of(rng)
    factored = kf.Factored(rng.normal(size=(rows, 7)), rng.normal(size=(rows, 5)), 4.0)
    assert apart(kf.direction(record, factored, method), kf.direction(record, factored.dense(), method)) < 1e-11


@pytest.mark.parametrize("method", [kf.Deflation(), kf.Lanczos()])
def test_two_terms_under_jit(rng, method):
    """KPSVD-10: loops whose length depends on data become loops of the compiler; the direction is the same."""
    jax = pytest.importorskip("jax")
    record, v = record_of(rng, 20), rng.normal(size=(5, 7))
    parts = tuple(jax.numpy.asarray(x) for x in (record.a, record.g, v))

    def direction(a, g, v):
        given = kf.Record(a, g, 20.0)
        state = kf.settle(method, given, 1)
        return method.solve(state, v, kf.Hyper(0, 0.0, 0.1)).direction

    assert apart(np.asarray(jax.jit(direction)(*parts)), direction(record.a, record.g, v)) < 1e-9
