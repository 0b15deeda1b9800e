"""What stands in a prediction's positions: labels of any dtype, labels without a class, flags, what does not count,
logits of no chance."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from oracle import softmax

CLASSES = 300
CE = kf.SoftmaxCrossEntropy()
WEIGHED = kf.SoftmaxCrossEntropy(0.1, tuple(np.linspace(0.5, 2.0, 4)), -1)


def parts(loss, xp, f, *args):
    """{name: array} of all that a loss gives for (target, mask)."""
    f = xp.put(f)
    given = [None if x is None else xp.put(x) for x in args]
    shape = f.shape[:-1] if isinstance(loss, kf.SoftmaxCrossEntropy) else f.shape
    noise = xp.put(np.random.default_rng(1).random((2, *shape), np.float32))
    found = {
        "value": loss.value(f, *given),
        "gradient": loss.gradient(f, *given),
        "roots": loss.roots(f, *given),
        "sampled": loss.sampled(f, noise, *given),
    }
    return {name: xp.get(x) for name, x in found.items()}


def same(found, wanted):
    for name, x in wanted.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-12, atol=1e-14, err_msg=name)


@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "i4", "u4", "u8", "f4", "f8"])
def test_labels_of_any_dtype(dtype, xp, rng):
    """A narrow one holds fewer numbers than there are classes."""
    f, y = rng.normal(size=(6, CLASSES)), np.array([0, 3, 44, 130, 200, 255])
    found = parts(CE, xp, f, y.astype(dtype))
    p = softmax(f)
    assert found["value"] == pytest.approx(-np.log(p[np.arange(6), y]).sum(), rel=1e-13)
    np.testing.assert_allclose(found["gradient"], p - np.eye(CLASSES)[y], rtol=1e-12, atol=1e-15)
    ignoring = kf.SoftmaxCrossEntropy(ignore=-56)  # 200 as a signed byte
    assert float(ignoring.normaliser(xp.put(f), xp.put(y.astype(dtype)))) == 6


def test_flags_are_the_labels_of_two_classes(xp, rng):
    f, y = rng.normal(size=(6, 2)), rng.random(6) < 0.5
    same(parts(CE, xp, f, y), parts(CE, xp, f, y.astype(int)))


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "u8"])
def test_ids_of_any_dtype(dtype, xp, rng):
    """Sums over examples of an index of its own places wrap in a narrow dtype."""
    index, g = rng.integers(0, 100, (9, 3)), rng.normal(size=(2, 9, 3, 2))

    def record(index):
        return kf.Record(kf.Ids(xp.put(index), CLASSES), xp.put(g), 9.0)

    found, wanted = record(index.astype(dtype)), kf.Record(np.eye(CLASSES)[index], g, 9.0)
    np.testing.assert_array_equal(xp.get(found.rows())[0], np.eye(CLASSES)[index])
    np.testing.assert_allclose(xp.get(kf.dense(found)), kf.dense(wanted), atol=1e-15)
    grad = rng.normal(size=(2, CLASSES))
    for method in (kf.KFAC(), kf.EKFAC()):
        got = xp.get(kf.direction(found, xp.put(grad), method, 0.1))
        np.testing.assert_allclose(got, xp.get(kf.direction(record(index), xp.put(grad), method, 0.1)), rtol=1e-12)
    fitted = kf.fit(kf.KFAC(), [{"e": record(index)}])
    held = kf.Posterior({"e": xp.put(np.zeros((2, CLASSES)))}, fitted, 1.0)
    queries = [xp.get(held.queries({"e": x})["e"]) for x in (found, record(index))]
    np.testing.assert_allclose(*queries, rtol=1e-12, atol=1e-15)


def on_host(xp):
    return xp.name in ("numpy", "readonly")


@pytest.mark.parametrize("stranger", [4, -1, 7.0, 1.5, np.nan])
@pytest.mark.parametrize("loss", [CE, kf.SoftmaxCrossEntropy(0.1, (1.0, 2.0, 1.0, 0.5), -7)], ids=["plain", "weighed"])
def test_a_label_without_a_class(loss, stranger, xp, rng):
    """Refused where the host holds it, NaN in its own position elsewhere; masked it may be anything."""
    f = rng.normal(size=(3, 2, 4))
    y = rng.integers(0, 4, (3, 2)).astype(type(stranger))
    y[1, 0] = stranger
    mask = np.ones((3, 2), bool)
    mask[1, 0] = False
    wanted = parts(loss, xp, f, y, mask)
    assert all(np.isfinite(x).all() for x in wanted.values())
    same(wanted, parts(loss, xp, f, np.where(mask, y, 0), mask))
    if on_host(xp):
        for name in ("value", "normaliser", "gradient", "roots"):
            with pytest.raises(ValueError, match=rf"label {stranger}, shape \(3, 2\), .* classes 0 to 3; .*ignore="):
                getattr(loss, name)(f, y)
        return
    found = parts(loss, xp, f, y)
    assert np.isnan(found.pop("value"))
    for name, x in found.items():
        assert np.isnan(x[..., 1, 0, :]).all(), name
        np.testing.assert_array_equal(x[..., mask, :], wanted[name][..., mask, :])


def test_an_ignored_label_needs_no_class(xp, rng):
    f, y = rng.normal(size=(5, 4)), np.array([0, -1, 3, -1, 2])
    kept = y >= 0
    found = parts(WEIGHED, xp, f, y)
    wanted = parts(WEIGHED, xp, f, np.where(kept, y, 1), kept)
    same(found, wanted)
    assert float(WEIGHED.normaliser(xp.put(f), xp.put(y))) == pytest.approx(sum(WEIGHED.weights[i] for i in y[kept]))


@pytest.mark.parametrize("loss", [CE, kf.Bernoulli(), kf.Gaussian()], ids=repr)
def test_weights_are_no_mask_of_a_loss(loss, xp, rng):
    f = rng.normal(size=(3, 4))
    y = rng.integers(0, 4, 3) if loss == CE else rng.random((3, 4))
    flags = np.array([1.0, 0.0, 1.0])
    wanted = parts(loss, xp, f, y, flags > 0)
    same(parts(loss, xp, f, y, flags), wanted)
    same(parts(loss, xp, f, y, flags.astype(np.int8)), wanted)
    weights = np.array([1.0, 0.0, 0.5])
    if on_host(xp):
        for name in ("value", "normaliser", "gradient", "roots"):
            with pytest.raises(ValueError, match=r"mask has entries such as 0\.5, shape \(3,\); need 0 or 1"):
                getattr(loss, name)(f, y, weights)
        return
    found = parts(loss, xp, f, y, weights)
    assert np.isnan(found["value"])
    for name in ("gradient", "sampled"):
        assert np.isnan(found[name][..., 2, :]).all()
        np.testing.assert_array_equal(found[name][..., :2, :], wanted[name][..., :2, :])
    assert np.isnan(found["roots"][:, 2]).any()
    assert np.isfinite(found["roots"][:, :2]).all()


def slope(loss, xp, f, *args):
    """Of the value, by the namespace's own differentiation; None where it has none."""
    given = [xp.put(x) for x in args]
    if xp.name == "torch":
        f = xp.put(f).requires_grad_()
        loss.value(f, *given).backward()
        return f.grad.numpy()
    if xp.name == "jax":
        import jax

        return np.asarray(jax.grad(lambda f: loss.value(f, *given))(xp.put(f)))
    return None


