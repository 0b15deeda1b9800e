"""Losses and draws against brute force: central differences, complex steps, torch where it is installed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import kfaccore as kf
from oracle import hessians, softmax

WEIGHTS = (0.5, 2.0, 1.0, 0.3, 1.2)
SOFT = [
    kf.SoftmaxCrossEntropy(),
    kf.SoftmaxCrossEntropy(smoothing=0.1),
    kf.SoftmaxCrossEntropy(weights=WEIGHTS),
    kf.SoftmaxCrossEntropy(0.2, WEIGHTS, 3),
]
LOSSES = [*SOFT, kf.Bernoulli(), kf.Gaussian()]
ids = {"argvalues": LOSSES, "ids": lambda loss: repr(loss)[:60]}


def case(loss, rng, shape=(4, 3, 5)):
    f = rng.normal(size=shape)
    soft = isinstance(loss, kf.SoftmaxCrossEntropy)
    return f, rng.integers(0, shape[-1], shape[:-1]) if soft else rng.uniform(size=shape)


def brute(loss, f, y):
    """The loss written out, for complex f."""
    if isinstance(loss, kf.Gaussian):
        return 0.5 * ((f - y) ** 2).sum()
    if isinstance(loss, kf.Bernoulli):
        return (np.log(1 + np.exp(f)) - y * f).sum()
    C = f.shape[-1]
    logp = f - np.log(np.exp(f).sum(-1, keepdims=True))
    v = ((1 - loss.smoothing) * np.eye(C)[y] + loss.smoothing / C) * (loss.weights or np.ones(C))
    return -(v * logp * (y != loss.ignore)[..., None]).sum()


def derivative(function, f):
    out = np.empty_like(f)
    for i in range(f.size):
        z = f.astype(complex)
        z.flat[i] += 1e-30j
        out.flat[i] = function(z).imag / 1e-30
    return out


@pytest.mark.parametrize("loss", **ids)
def test_value_and_gradient(loss, xp, rng):
    f, y = case(loss, rng)
    assert float(loss.value(xp.put(f), xp.put(y))) == pytest.approx(brute(loss, f, y), rel=1e-13)
    got = xp.get(kf.empirical(loss, xp.put(f), xp.put(y)))
    np.testing.assert_allclose(got, derivative(lambda z: brute(loss, z, y), f)[None], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss", **ids)
def test_type2_draws_are_roots_of_the_hessian(loss, xp, rng):
    """SCRATCH-B6: sum_c v_c v_c^T is the Hessian of the loss, by central differences."""
    f, y = case(loss, rng)
    draws = xp.get(kf.type2(loss, xp.put(f), xp.put(y))).reshape(-1, 4, 15)
    got = np.einsum("vbi,vbj->bij", draws, draws)
    step = 1e-5
    for i, j in itertools.product(range(15), repeat=2):
        rows = np.zeros(15)
        rows[j] = step
        ahead, behind = (
            np.asarray(kf.empirical(loss, f + s * rows.reshape(3, 5), y)).reshape(4, 15)[:, i] for s in (1, -1)
        )
        np.testing.assert_allclose(got[:, i, j], (ahead - behind) / (2 * step), atol=1e-8)


@pytest.mark.parametrize("loss", [kf.SoftmaxCrossEntropy(), kf.Gaussian()], ids=["ce", "mse"])
@pytest.mark.parametrize("shape", [(4, 5), (2, 2, 3, 4, 5)])
def test_hessian_of_the_criterion(loss, shape, rng):
    """SCRATCH-B5: sum_c v_c v_c^T is I for squared error and diag p - p p^T for cross entropy."""
    f, _ = case(loss, rng, shape)
    draws = kf.type2(loss, f).reshape(-1, shape[0], f[0].size)
    want = hessians("mse" if isinstance(loss, kf.Gaussian) else "ce", f)
    np.testing.assert_allclose(np.einsum("vbi,vbj->bij", draws, draws), want, atol=1e-14)


def test_normalisers_of_mean_losses(rng):
    """SCRATCH-B2: mean (f - y)^2 is the Gaussian loss over size / 2, a mean cross entropy that over the label
    positions."""
    f, y = rng.normal(size=(10, 5, 4, 3)), rng.normal(size=(10, 5, 4, 3))
    loss = kf.Gaussian()
    assert loss.normaliser(f, y) == 10
    assert float(loss.value(f, y) / (f.size / 2)) == pytest.approx(((f - y) ** 2).mean(), rel=1e-13)
    f, y = rng.normal(size=(10, 5, 4, 3, 6)), rng.integers(0, 6, (10, 5, 4, 3))
    loss = kf.SoftmaxCrossEntropy()
    assert loss.normaliser(f, y) == 600
    assert float(loss.value(f, y) / 600) == pytest.approx(
        -np.log(np.take_along_axis(softmax(f), y[..., None], -1)).mean()
    )


def test_type2_draws_are_a_root_of_diag_p_minus_pp(rng):
    """FISHER-1: sum_c v_c v_c^T = diag p - p p^T, of rank classes - 1."""
    f = rng.normal(size=(1, 5))
    draws = kf.type2(kf.SoftmaxCrossEntropy(), f)[:, 0]
    p = softmax(f)[0]
    np.testing.assert_allclose(draws.T @ draws, np.diag(p) - np.outer(p, p), atol=1e-14)
    assert np.linalg.matrix_rank(draws.T @ draws, tol=1e-12) == 4


@pytest.mark.parametrize("loss", [kf.SoftmaxCrossEntropy(weights=WEIGHTS), kf.Bernoulli(), kf.Gaussian()])
def test_monte_carlo_is_unbiased(loss, rng):
    """FISHER-2: E[v v^T] of one Monte-Carlo draw is the sum of the type-2 draws' v v^T."""
    f, y = case(loss, rng, (3, 5))
    noise = kf.draw_noise(loss, f.shape, 4000, rng)
    draws = kf.monte_carlo(loss, f, noise, y) * 4000**0.5
    outer = np.einsum("vbi,vbj->vij", draws, draws)
    roots = kf.type2(loss, f, y)
    want = np.einsum("vbi,vbj->ij", roots, roots)
    error = np.abs(outer.mean(0) - want)
    assert (error <= 5 * outer.std(0) / 4000**0.5 + 1e-12).all()


