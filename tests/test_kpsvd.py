"""KPSVD, Deflation, Lanczos and KFAC-CORRECTED against the singular decomposition of the rearranged block."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import kfaccore as kf
from kfaccore.methods.terms import bidiagonal, rearranged, sandwich
from kfaccore.settle import cycle
from oracle import matrix
from oracle import rearranged as rearrange
from rows import arrays

HYPER = kf.Hyper(0, 0.0, 0.1)


def reference():
    """The record of the stated magnitudes: a of 7, g of 5, 64 examples, both functions of four normals."""
    rng = np.random.default_rng(0)
    z, Wa, Wg = rng.normal(size=(64, 4)), rng.normal(size=(4, 6)), rng.normal(size=(4, 5))
    return kf.Record(np.c_[np.tanh(z @ Wa), np.ones(64)], (z @ Wg) * (0.3 + np.abs(z[:, :1])), 64.0)


def many(rng, blocks, batch=14, shared=1):
    """Dependent a and g; 4 x 3 weights a block."""
    a, g = arrays(rng, blocks, batch, shared, 4, 3, 2)
    return kf.Record(a, g * (0.2 + a[..., :1] ** 2), float(batch))


def iterated(method, record, cycles):
    """State after `cycles` updates without memory and without refreshes, which the iteration does not need."""
    state = method.init(kf.Block.of(record), record.g)
    for _ in range(cycles):
        state = method.update(state, method.measure(state, record, HYPER), HYPER)
    return state


def fitted(method, record, cycles=None):
    state = kf.settle(method, record) if cycles is None else iterated(method, record, cycles)
    return matrix(method, state, HYPER, (record.blocks, record.d_out, record.d_in))


def errors(method, record, cycles=None):
    """Relative Frobenius error of each block."""
    F = kf.dense(record)
    return np.linalg.norm(fitted(method, record, cycles) - F, axis=(1, 2)) / np.linalg.norm(F, axis=(1, 2))


def apart(x, y):
    return np.linalg.norm(x - y) / np.linalg.norm(y)


def singular(record):
    """Singular decomposition of Z, first block."""
    return np.linalg.svd(rearrange(kf.dense(record)[0], record.d_out, record.d_in))


MAGNITUDES = [
    (kf.KFAC(), 0.570),
    (kf.EKFAC(), 0.465),
    (kf.TKFAC(), 0.334),
    (kf.TEKFAC(), 0.260),
    (kf.KPSVD(), 0.248),
    (kf.KFACCorrected(), 0.215),
    (kf.Deflation(), 0.182),
    (kf.Lanczos(), 0.182),
]


@pytest.mark.parametrize(("method", "error"), MAGNITUDES, ids=lambda x: type(x).__name__)
def test_reference_magnitudes(method, error):
    assert errors(method, reference())[0] == pytest.approx(error, abs=1e-3)


def test_orderings_on_200_random_records(rng):
    """KPSVD-11: KPSVD <= TKFAC, KFAC; EKFAC, KFACCorrected <= KFAC; TEKFAC <= TKFAC; Deflation = Lanczos <= KPSVD.

    Undamped, without averages, iterated to convergence; the 200 records are the blocks of one."""
    record = many(rng, 200)
    found = {m: errors(m(), record) for m in (kf.KFAC, kf.EKFAC, kf.TKFAC, kf.TEKFAC, kf.Lanczos)}
    iterative = (kf.KPSVD, kf.KFACCorrected, kf.Deflation)
    found |= {m: errors(m(), record, 200) for m in iterative}
    slack = 1 + 1e-8
    assert (found[kf.KPSVD] <= found[kf.TKFAC] * slack).all()
    assert (found[kf.KPSVD] <= found[kf.KFAC] * slack).all()
    assert (found[kf.EKFAC] <= found[kf.KFAC] * slack).all()
    assert (found[kf.TEKFAC] <= found[kf.TKFAC] * slack).all()
    assert (found[kf.KFACCorrected] <= found[kf.KFAC] * slack).all()
    assert (found[kf.Lanczos] <= found[kf.KPSVD] * slack).all()
    np.testing.assert_allclose(found[kf.Deflation], found[kf.Lanczos], rtol=1e-6)


@pytest.mark.parametrize("shared", [1, 3])
@pytest.mark.parametrize("chunk", [1 << 22, 60])
@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("way", [sandwich._by_rows, sandwich._formed])
def test_products_of_the_rearranged_block(rng, monkeypatch, shared, chunk, way, once):
    """KPSVD-1: Z vec(V) and Z^T vec(U) from rows, in one piece and in chunks, both ways of doing it, and from J."""
    monkeypatch.setattr("kfaccore.xp.chunks.HELD", chunk)
    monkeypatch.setattr(sandwich, "_pays", lambda x, y: once)
    monkeypatch.setattr(sandwich, "_by_rows", way)
    monkeypatch.setattr(sandwich, "_formed", way)
    record = many(rng, 2, shared=shared)
    V, U = (rng.normal(size=(2, d, 2 * d)) for d in (4, 3))
    definite = [x @ x.mT for x in (U, V)]
    indefinite = [x - np.eye(x.shape[-1]) * np.trace(x, axis1=1, axis2=2)[:, None, None] / 3 for x in definite]
    for (left, right), positive in ((definite, True), (definite, False), (indefinite, False)):
        sums = rearranged.sweep(record, left, right, positive)
        for block in range(2):
            Z = rearrange(kf.dense(record)[block] * record.n, 3, 4)
            assert apart(sums.G[block].ravel(), Z @ right[block].ravel()) < 1e-13
            assert apart(sums.A[block].ravel(), Z.T @ left[block].ravel()) < 1e-13


def test_j_is_made_once_where_it_is_less_to_hold_than_the_rows():
    wide, narrow = (np.ones((1, 1, 5, shared, d)) for shared, d in ((400, 8), (2, 8)))
    assert sandwich._pays(wide, np.ones((2, 1, 5, 400, 6)))
    assert not sandwich._pays(narrow, np.ones((2, 1, 5, 2, 6)))
    assert not sandwich._pays(np.ones((1, 1, 5, 20, 60)), np.ones((1, 1, 5, 20, 60)))


def test_rearranging_a_kronecker_product_is_an_isometry(rng):
    """KPSVD-2: Z(G (x) A) = vec G vec A^T and |F - G (x) A| = |Z - vec G vec A^T|."""
    G, A = rng.normal(size=(3, 3)), rng.normal(size=(4, 4))
    assert np.array_equal(rearrange(np.kron(G, A), 3, 4), np.outer(G.ravel(), A.ravel()))
    F = kf.dense(many(rng, 1))[0]
    assert np.linalg.norm(F - np.kron(G, A)) == pytest.approx(
        np.linalg.norm(rearrange(F, 3, 4) - np.outer(G.ravel(), A.ravel())), rel=1e-14
    )


def test_squared_error_is_the_tail_of_singular_values(rng):
    """KPSVD-3: squared error = sum of the squared singular values left out; monotone in the number of terms."""
    record = many(rng, 1)
    values = singular(record)[1]
    total = (values**2).sum()
    assert errors(kf.KPSVD(), record, 300)[0] ** 2 * total == pytest.approx((values[1:] ** 2).sum(), rel=1e-11)
    for method, cycles in ((kf.Deflation(), 300), (kf.Lanczos(), None)):
        assert errors(method, record, cycles)[0] ** 2 * total == pytest.approx((values[2:] ** 2).sum(), rel=1e-11)


def test_power_iteration_and_lanczos_are_the_svd(rng):
    """KPSVD-4: KPSVD is sigma_1 U_1 (x) V_1; Lanczos and Deflation add the second term."""
    record = many(rng, 1)
    left, values, right = singular(record)
    terms = [v * np.kron(u.reshape(3, 3), w.reshape(4, 4)) for u, v, w in zip(left.T, values, right, strict=False)]
    assert apart(fitted(kf.KPSVD(), record, 300)[0], terms[0]) < 1e-11
    assert apart(fitted(kf.Lanczos(), record)[0], terms[0] + terms[1]) < 1e-10
    assert apart(fitted(kf.Deflation(), record, 300)[0], terms[0] + terms[1]) < 1e-10


def test_two_terms_are_exact_at_rank_two(rng):
    """KPSVD-5: F a sum of two Kronecker products: two terms are it, one is not."""
    groups = [(rng.normal(size=(5, 4)), rng.normal(size=(6, 3)) * scale) for scale in (1.0, 0.5)]
    a, g = (
        np.concatenate(rows)
        for rows in zip(*[(np.repeat(a, 6, 0), np.tile(g, (5, 1))) for a, g in groups], strict=True)
    )
    record = kf.Record(a, g, 60.0)
    assert errors(kf.KPSVD(), record, 200)[0] > 0.05
    assert errors(kf.Deflation(), record, 200)[0] < 1e-12
    assert errors(kf.Lanczos(), record)[0] < 1e-12


def test_pairs_of_antisymmetric_matrices_are_not_looked_for():
    """KPSVD-3: J = 2 I and J = K, a quarter turn, have Z with the singular values 5 of (I, I), 5 of (K, K) and 3
    twice of symmetric pairs. Sums of products J V J^T, V symmetric, never meet the second."""
    turn = np.array([[0.0, -1.0], [1.0, 0.0]])
    rows = np.broadcast_to(np.eye(2), (2, 2, 2))
    record = kf.Record(rows, np.stack([2 * np.eye(2), turn.T]), 1.0)
    np.testing.assert_allclose(singular(record)[1], [5, 5, 3, 3], rtol=1e-12)
    total = 25 + 25 + 9 + 9
    assert errors(kf.KPSVD(), record, 5)[0] ** 2 * total == pytest.approx(25 + 9 + 9, rel=1e-11)
    for method, cycles in ((kf.Deflation(), 100), (kf.Lanczos(), None)):
        assert errors(method, record, cycles)[0] ** 2 * total == pytest.approx(25 + 9, rel=1e-9)


def test_a_correction_takes_off_the_first_singular_value_of_the_rest(rng):
    """KPSVD-6: squared error = K-FAC's less the largest squared singular value of what K-FAC leaves; never under rank
    2."""
    record = many(rng, 1)
    F, K = kf.dense(record)[0], fitted(kf.KFAC(), record)[0]
    left = np.linalg.svd(rearrange(F - K, 3, 4))[1]
    want = np.linalg.norm(F - K) ** 2 - left[0] ** 2
    got = np.linalg.norm(F - fitted(kf.KFACCorrected(), record, 300)[0]) ** 2
    assert got == pytest.approx(want, rel=1e-11)
    assert got >= (singular(record)[1][2:] ** 2).sum()


def test_the_residual_is_orthogonal_to_the_term(rng):
    """KPSVD-7: <F - K, K> = 0 for KPSVD, not for K-FAC."""
    record = many(rng, 1)
    F = kf.dense(record)[0]
    for method, cycles, right in ((kf.KPSVD(), 300, True), (kf.KFAC(), None, False)):
        K = fitted(method, record, cycles)[0]
        cosine = np.sum((F - K) * K) / np.linalg.norm(F - K) / np.linalg.norm(K)
        assert (abs(cosine) < 1e-11) == right


def test_the_first_sweep_is_tkfac_and_every_one_is_definite(rng):
    """KPSVD-8: one power iteration from identities is TKFAC's block; A and G stay positive."""
    record = many(rng, 1)
    assert apart(fitted(kf.KPSVD(), record, 1), fitted(kf.TKFAC(), record)) < 1e-13
    for cycles in (1, 2, 5, 50):
        state = iterated(kf.KPSVD(), record, cycles)
        assert min(np.linalg.eigvalsh(x).min() for x in (state.A[0], state.G[0])) > 0


