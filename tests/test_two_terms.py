"""The damped sum of two Kronecker products solved by whitening, definite and not: TWOTERMS-1 to TWOTERMS-5."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import kfaccore as kf
from kfaccore.methods.terms import two_terms
from kfaccore.settle import cycle
from kfaccore.xp.asking import alone
from rows import arrays

TWO = [kf.Deflation(), kf.KFACCorrected(), kf.Lanczos()]
SPLITS = [kf.pi, kf.equal, kf.per_factor, kf.Relative(kf.pi)]
two = pytest.mark.parametrize("method", TWO, ids=lambda m: type(m).__name__)


def symmetric(rng, d, definite):
    x = rng.normal(size=(2, d, d))
    return x @ x.mT if definite else x + x.mT


def pairs(rng, size):
    """(A, G) of a definite first term and of an indefinite second one of relative size `size`."""
    return tuple(tuple(scale * symmetric(rng, d, ok) for d in (4, 3)) for scale, ok in ((1.0, True), (size, False)))


def damped_sum(first, second, split, damping):
    """The two damped factors of the first term, and the sum, block by block."""
    scales = (two_terms.side.Scale.of_factor(x) for x in first)
    d_a, d_g = split.shifts(*scales, damping)
    A, G = (x + d[:, None, None] * np.eye(x.shape[-1]) for x, d in zip(first, (d_a, d_g), strict=True))
    blocks = range(len(A))
    return A, G, np.stack([np.kron(G[b], A[b]) + np.kron(second[1][b], second[0][b]) for b in blocks])


def apart(x, y):
    return np.linalg.norm(x - y) / np.linalg.norm(y)


def small(rng, batch=6):
    """Few examples: mostly indefinite sums."""
    a, g = arrays(rng, 2, batch, 1, 4, 3, 2)
    return kf.Record(a, g * (0.2 + a[..., :1] ** 2), float(batch))


@pytest.mark.parametrize("split", SPLITS, ids=lambda s: type(s).__name__)
def test_whitening_is_the_dense_solve(xp, rng, split):
    """TWOTERMS-1: K_G ((K_G^T V K_A) / (1 + s_G s_A^T)) K_A^T solves the sum, under every split."""
    first, second = pairs(rng, 0.05)
    v, ok = rng.normal(size=(2, 3, 4)), np.zeros(2, np.int32)
    *_, dense = damped_sum(first, second, split, 3.0)
    terms = [tuple(xp.put(x) for x in term) for term in (first, second)]
    parts, code = alone(two_terms.refreshing(*terms, split, 3.0))
    direction, solved, smallest = two_terms.solve(parts, xp.put(v), kf.absolute, xp.put(ok))
    want = np.stack([np.linalg.solve(m, x.ravel()).reshape(3, 4) for m, x in zip(dense, v, strict=True)])
    assert apart(xp.get(direction), want) < 1e-12
    assert xp.get(code).tolist() == xp.get(solved).tolist() == [0, 0]
    assert (xp.get(smallest) > 0).all()


def test_the_smallest_denominator_and_both_answers(rng):
    """TWOTERMS-2: indefinite in one block: code, the smallest generalised eigenvalue, and what stands for the
    denominators."""
    first, second = pairs(rng, 1.0)
    second = second[0], second[1] * np.array([1e-3, 3.0])[:, None, None]
    v, ok = rng.normal(size=(2, 3, 4)), np.zeros(2, np.int32)
    A, G, dense = damped_sum(first, second, kf.pi, 0.1)
    parts, _ = alone(two_terms.refreshing(first, second, kf.pi, 0.1))
    plain = np.stack([np.kron(g, a) for g, a in zip(G, A, strict=True)])
    spectra = []
    for block in range(2):
        half = np.linalg.inv(np.linalg.cholesky(plain[block]))
        spectra.append(np.linalg.eigvalsh(half @ dense[block] @ half.T))
    assert spectra[0][0] > 0 > spectra[1][0]
    found = {h: two_terms.solve(parts, v, h, ok) for h in (kf.absolute, kf.first_term)}
    for direction, code, smallest in found.values():
        assert code.tolist() == [kf.Code.OK, kf.Code.INDEFINITE]
        np.testing.assert_allclose(smallest, [s[0] for s in spectra], rtol=1e-10)
        assert apart(direction[0].ravel(), np.linalg.solve(dense[0], v[0].ravel())) < 1e-11
    assert apart(found[kf.first_term][0][1], np.linalg.solve(G[1], v[1]) @ np.linalg.inv(A[1])) < 1e-12
    Kg, Ka, ratios = parts.Kg[1], parts.Ka[1], parts.g[1][:, None] * parts.a[1]
    want = Kg @ ((Kg.T @ v[1] @ Ka) / (1 + np.abs(ratios))) @ Ka.T
    assert apart(found[kf.absolute][0][1], want) < 1e-12


@two
def test_methods_solve_their_own_sum(rng, method):
    """TWOTERMS-1: at each method's terms: the direction is that of (G1 + d_g) (x) (A1 + d_a) + G2 (x) A2 where it is
    definite."""
    record, v = small(rng, batch=40), rng.normal(size=(2, 3, 4))
    state = kf.settle(method, record, damping=20.0)
    state = method.refresh(state, kf.Hyper(0, 0.0, 20.0))
    first, second = method.pairs(state)
    *_, dense = damped_sum(first, second, kf.pi, 20.0)
    solution = method.solve(state, v, kf.Hyper(0, 0.0, 20.0))
    assert solution.code.tolist() == [kf.Code.OK] * 2
    want = np.stack([np.linalg.solve(m, x.ravel()).reshape(3, 4) for m, x in zip(dense, v, strict=True)])
    assert apart(solution.direction, want) < 1e-11


@two
def test_indefinite_sums_are_reported_and_still_descend(rng, method):
    """TWOTERMS-2: few examples and little damping: INDEFINITE with a denominator under zero, and a direction that
    descends."""
    record, v, hyper = small(rng), rng.normal(size=(2, 3, 4)), kf.Hyper(0, 0.0, 1e-4)
    for handler in (kf.absolute, kf.first_term):
        chosen = replace(method, indefinite=handler)
        solution = chosen.solve(kf.settle(chosen, record, damping=1e-4), v, hyper)
        negative = solution.info["smallest"] < 0
        assert negative[0]
        assert solution.code.tolist() == [kf.Code.INDEFINITE if x else kf.Code.OK for x in negative]
        assert (np.sum(solution.direction * v, axis=(1, 2)) > 0).all()


def test_first_term_of_the_corrected_is_kfac(rng):
    """TWOTERMS-2: KFAC-CORRECTED that falls back to its first term is K-FAC."""
    record, v = small(rng), rng.normal(size=(2, 3, 4))
    got = kf.direction(record, v, kf.KFACCorrected(indefinite=kf.first_term), 1e-4)
    assert apart(got, kf.direction(record, v, kf.KFAC(), 1e-4)) < 1e-10


@two
def test_splits_that_shift_no_factor_are_refused(method):
    with pytest.raises(ValueError, match="two terms need"):
        replace(method, split=kf.exact)


@two
def test_order_of_examples_does_not_matter(rng, method):
    """TWOTERMS-3: a permuted batch has the same direction."""
    record, v = small(rng, 12), rng.normal(size=(2, 3, 4))
    order = rng.permutation(12)
    turned = kf.Record(record.a[:, order], record.g[:, :, order], record.n)
    assert apart(kf.direction(turned, v, method, 1.0), kf.direction(record, v, method, 1.0)) < 1e-9


@pytest.mark.parametrize("method", [*TWO, kf.KPSVD(), kf.TKFAC(), kf.TEKFAC()], ids=lambda m: type(m).__name__)
def test_float32_at_condition_1e6(rng, method):
    """TWOTERMS-4: damping at 1e-3 of the mean eigenvalue: float32 keeps three digits of the direction and the code."""
    a = np.linalg.qr(rng.normal(size=(60, 6)))[0] * np.logspace(0, -3, 6) * 60**0.5
    g = np.linalg.qr(rng.normal(size=(60, 4)))[0] * 60**0.5 * (1 + 0.1 * a[:, :1])
    v = rng.normal(size=(4, 6))
    found, codes = [], []
    for dtype in (np.float64, np.float32):
        record = kf.Record(a.astype(dtype), g.astype(dtype), 60.0)
        damping = 1e-3 * float(np.mean((g**2).sum(1) * (a**2).sum(1))) / 24
        state = kf.settle(method, record, damping=damping)
        solution = method.solve(state, v.astype(dtype), kf.Hyper(0, 0.0, damping))
        found.append(solution.direction)
        codes.append(int(solution.code[0]))
    assert apart(found[1], found[0]) < 1e-3
    assert codes[0] == codes[1]


@pytest.mark.parametrize("method", [*TWO, kf.KPSVD()], ids=lambda m: type(m).__name__)
def test_zeros_give_no_nan(rng, method):
    """TWOTERMS-5: a zero gradient gives zeros; gradients that all vanish leave the damping, and what comes after is as
    new."""
    record, v = small(rng), rng.normal(size=(2, 3, 4))
    assert not kf.direction(record, np.zeros((2, 3, 4)), method, 0.1).any()
    hyper, none = kf.Hyper(0, 0.0, 0.5), kf.Record(record.a, np.zeros_like(record.g), record.n)
    state = method.init(kf.Block.of(record), record.g)
    for _ in range(3):
        state = cycle(method, state, none, hyper)
    solution = method.solve(state, v, hyper)
    assert solution.code.tolist() == [kf.Code.OK] * 2
    assert np.isfinite(solution.direction).all()
    for _ in range(120):
        state = cycle(method, state, record, hyper)
    assert apart(method.matvec(state, v, hyper), method.matvec(kf.settle(method, record, 120), v, hyper)) < 1e-7


@pytest.mark.parametrize("method", [*TWO, kf.KPSVD()], ids=lambda m: type(m).__name__)
def test_gradients_near_underflow_pass(rng, method):
    """TWOTERMS-5: float32 gradients whose squares are no normal numbers: finite directions, and larger ones come
    through."""
    record, v, hyper = small(rng), rng.normal(size=(2, 3, 4)).astype(np.float32), kf.Hyper(0, 0.0, 0.5)
    a, g = (x.astype(np.float32) for x in (record.a, record.g))
    state = method.init(kf.Block.of(record), a)
    for scale in [1e-20] * 3 + [1.0] * 120:
        state = cycle(method, state, kf.Record(a, (scale * g).astype(np.float32), record.n), hyper)
        assert np.isfinite(method.solve(state, v, hyper).direction).all()
    want = method.matvec(kf.settle(method, kf.Record(a, g, record.n), 120), v, hyper)
    assert apart(method.matvec(state, v, hyper), want) < 1e-3


@pytest.mark.parametrize("d_in", [4, 1])
@pytest.mark.parametrize("d_out", [1, 3])
def test_a_second_pair_is_not_made_of_rounding(rng, d_in, d_out):
    """Averaged over batches, the order of rows changes nothing; one output, or one input, is KPSVD's."""
    given = [(rng.normal(size=(8, d_in)), rng.normal(size=(2, 8, d_out))) for _ in range(6)]
    v, turned = rng.normal(size=(d_out, d_in)), rng.permutation(8)

    def run(method, rows):
        pre = kf.Preconditioner(method, kf.Clocks(1, 1), kf.Schedules(0.1, 0.8))
        state = pre.init({"x": kf.Block(d_out, d_in)}, v)
        found = []
        for a, g in given:
            moves, state, _ = pre.step(state, {"x": kf.Record(a[rows], g[:, rows], 8.0)}, {"x": v})
            found.append(moves["x"])
        return np.array(found)

    for method in TWO:
        np.testing.assert_allclose(run(method, turned), run(method, slice(None)), rtol=1e-6, atol=1e-9)
    if 1 in (d_in, d_out):
        np.testing.assert_allclose(run(kf.Deflation(), turned), run(kf.KPSVD(), slice(None)), rtol=1e-10)


@pytest.mark.parametrize("size", [1e-15, 1e15])
@pytest.mark.parametrize("method", [kf.KPSVD(), *TWO], ids=lambda m: type(m).__name__)
def test_a_small_or_large_loss_in_float32_keeps_its_second_term(rng, method, size):
    """F and damping times s^2 give the direction over s^2, where squares of F leave the range of float32."""
    a, g, V = (rng.normal(size=shape).astype(np.float32) for shape in ((8, 5), (2, 8, 4), (4, 5)))
    want = kf.direction(kf.Record(a, g, 8.0), V, method, 0.01)
    one = kf.direction(kf.Record(a, g, 8.0), V, kf.KPSVD(), 0.01)
    assert isinstance(method, kf.KPSVD) or np.abs(one - want).max() > 0.05 * np.abs(want).max()
    got = kf.direction(kf.Record(a, np.float32(size) * g, 8.0), V, method, 0.01 * size**2)
    np.testing.assert_allclose(got * size**2, want, rtol=0, atol=2e-3 * np.abs(want).max())