def test_monte_carlo_error_falls_with_the_root_of_draws(rng):
    f = rng.normal(size=(3, 5))
    loss = kf.SoftmaxCrossEntropy()
    roots = kf.type2(loss, f)
    want = np.einsum("vbi,vbj->ij", roots, roots)

    def error(draws):
        found = []
        for _ in range(60):
            d = kf.monte_carlo(loss, f, kf.draw_noise(loss, f.shape, draws, rng))
            found.append(np.linalg.norm(np.einsum("vbi,vbj->ij", d, d) - want) ** 2)
        return np.mean(found) ** 0.5

    assert error(25) / error(400) == pytest.approx(4.0, rel=0.15)


@pytest.mark.parametrize("loss", **ids)
def test_sampled_draws_agree_with_numpy(loss, xp, rng):
    f, y = case(loss, rng)
    noise = kf.draw_noise(loss, f.shape, 2, rng)
    want = kf.monte_carlo(loss, f, noise, y)
    got = xp.get(kf.monte_carlo(loss, xp.put(f), xp.put(noise), xp.put(y)))
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)


def test_signs_are_unbiased(rng):
    f = rng.normal(size=(2, 3, 4))
    loss = kf.SoftmaxCrossEntropy()
    exact = kf.type2(loss, f).reshape(-1, 2, 12)
    total = 0
    for signs in itertools.product((-1, 1), repeat=3):
        draws = kf.type2(loss, f, signs=np.array(signs)).reshape(-1, 2, 12)
        total = total + np.einsum("vbi,vbj->bij", draws, draws) / 8
    np.testing.assert_allclose(total, np.einsum("vbi,vbj->bij", exact, exact), atol=1e-15)


@pytest.mark.parametrize("loss", **ids)
def test_masked_positions_are_dropped(loss, rng):
    f, y = case(loss, rng)
    mask = rng.uniform(size=(4, 3)) < 0.6
    flat_f, flat_y = f[mask][:, None], y[mask][:, None]
    assert float(loss.value(f, y, mask)) == pytest.approx(float(loss.value(flat_f, flat_y)), rel=1e-12)
    if isinstance(loss, kf.SoftmaxCrossEntropy):
        assert float(loss.normaliser(f, y, mask)) == pytest.approx(float(loss.normaliser(flat_f, flat_y)))
    got = kf.empirical(loss, f, y, mask)[0]
    assert not got[~mask].any()
    np.testing.assert_allclose(got[mask], kf.empirical(loss, flat_f, flat_y)[0][:, 0], rtol=1e-12)