@pytest.mark.parametrize("method", [kf.KPSVD(), kf.Deflation(), kf.KFACCorrected(), kf.Lanczos()])
def test_folded_patches_and_masks_are_unfolded_rows(rng, monkeypatch, method):
    """KPSVD-9: patches stay folded until a chunk is needed; J sums over positions that exist."""
    monkeypatch.setattr("kfaccore.xp.chunks.HELD", 36 * 13 * 2)
    patches = kf.Patches(rng.normal(size=(6, 5, 5, 3)), kf.Window((2, 2), padding=1), bias=True)
    g, v = rng.normal(size=(2, 1, 6, 36, 4)), rng.normal(size=(1, 4, 13))
    mask = rng.uniform(size=(6, 36)) < 0.7
    for keep in (None, mask):
        folded, plain = (kf.Record(a, g, 6.0, keep) for a in (patches, patches.unfold()))
        assert apart(kf.direction(folded, v, method, 0.1), kf.direction(plain, v, method, 0.1)) < 1e-9
        if isinstance(method, kf.Lanczos):
            values = singular(plain)[1]
            assert errors(method, folded)[0] ** 2 == pytest.approx(1 - (values[:2] ** 2).sum() / (values**2).sum())
    zeroed = kf.Record(patches.unfold() * mask[None, ..., None], g * mask[None, None, ..., None], 6.0)
    if not isinstance(method, kf.KFACCorrected):  # whose mean of a a^T counts the positions
        assert apart(fitted(method, zeroed), fitted(method, folded)) < 1e-9


