"""Records: sharing, masks, ids, concatenation and the scaling laws of the loss."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf

METHODS = [kf.KFAC(), kf.KFAC(kf.reduce), kf.EKFAC(), kf.Diagonal(), kf.Exact()]
methods = pytest.mark.parametrize("method", METHODS, ids=["kfac", "kfac-reduce", "ekfac", "diagonal", "exact"])


def make(rng, batch=6, shared=5):
    a = rng.normal(size=(batch, shared, 4)) + rng.normal(size=(batch, shared, 1))
    return a, rng.normal(size=(2, batch, shared, 3)) * a[..., :1], rng.normal(size=(3, 4))


def test_a_share_below_zero_is_none(rng):
    a, g = rng.normal(size=(4, 3)), rng.normal(size=(4, 2))
    for n in (0, -1, -0.5, float("nan"), float("inf"), np.int64(-1), np.float32(-1), np.float64("nan"), np.array(-1.0)):
        with pytest.raises(ValueError, match="need the positive share of the loss normaliser"):
            kf.Record(a, g, n)
    assert kf.Record(a, g, np.float32(4)).n == 4


def test_axes_are_filled_in(rng):
    plain = kf.Record(rng.normal(size=(6, 4)), rng.normal(size=(6, 3)), 6.0)
    assert (plain.a.shape, plain.g.shape) == ((1, 6, 1, 4), (1, 1, 6, 1, 3))
    drawn = kf.Record(rng.normal(size=(6, 5, 4)), rng.normal(size=(2, 6, 5, 3)), 6.0)
    assert (drawn.draws, drawn.blocks, drawn.batch, drawn.shared, drawn.d_out, drawn.d_in) == (2, 1, 6, 5, 3, 4)


@methods
def test_masked_positions_equal_dropped_rows(method, xp, rng):
    """One example has two positions fewer; the same data without a mask would need ragged rows."""
    a, g, v = make(rng, 1, 5)
    mask = np.array([[True, False, True, True, False]])
    poisoned = np.where(mask[..., None], a, np.nan)

    @xp.whole
    def direction(v, a, g, mask=None):
        return kf.direction(kf.Record(a, g, 2.0, mask), v, method, 0.1)

    got = direction(xp.put(v), xp.put(poisoned), xp.put(g), xp.put(mask))
    want = direction(xp.put(v), xp.put(a[:, mask[0]]), xp.put(g[:, :, mask[0]]))
    np.testing.assert_allclose(xp.get(got), xp.get(want), rtol=1e-11)


def test_expand_folds_and_reduce_averages(rng):
    a, g, _ = make(rng)
    mask = rng.uniform(size=(6, 5)) < 0.7
    mask[0] = False
    record = kf.Record(a, g, 6.0, mask)
    folded = kf.expand(record)
    assert (folded.batch, folded.shared) == (30, 1)
    assert np.array_equal(folded.mask[:, 0], mask.ravel())
    short = kf.reduce(record)
    for b in range(1, 6):
        np.testing.assert_allclose(short.a[0, b, 0], a[b, mask[b]].mean(0), rtol=1e-13)
        np.testing.assert_allclose(short.g[:, 0, b, 0], g[:, b, mask[b]].sum(1), rtol=1e-12, atol=1e-14)
    assert short.mask[:, 0].tolist() == [False] + [True] * 5


@methods
def test_loss_scale_is_curvature_scale(method, rng):
    """c times the loss: g and the gradient scale by c, F by c^2; with damping c^2 the direction is 1/c of it."""
    a, g, v = make(rng)
    c = 3.0
    want = kf.direction(kf.Record(a, g, 6.0), v, method, 0.1)
    np.testing.assert_allclose(kf.direction(kf.Record(a, c * g, 6.0), c * v, method, 0.1 * c * c), want / c, rtol=1e-11)


@methods
def test_sum_and_mean_differ_by_n(method, rng):
    a, g, v = make(rng)
    want = kf.direction(kf.Record(a, g, 6.0), v, method, 0.1)
    np.testing.assert_allclose(kf.direction(kf.Record(a, g, 1.0), 6 * v, method, 0.6), want, rtol=1e-11)


def test_embedding_equals_one_hot_rows(xp, rng):
    ids, g = rng.integers(0, 7, (6, 5)), rng.normal(size=(2, 6, 5, 3))
    v, mask = rng.normal(size=(3, 7)), rng.uniform(size=(6, 5)) < 0.8
    hot = np.eye(7)[ids]
    for method in (kf.KFAC(), kf.KFAC(inverse=kf.eigh, split=kf.exact), kf.Diagonal(), kf.Exact()):
        for m in (None, mask):

            @xp.whole
            def directions(ids, hot, g, v, mask=None, method=method):
                sparse = kf.Record(kf.Ids(ids, 7), g, 6.0, mask)
                dense = kf.Record(hot, g, 6.0, mask)
                return kf.direction(sparse, v, method, 0.1), kf.direction(dense, v, method, 0.1)

            found = directions(*(xp.put(x) for x in (ids, hot, g, v)), *(() if m is None else (xp.put(m),)))
            got, want = (xp.get(x) for x in found)
            np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


def test_ekfac_of_an_embedding_has_exact_moments(rng):
    ids, g = rng.integers(0, 7, (6, 5)), rng.normal(size=(2, 6, 5, 3))
    record = kf.Record(kf.Ids(ids, 7), g, 6.0)
    state = kf.settle(kf.EKFAC(), record)
    J = kf.Record(np.eye(7)[ids], g, 6.0).examples()[:, 0]
    rotated = np.einsum("op,vboi->vbpi", state.basis.Qg[0], J)
    S, Qg, v = (rotated**2).sum((0, 1)) / 6, state.basis.Qg[0], rng.normal(size=(3, 7))
    np.testing.assert_allclose(state.S[0] / state.S_weight[0], S, rtol=1e-11, atol=1e-13)
    want = Qg @ ((Qg.T @ v) / (S + 0.1))
    np.testing.assert_allclose(kf.direction(record, v, kf.EKFAC(), 0.1), want, rtol=1e-11)


def test_patches_equal_their_rows(xp, rng):
    image, g, v = rng.normal(size=(3, 6, 5, 2)), rng.normal(size=(2, 3, 30, 3)), rng.normal(size=(3, 19))
    window = kf.Window((3, 3), padding=1)
    unfolded = kf.Patches(image, window, bias=True).unfold()[0]
    for method in METHODS:

        @xp.whole
        def directions(image, rows, g, v, method=method):
            folded = kf.Record(kf.Patches(image, window, bias=True), g, 3.0)
            return kf.direction(folded, v, method, 0.1), kf.direction(kf.Record(rows, g, 3.0), v, method, 0.1)

        got, want = (xp.get(x) for x in directions(*(xp.put(x) for x in (image, unfolded, g, v))))
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11)


def test_half_precision_is_widened(rng):
    record = kf.Record(rng.normal(size=(6, 4)).astype(np.float16), rng.normal(size=(6, 3)).astype(np.float16), 6.0)
    assert record.a.dtype == record.g.dtype == np.float32
    assert kf.direction(record, np.ones((3, 4), np.float16)).dtype == np.float32


def test_micro_batches_add_like_ranks(rng):
    """Directions of two ranks with the same inverses combine as sum n_r x_r / sum n_r."""
    a, g, _ = make(rng)
    record = kf.Record(a, g, 6.0)
    state, hyper = kf.settle(kf.KFAC(), record), kf.Hyper(0, 0.0, 0.1)
    parts = [(slice(0, 2), 2.0), (slice(2, 6), 4.0)]
    solved = [n * kf.KFAC().solve(state, kf.Factored(a[s], g[0, s], n), hyper).direction for s, n in parts]
    whole = kf.KFAC().solve(state, kf.Factored(a, g[0], 6.0), hyper).direction
    np.testing.assert_allclose(sum(solved) / 6, whole, rtol=1e-12)