@pytest.mark.parametrize("loss", SOFT, ids=lambda loss: repr(loss)[:60])
def test_as_torch_defines_it(loss, rng):
    torch = pytest.importorskip("torch")
    f, y = case(loss, rng, (6, 5))
    given = torch.tensor(f, requires_grad=True)
    weights = None if loss.weights is None else torch.tensor(loss.weights, dtype=torch.float64)
    ignore = -100 if loss.ignore is None else loss.ignore
    options = {"ignore_index": ignore, "label_smoothing": loss.smoothing}
    want = torch.nn.functional.cross_entropy(given, torch.tensor(y), weights, **options)
    want.backward()
    n = float(loss.normaliser(f, y))
    assert float(loss.value(f, y)) / n == pytest.approx(want.item(), rel=1e-12)
    np.testing.assert_allclose(kf.empirical(loss, f, y)[0] / n, given.grad.numpy(), atol=1e-15)


def test_forward_only_has_no_draws():
    draws = kf.forward_only(np.zeros((4, 3)))
    assert draws.shape == (0, 4, 3)
    record = kf.Record(np.ones((4, 2)), draws, 4.0)
    with pytest.raises(ValueError, match="zero draws"):
        kf.dense(record)
    for method in (kf.EKFAC(), kf.Diagonal()):
        with pytest.raises(ValueError, match="zero draws"):
            kf.direction(record, np.ones((3, 2)), method)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kf.type2(kf.SoftmaxCrossEntropy(weights=(1.0, 2.0)), np.zeros((3, 2))), "pass target"),
        (lambda: kf.empirical(kf.SoftmaxCrossEntropy(), np.zeros((3, 2)), np.zeros(4, int)), r"\(4,\); need labels"),
        (lambda: kf.empirical(kf.Gaussian(), np.zeros((3, 2)), np.zeros((3, 1))), r"\(3, 1\); need that of f"),
        (lambda: kf.monte_carlo(kf.Gaussian(), np.zeros((3, 2)), np.zeros((3, 2))), "standard normal noise of shape"),
        (lambda: kf.empirical(kf.SoftmaxCrossEntropy(weights=(1.0,)), np.zeros((3, 2)), np.zeros(3, int)), "1 classes"),
        (lambda: kf.Gaussian().value(np.zeros((3, 2)), np.zeros((3, 2)), np.ones(2, bool)), r"mask has shape \(2,\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("wrong", [-0.1, 1.5, np.nan])
def test_noise_that_is_not_uniform_is_named(wrong, rng):
    """Standard normal noise drew the first class for half of the labels."""
    for loss, shape in ((kf.SoftmaxCrossEntropy(), (4, 3)), (kf.Bernoulli(), (4, 3, 2))):
        noise = rng.random(shape)
        noise[0, 0] = 1.0  # what rounding to float32 makes of a number below it
        kf.monte_carlo(loss, np.zeros((3, 2)), noise)
        noise[-1, -1] = wrong
        with pytest.raises(ValueError, match=r"noise has entries outside of \[0, 1\)"):
            kf.monte_carlo(loss, np.zeros((3, 2)), noise)


@pytest.mark.parametrize("loss", **ids)
def test_half_precision_is_summed_wide(loss, rng):
    """More examples than float16 can count, at predictions and targets that it holds exactly."""
    f = rng.integers(-8, 8, (5000, 5)) / 4
    y = rng.integers(0, 5, 5000) if isinstance(loss, kf.SoftmaxCrossEntropy) else rng.integers(0, 2, f.shape) / 1.0
    half = f.astype(np.float16)
    target = y if y.ndim == 1 else y.astype(np.float16)
    mask = np.arange(5000) % 7 > 0
    np.testing.assert_allclose(loss.value(half, target, mask), loss.value(f, y, mask), rtol=3e-6)
    np.testing.assert_allclose(loss.normaliser(half, target, mask), loss.normaliser(f, y, mask), rtol=3e-6)