def test_the_same_record_again_changes_nothing_with_memory(rng):
    """Averages over updates converge to what no memory gives: nothing of a pair cancels between its updates."""
    record, hyper = many(rng, 2), kf.Hyper(0, 0.7, 0.1)
    for method in (kf.KPSVD(), kf.Deflation(), kf.KFACCorrected(), kf.Lanczos()):
        state = method.init(kf.Block.of(record), record.g)
        for _ in range(400):
            state = method.update(state, method.measure(state, record, hyper), hyper)
        want = fitted(method, record, 1 if isinstance(method, kf.Lanczos) else 400)
        assert apart(matrix(method, state, hyper, (2, 3, 4)), want) < 1e-9


@pytest.mark.parametrize("method", [kf.Deflation(), kf.KFACCorrected()])
def test_signs_are_aligned_before_averaging(rng, method):
    """(U, V) and (-U, -V) are one term: from either, the average comes back to the same, never through zero."""
    record, hyper = many(rng, 2), kf.Hyper(0, 0.9, 0.1)
    state = iterated(method, record, 300)
    pair = state.pair
    found = []
    for sign in (1.0, -1.0):
        turned = rearranged.Pair(sign * pair.G, sign * pair.A, sign * pair.U, sign * pair.V)
        after = replace(state, pair=turned)
        for _ in range(3):
            after = method.update(after, method.measure(after, record, hyper), hyper)
            size = np.linalg.norm(after.pair.G, axis=(1, 2)) / after.weight
            np.testing.assert_allclose(size, np.linalg.norm(pair.G, axis=(1, 2)), rtol=1e-8)
        found.append(matrix(method, after, hyper, (2, 3, 4)))
    assert apart(found[0], found[1]) < 1e-12


