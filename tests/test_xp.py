"""The kernels outside the standard: results, codes and exact symmetry, on every namespace."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.fft import next_fast_len

import kfaccore as kf
from kfaccore import xp as kernels
from kfaccore.xp import arrays


def spd(rng, d, condition, blocks=1, dtype=np.float64):
    Q = np.linalg.qr(rng.normal(size=(blocks, d, d)))[0]
    values = np.logspace(0, -np.log10(condition), d)
    x = Q * values @ Q.mT
    return ((x + x.mT) / 2).astype(dtype)


def test_inverse_is_ok_up_to_condition_1e8(xp, rng):
    x = spd(rng, 40, 1e8, 2)
    inverse, code = kernels.spd_inverse(xp.put(x))
    assert xp.get(code).tolist() == [kf.Code.OK] * 2
    want = np.linalg.inv(x)
    assert np.abs(xp.get(inverse) - want).max() < 1e-7 * np.abs(want).max()
    assert np.array_equal(xp.get(code).dtype, np.int32)


def test_inverse_of_a_large_matrix_is_symmetric(rng):
    x = spd(rng, 300, 1e3)
    inverse, _ = kernels.spd_inverse(x)
    assert np.array_equal(inverse, inverse.mT)
    np.testing.assert_allclose(inverse[0] @ x[0], np.eye(300), atol=1e-11)


def test_float32_falls_back_to_float64(xp):
    near = 1 - 2.0**-22  # the second pivot is a few eps of float32
    x = np.array([[[1.0, near], [near, 1.0]]])
    inverse, code = kernels.spd_inverse(xp.put(x.astype(np.float32)))
    assert xp.get(code).tolist() == [kf.Code.FLOAT64]
    np.testing.assert_allclose(xp.get(inverse), np.linalg.inv(x), rtol=1e-6)
    assert xp.get(inverse).dtype == np.float32


def test_singular_is_jittered(xp, rng):
    half = rng.normal(size=(1, 3, 8))
    inverse, code = kernels.spd_inverse(xp.put(half.mT @ half))
    assert xp.get(code).tolist() == [kf.Code.JITTERED]
    assert np.isfinite(xp.get(inverse)).all()


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_codes_are_per_block(xp, rng):
    x = np.concatenate([spd(rng, 4, 10), np.diag([4.0, -1.0, 4.0, 4.0])[None], np.full((1, 4, 4), np.nan)])
    inverse, code = kernels.spd_inverse(xp.put(x))
    assert xp.get(code).tolist() == [kf.Code.OK, kf.Code.INDEFINITE, kf.Code.NONFINITE]
    inverse = xp.get(inverse)
    np.testing.assert_allclose(inverse[0] @ x[0], np.eye(4), atol=1e-12)
    assert np.array_equal(inverse[1:], np.stack([np.eye(4)] * 2))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_eigh_symmetrises_and_reports(xp):
    x = np.stack([[[1.0, 4.0], [0.0, 1.0]], [[np.nan, 0.0], [0.0, 1.0]]])
    values, vectors, code = kernels.eigh(xp.put(x))
    np.testing.assert_allclose(xp.get(values), [[-1.0, 3.0], [1.0, 1.0]], atol=1e-14)
    assert xp.get(code).tolist() == [kf.Code.OK, kf.Code.NONFINITE]
    V = xp.get(vectors)[0]
    np.testing.assert_allclose(V * xp.get(values)[0] @ V.T, [[1.0, 2.0], [2.0, 1.0]], atol=1e-14)


@pytest.mark.parametrize("shape", [(1, 20, 7), (3, 20, 7), (2, 10, 80), (2, 1, 1), (1, 3, 1024)])
def test_gram_is_exact_and_symmetric(xp, rng, shape):
    x = rng.normal(size=shape)
    got = xp.get(kernels.gram(xp.put(x)))
    np.testing.assert_allclose(got, x.mT @ x, rtol=1e-12, atol=1e-12)
    if shape[0] == 1 and xp.name in ("numpy", "readonly"):
        assert np.array_equal(got, got.mT)


@pytest.mark.parametrize("d", [5, 80])
def test_quadratic_forms_of_rows(xp, rng, d):
    """Large ones on NumPy read one triangle."""
    x, v = rng.normal(size=(2, 3, 9, d)), rng.normal(size=(3, d, d))
    v = v + v.mT
    got = xp.get(kernels.quadratic(xp.put(x), xp.put(v)))
    np.testing.assert_allclose(got, np.einsum("nbri,bij,nbrj->nbr", x, v, x), rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("donate", [False, True])
def test_average(xp, rng, donate):
    old, total = rng.normal(size=(2, 300, 400)), rng.normal(size=(2, 300, 400))
    add, ok = np.array([0.3, 0.5]), np.array([True, False])
    got = kernels.average(xp.put(old), xp.put(total), 0.9, xp.put(add), xp.put(ok), donate)
    np.testing.assert_allclose(xp.get(got), np.stack([0.9 * old[0] + 0.3 * total[0], old[1]]), rtol=1e-13, atol=1e-15)


def test_average_reuses_only_what_was_donated(rng):
    old, total = rng.normal(size=(1, 8, 8)), rng.normal(size=(1, 8, 8))
    kept, ok = old.copy(), np.array([True])
    assert not np.shares_memory(kernels.average(old, total, 0.5, 0.5, ok), old)
    assert np.array_equal(old, kept)
    assert np.shares_memory(kernels.average(old, total, 0.5, 0.5, ok, donate=True), old)


def test_segment_sum(xp, rng):
    values, index = rng.normal(size=(9, 2)), rng.integers(0, 5, 9)
    want = np.zeros((6, 2))
    np.add.at(want, index, values)
    np.testing.assert_allclose(xp.get(kernels.segment_sum(xp.put(values), xp.put(index), 6)), want, rtol=1e-13)


def test_loop_counts_and_stops(xp):
    def halve(carry):
        return (carry[0] / 2, carry[1] + 1.0)

    start = (xp.put(np.array(64.0)), xp.put(np.array(0.0)))
    value, count = kernels.loop(lambda c: c[0] > 1.0, halve, start, 100)
    assert (float(value), float(count)) == (1.0, 6.0)
    assert float(kernels.loop(lambda c: c[0] > 1.0, halve, start, 3)[1]) == 3.0


def test_loop_and_inverse_under_jit(rng):
    jax = pytest.importorskip("jax")
    x = np.concatenate([spd(rng, 4, 10), np.diag([4.0, -1.0, 4.0, 4.0])[None]])
    inverse, code = jax.jit(kernels.spd_inverse)(jax.numpy.asarray(x))
    assert code.tolist() == [kf.Code.OK, kf.Code.INDEFINITE]
    np.testing.assert_allclose(np.asarray(inverse)[0] @ x[0], np.eye(4), atol=1e-12)


def test_repairs_under_jit_are_those_of_numpy(rng):
    """As it is; singular but for rounding; not positive definite; not finite away from the diagonal."""
    jax = pytest.importorskip("jax")
    low = rng.normal(size=(4, 2))
    broken = spd(rng, 4, 10)
    broken[0, 3, 1] = broken[0, 1, 3] = np.inf
    x = np.concatenate([spd(rng, 4, 10), (low @ low.T)[None], np.diag([4.0, -1.0, 4.0, 4.0])[None], broken])
    found, code = jax.jit(kernels.spd_inverse)(jax.numpy.asarray(x))
    wanted, codes = kernels.spd_inverse(x)
    assert code.tolist() == codes.tolist() == [kf.Code.OK, kf.Code.JITTERED, kf.Code.INDEFINITE, kf.Code.NONFINITE]
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-13)
    assert np.linalg.norm(found[1] - wanted[1]) < 0.1 * np.linalg.norm(wanted[1])  # of condition 1e15
    assert np.array_equal(found[2:], wanted[2:])


def test_all_finite_survives_overflowing_squares(xp):
    x = np.array([[1e200, -1e200], [1.0, np.inf]])
    assert xp.get(kernels.all_finite(xp.put(x))).tolist() == [True, False]


@pytest.mark.parametrize("real", [True, False])
def test_fast_lengths_are_scipys(real):
    lengths = range(1, 3000)
    assert [kernels.fast_length(n, real) for n in lengths] == [next_fast_len(n, real=real) for n in lengths]


def test_a_whole_step_under_jit(rng):
    jax = pytest.importorskip("jax")
    a, g = jax.numpy.asarray(rng.normal(size=(6, 4))), jax.numpy.asarray(rng.normal(size=(6, 3)))
    grad = g.T @ a
    for method in (kf.KFAC(), kf.EKFAC(), kf.KFAC(inverse=kf.eigh, split=kf.exact)):

        def step(a, g, grad, damping, method=method):
            return kf.direction(kf.Record(a, g, 6.0), grad, method, damping)

        want = step(*(np.asarray(x) for x in (a, g, grad)), 0.1)
        np.testing.assert_allclose(jax.jit(step)(a, g, grad, 0.1), want, rtol=1e-10)


def test_tracing_asks_no_tracer_for_its_device(rng, monkeypatch):
    """jax answers with an error message that spells out all that was traced before: cost grows with the square."""
    jax = pytest.importorskip("jax")
    ask = arrays.aac.device

    def refuse(x):
        assert not arrays.is_tracer(x)
        return ask(x)

    monkeypatch.setattr(arrays.aac, "device", refuse)
    x, g = jax.numpy.asarray(rng.normal(size=(6, 4))), jax.numpy.asarray(rng.normal(size=(6, 3)))
    image = jax.numpy.asarray(rng.normal(size=(6, 9, 9, 2)))
    assert kernels.device_of(x) is not None

    def step(x, g, image):
        dense = kf.direction(kf.Record(x, g, 6.0), g.T @ x, kf.KFAC(), 0.1)
        patches = kf.Patches(image, kf.Window((3, 3), stride=2, padding=1), bias=True)
        return dense, patches.gram_by_fft(), patches.gram_by_chunks()

    jax.jit(step).trace(x, g, image)


def test_record_takes_a_constant_beside_a_tracer():
    jax = pytest.importorskip("jax")
    a, g = jax.numpy.ones((1, 6, 1, 4)), jax.numpy.ones((1, 1, 6, 1, 3))
    assert jax.jit(lambda g: kf.Record(a, g, 6.0).g)(g).shape == g.shape


def test_only_what_failed_is_tried_again(xp, rng, monkeypatch):
    """One matrix of many that is no inverse in float32: the others are not made again, and stay to the bit."""
    from kfaccore.xp import factorise

    tried = []
    attempt = factorise._attempt
    monkeypatch.setattr(factorise, "_attempt", lambda x: tried.append(x.shape[0]) or attempt(x))
    x = rng.standard_normal((4, 9, 12)).astype(np.float32)
    x = x @ x.transpose(0, 2, 1)
    whole, _ = kernels.spd_inverse(xp.put(x))  # of as many at once: CuPy's products differ to the bit with their number
    x[1] = np.eye(9) - 2.0
    tried.clear()
    inverse, code = kernels.spd_inverse(xp.put(x))
    assert tried == [4, *[1] * (len(tried) - 1)]
    assert list(xp.get(code)) == [0, int(kf.Code.INDEFINITE), 0, 0]
    np.testing.assert_array_equal(xp.get(inverse)[3], xp.get(whole)[3])
    np.testing.assert_array_equal(xp.get(inverse)[1], np.eye(9))