def test_logits_of_no_chance(xp, rng):
    """-inf for classes that are forbidden: all is as without them."""
    f, y = rng.normal(size=(3, 5)), np.array([0, 1, 2])
    f[:, 3:] = -np.inf
    found, wanted = parts(CE, xp, f, y), parts(CE, xp, f[:, :3], y)
    assert found["value"] == pytest.approx(wanted["value"], rel=1e-13)
    for name in ("gradient", "sampled"):
        np.testing.assert_allclose(found[name][..., :3], wanted[name], rtol=1e-13, atol=1e-15)
        assert not found[name][..., 3:].any()
    np.testing.assert_allclose(found["roots"][:3, :, :3], wanted["roots"], rtol=1e-13, atol=1e-15)
    assert not found["roots"][3:].any()
    by_itself = slope(CE, xp, f, y)
    assert by_itself is None or np.allclose(by_itself, found["gradient"], rtol=1e-12, atol=1e-15)
    assert xp.get(CE.value(xp.put(f), xp.put(y + 1))) == np.inf


def test_outputs_that_are_certain(xp):
    f, y = np.array([[-np.inf, np.inf, 0.0, 0.0, 2.0]]), np.array([[0.0, 1.0, 0.0, 1.0, 0.25]])
    loss = kf.Bernoulli()
    found = parts(loss, xp, f, y)
    assert found["value"] == pytest.approx(2 * np.log(2) + np.log1p(np.exp(2.0)) - 0.5, rel=1e-14)
    np.testing.assert_allclose(found["gradient"], [[0, 0, 0.5, -0.5, 1 / (1 + np.exp(-2.0)) - 0.25]], rtol=1e-14)
    by_itself = slope(loss, xp, f, y)
    assert by_itself is None or np.allclose(by_itself, found["gradient"], rtol=1e-14, atol=1e-16)
    assert xp.get(loss.value(xp.put(f), xp.put(1 - y))) == np.inf


@pytest.mark.parametrize("loss", [CE, WEIGHED, kf.Bernoulli(), kf.Gaussian()], ids=lambda loss: repr(loss)[:40])
def test_positions_that_do_not_count_hold_anything(loss, xp, rng):
    f, mask = rng.normal(size=(4, 2, 4)), rng.random((4, 2)) < 0.6
    soft = isinstance(loss, kf.SoftmaxCrossEntropy)
    y = rng.integers(0, 4, (4, 2)) if soft else rng.random((4, 2, 4))
    wanted = parts(loss, xp, f, y, mask)
    for anything in (np.nan, np.inf, -np.inf):
        held = np.where(mask[..., None], f, anything)
        target = np.where(mask, y, 9) if soft else np.where(mask[..., None], y, anything)
        with np.errstate(invalid="ignore"):
            found = parts(loss, xp, held, target, mask)
        same(found, wanted)
        by_itself = slope(loss, xp, held, target, mask)
        assert by_itself is None or np.allclose(by_itself, wanted["gradient"], rtol=1e-12, atol=1e-15)
    if loss == WEIGHED:
        with np.errstate(invalid="ignore"):
            same(parts(loss, xp, held, np.where(mask, y, -1)), wanted)


@pytest.mark.parametrize("loss", [kf.Bernoulli(), kf.Gaussian()], ids=repr)
def test_targets_are_taken_in_the_dtype_of_the_prediction(loss, xp, rng):
    f, y = rng.normal(size=(3, 4)).astype(np.float32), rng.integers(0, 2, (3, 4))
    wanted = parts(loss, xp, f, y.astype(np.float32))
    for dtype in ("f8", "i8", "u1", "?"):
        for name, x in parts(loss, xp, f, y.astype(dtype)).items():
            assert x.dtype == np.float32
            np.testing.assert_array_equal(x, wanted[name])