def test_signs_of_lanczos_follow_its_averages(rng):
    record, hyper, method = many(rng, 2), kf.Hyper(0, 0.5, 0.1), kf.Lanczos()
    state = iterated(method, record, 1)
    turned = replace(state, A=state.A * np.array([1.0, -1.0])[:, None, None], G=state.G * [[[1.0]], [[-1.0]]])
    after = method.update(turned, method.measure(turned, record, hyper), hyper)
    assert apart(after.A[:, 1], turned.A[:, 1]) < 1e-8
    assert apart(matrix(method, after, hyper, (2, 3, 4)), matrix(method, state, hyper, (2, 3, 4))) < 1e-8
    assert (np.trace(state.A[:, 0], axis1=1, axis2=2) > 0).all()


def triples(Z, **options):
    """`leading` on a dense matrix, and how many products it took."""
    count = [0, 0]

    def product(way, x):
        def apply(v):
            count[way] += 1
            return v @ x

        return apply

    numbers = {"rank": 2, "steps": 8, "tolerance": 1e-12, "limit": 100} | options
    start = np.zeros((1, Z.shape[0])), np.ones((1, Z.shape[1]))
    return bidiagonal.leading(product(0, Z.T), product(1, Z), start, *numbers.values()), count


def test_golub_kahan_counts_its_products(rng):
    """On 30 slowly falling singular values, where the Krylov dimension of two that was published loses the second."""
    values = 0.9 ** np.arange(30)
    U, W = (np.linalg.qr(rng.normal(size=(40, 30)))[0] for _ in range(2))
    Z = (U * values) @ W.T
    found, count = triples(Z)
    assert count[0] == count[1]
    assert sum(count) == int(found.matvecs) <= 2 * 8 * 12
    np.testing.assert_allclose(found.values[0], values[:2], rtol=1e-12)
    assert float(found.residual[0]) < 1e-12
    assert np.abs(np.abs(found.left[0] @ U[:, :2]) - np.eye(2)).max() < 1e-10
    assert np.abs(np.abs(found.right[0] @ W[:, :2]) - np.eye(2)).max() < 1e-10
    short, _ = triples(Z, limit=1)
    assert float(short.residual[0]) > 1e-3
    with pytest.raises(ValueError, match="krylov is 2; need at least 8"):
        kf.Lanczos(krylov=2)


def test_golub_kahan_of_little_rank(rng):
    """Fewer triples than asked for, and none: zeros, never NaN."""
    for rank in (0, 1):
        Z = rng.normal(size=(9, rank)) @ rng.normal(size=(rank, 7))
        found, _ = triples(Z)
        np.testing.assert_allclose(found.values[0], np.linalg.svd(Z)[1][:2], atol=1e-13)
        assert np.isfinite(found.left).all()
        assert np.isfinite(found.right).all()


def test_lanczos_reports_what_it_took(rng):
    record, v = reference(), rng.normal(size=(5, 7))
    for method, code in ((kf.Lanczos(), kf.Code.OK), (kf.Lanczos(restarts=1), kf.Code.UNCONVERGED)):
        state = cycle(method, method.init(kf.Block.of(record), record.g), record, HYPER)
        solution = method.solve(state, v, HYPER)
        assert solution.code.tolist() == [code]
        taken = int(solution.info["matvecs"][0])
        assert taken == 16 if method.restarts == 1 else 16 < taken <= 96


@pytest.mark.parametrize("method", [kf.KPSVD(), kf.Deflation(), kf.KFACCorrected(), kf.Lanczos()])
def test_what_is_refused(rng, method):
    with pytest.raises(ValueError, match="embedding"):
        kf.settle(method, kf.Record(kf.Ids(rng.integers(0, 6, (8,)), 6), rng.normal(size=(8, 4)), 8.0))
    with pytest.raises(ValueError, match="zero draws"):
        kf.settle(method, kf.Record(rng.normal(size=(4, 3)), np.zeros((0, 4, 2)), 4.0))
