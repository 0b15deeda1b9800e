"""Brand K-FAC: updates of modes against dense averages, float64: BRAND-1 to BRAND-10."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

import kfaccore as kf
from kfaccore import tree
from kfaccore.methods.lowrank import brand_update as brand
from kfaccore.methods.lowrank import lowrank
from kfaccore.methods.lowrank.brand_c import Correction
from kfaccore.methods.lowrank.lowrank import LowRank, Rank, nothing
from kfaccore.settle import cycle
from test_catalogue import kronecker, same

KINDS = pytest.mark.parametrize("kind", [kf.BrandKFAC, kf.BrandRKFAC, kf.BrandCKFAC])
HYPER = kf.Hyper(0, 0.95, 0.1)
D, N, R = 60, 8, 20


def batch(rng, d=D, n=N, d_out=3):
    """Rows with a decaying spectrum in a fixed basis."""
    basis = np.linalg.qr(np.random.default_rng(1).normal(size=(d, d)))[0]
    return kf.Record(rng.normal(size=(n, d)) * 0.9 ** np.arange(d) @ basis, rng.normal(size=(n, d_out)), float(n))


def run(method, rng, updates, rows=0, refresh=(), d=D, n=N):
    """(state, A) after updates on fresh batches; A is the dense average times its weight."""
    state, A = method.init(kf.Block(3, d, rows=rows), np.zeros(1)), np.zeros((d, d))
    for k in range(updates):
        record = batch(rng, d, n)
        state = method.update(state, method.measure(state, record, HYPER), HYPER)
        A = 0.95 * A + 0.05 * kronecker(record)[0]
        if k in refresh:
            state = method.refresh(state, HYPER)
    return state, A


def matrix(side: LowRank) -> np.ndarray:
    return (side.U[0] * side.D[0]) @ side.U[0].T


def test_uncut_updates_are_the_dense_average(rng):
    """BRAND-1: six updates of 8 rows at rank 48: the whole average, its eigenvalues, and orthonormal modes."""
    state, A = run(kf.BrandKFAC(rank=Rank(48, 48)), rng, 6)
    assert same(matrix(state.A), A, 1e-13)
    assert same(state.A.D[0], np.linalg.eigvalsh(A)[-48:], 1e-12)
    assert same(state.A.U[0].T @ state.A.U[0], np.eye(48), 1e-13)
    assert state.A.trace[0] == pytest.approx(np.trace(A), rel=1e-13)
    assert state.code.tolist() == [kf.Code.OK]


@pytest.mark.parametrize("rows", [0, N])
def test_cut_updates_stay_under_the_average(rows, rng):
    """BRAND-2: A - U D U^T is positive semi-definite, the inverse errs upwards outside, and no error beats the best
    modes'."""
    state, A = run(kf.BrandKFAC(rank=Rank(R, R)), rng, 12, rows)
    held = R + rows
    assert state.A.U.shape == (1, D, held)
    miss = A - matrix(state.A)
    assert np.linalg.eigvalsh(miss)[0] > -1e-13
    values = np.linalg.eigvalsh(A)
    best = np.linalg.norm(values[: D - held])
    assert np.linalg.norm(miss) >= best * (1 - 1e-10)
    assert best < np.linalg.norm(miss) < 8 * best
    assert np.linalg.norm(miss) < 0.1 * np.linalg.norm(A)
    over = np.linalg.inv(matrix(state.A) + 0.1 * np.eye(D)) - np.linalg.inv(A + 0.1 * np.eye(D))
    assert np.linalg.eigvalsh(over)[0] > -1e-12
    assert same(state.A.U[0].T @ state.A.U[0], np.eye(held), 1e-13)


def test_held_rows_help(rng):
    """BRAND-3: holding rank + rows modes until the next update is closer than cutting at once."""
    errors = []
    for rows in (0, N):
        state, A = run(kf.BrandKFAC(rank=Rank(R, R)), np.random.default_rng(3), 12, rows)
        errors.append(np.linalg.norm(A - matrix(state.A)))
    assert errors[1] < 0.9 * errors[0]


def awkward(rng, U):
    """Rows that leave QR of X - X U U^T alone far from orthogonal."""
    inside = rng.normal(size=(N, U.shape[1])) @ U.T
    fresh = rng.normal(size=(N, D))
    return {
        "zero padded": np.concatenate([fresh[:3], np.zeros((5, D))]),
        "all zero": np.zeros((N, D)),
        "duplicates": np.concatenate([fresh[:4], fresh[:4]]),
        "inside the span": inside,
        "nearly inside": inside + 1e-9 * fresh,
        "mixed": np.concatenate([inside[:3], fresh[:2], fresh[:2], np.zeros((1, D))]),
    }


@pytest.mark.parametrize("case", ["zero padded", "all zero", "duplicates", "inside the span", "nearly inside", "mixed"])
def test_modes_stay_orthonormal_for_awkward_rows(case, xp, rng):
    """BRAND-4: U^T U, U D U^T and the damped inverse applied; QR of the projected rows alone is shown to fail on U^T
    U."""
    start = run(kf.BrandKFAC(rank=Rank(R, R)), rng, 5)[0].A
    x, rows = rng.normal(size=(1, 4, D)), awkward(rng, start.U[0])[case]
    want = 0.95 * matrix(start) + 0.05 * rows.T @ rows
    there = tree.map(xp.put, replace(start, rank=np.array([R], np.int32)))
    keep, add = xp.put(np.array([0.95])), xp.put(np.array([0.05]))
    wide = tree.map(xp.put, lowrank.start(1, D, R + N, Rank(R, R), x))
    U, values = np.concatenate([_complement(start.U), start.U], -1), np.pad(start.D, ((0, 0), (N, 0)))
    wide = replace(wide, U=xp.put(U), D=xp.put(values))
    for low, held in ((there, R), (wide, R + N)):
        new = brand.moved(low, xp.put(rows[None]), keep, add, Rank(R, R), nothing)
        U, values = xp.get(new.U)[0], xp.get(new.D)[0]
        assert np.abs(U.T @ U - np.diag(values > 0)).max() < 1e-13  # those of eigenvalue 0 are zero
        best = np.linalg.eigh(want)
        cut = (best[1][:, -held:] * best[0][-held:]) @ best[1][:, -held:].T
        assert same((U * values) @ U.T, cut, 1e-11)
        inverse, _ = lowrank.inverse(new, xp.put(np.array([1e-3])), xp.put(np.zeros(1, bool)))
        exact = x @ np.linalg.inv(cut + 1e-3 * np.eye(D))
        assert same(xp.get(lowrank.times(xp.put(x), inverse)), exact, 1e-8)


def _complement(U):
    """N orthonormal columns outside span(U)."""
    full = np.linalg.qr(np.concatenate([U, np.random.default_rng(4).normal(size=(1, D, N))], -1))[0]
    return full[:, :, -N:]


@pytest.mark.parametrize("case", ["duplicates", "inside the span", "zero padded"])
def test_the_projected_rows_alone_fail(case, rng):
    """BRAND-4: the published two-step form: U D U^T stays right, but U is not orthonormal, and one update later nor are
    the damped inverse and the eigenvalues."""
    start = run(kf.BrandKFAC(rank=Rank(R, R)), rng, 5)[0].A
    U, D_, M = start.U[0], start.D[0], matrix(start)
    for X in (awkward(rng, U)[case].T, rng.normal(size=(D, N))):
        C = U.T @ X
        Q, S = np.linalg.qr(X - U @ C)
        middle = np.block([[np.diag(D_) + C @ C.T, C @ S.T], [S @ C.T, S @ S.T]])
        D_, vectors = np.linalg.eigh(middle)
        U, M = np.concatenate([U, Q], 1) @ vectors, M + X @ X.T
        assert same((U * D_) @ U.T, M, 1e-10)
        assert np.abs(U.T @ U - np.eye(len(D_))).max() > 1e-3
    factor = LowRank(U[None], D_[None], np.zeros(1), np.zeros(1), np.full(1, len(D_), np.int32))
    inverse, _ = lowrank.inverse(factor, np.array([1e-3]), np.zeros(1, bool))
    x = rng.normal(size=(1, 4, D))
    assert not same(lowrank.times(x, inverse), x @ np.linalg.inv(M + 1e-3 * np.eye(D)), 1e-2)
    assert not same(D_, np.linalg.eigvalsh(M)[-len(D_) :], 1e-3)


@pytest.mark.parametrize("sketch", [kf.Symmetric, kf.Singular])
def test_an_overwrite_has_the_error_of_the_sketch(sketch, rng):
    """BRAND-5: after a refresh U D U^T is the sketch of the dense average, closer than before."""
    rule = sketch(oversample=4)
    method = kf.BrandRKFAC(rank=Rank(R, R), sketch=rule)
    state, A = run(method, rng, 12)
    before = np.linalg.norm(A - matrix(state.A))
    state = method.refresh(state, HYPER)
    after = np.linalg.norm(A - matrix(state.A))
    U, values, _ = rule.modes(A[None], rule.draw(1, D, R, 0, A), R)
    assert same(matrix(state.A), (U[0] * values[0]) @ U[0].T, 1e-11)
    assert after < before
    assert same(state.full_A[0], A)


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_a_correction_never_increases_the_error(share, rng):
    """BRAND-6: |A - U D U^T| never rises and span(U) stays under corrections of a share of the modes."""
    method = kf.BrandCKFAC(rank=Rank(R, R), correction=Correction(share))
    state, A = run(method, rng, 12)
    errors, spans = [np.linalg.norm(A - matrix(state.A))], state.A.U[0] @ state.A.U[0].T
    for _ in range(5):
        state = method.refresh(state, HYPER)
        errors.append(np.linalg.norm(A - matrix(state.A)))
        assert same(state.A.U[0] @ state.A.U[0].T, spans, 1e-12)
        assert (np.diff(state.A.D[0]) >= 0).all()
    assert all(new <= old * (1 + 1e-12) for old, new in pairwise(errors))
    assert errors[-1] < errors[0] * (1 - 1e-6)
    assert state.code.tolist() == [kf.Code.OK]


def test_all_modes_corrected_is_rayleigh_ritz(rng):
    """BRAND-7: share = 1 gives U (U^T A U) U^T, the best D for that span."""
    method = kf.BrandCKFAC(rank=Rank(R, R), correction=Correction(1.0))
    state, A = run(method, rng, 12)
    U = state.A.U[0]
    state = method.refresh(state, HYPER)
    assert same(matrix(state.A), U @ (U.T @ A @ U) @ U.T, 1e-12)
    assert same(state.A.D[0], np.linalg.eigvalsh(U.T @ A @ U), 1e-12)


def test_every_mode_has_its_turn(rng):
    """BRAND-7: five corrections of a fifth of the modes touch each mode once."""
    method = kf.BrandCKFAC(rank=Rank(R, R), correction=Correction(0.2))
    state, _ = run(method, rng, 2)
    seen, first = [], state.order_A[0].copy()
    for _ in range(5):
        seen += state.order_A[0, :4].tolist()
        state = method.refresh(state, HYPER)
    assert sorted(seen) == list(range(R))
    assert np.array_equal(state.order_A[0], first)


@KINDS
@pytest.mark.parametrize("rows", [3, 8])
def test_the_fresh_gradient_is_applied_factored(kind, rows, rng):
    """BRAND-8: [(G + d I)^-1 g^T][a (A + d I)^-1] / n equals the dense application, without forming the gradient."""
    method = kind(rank=Rank(R, R))
    record = batch(rng, n=rows, d_out=50)
    state = cycle(method, method.init(kf.Block.of(record), record.g), record, HYPER)
    grad = kf.Factored(record.a, record.g[0], float(rows))
    solution = method.solve(state, grad, HYPER)
    assert same(solution.direction, method.solve(state, grad.dense(), HYPER).direction, 1e-11)
    A_inv, G_inv = method.inverses(state, HYPER)
    assert same(solution.direction, G_inv @ grad.dense() @ A_inv, 1e-12)


@KINDS
def test_small_sides_and_many_rows_are_dense(kind, rng):
    """BRAND-9: rows + rank >= d, rank >= d and rows > d: K-FAC itself, over several updates."""
    method, v = kind(), rng.normal(size=(4, 6))
    dense, decay = kf.KFAC(), kf.Hyper(0, 0.9, 0.1)
    for rank, n in ((6, 3), (100, 3), (6, 40), (6, 1)):
        method = kind(rank=Rank(rank, rank))
        block = kf.Block(4, 6, rows=2)
        state, other = method.init(block, v), dense.init(block, v)
        for _ in range(4):
            record = kf.Record(rng.normal(size=(n, 6)), rng.normal(size=(n, 4)), float(n))
            state, other = cycle(method, state, record, decay), cycle(dense, other, record, decay)
        got, want = (m.solve(s, v, decay).direction for m, s in ((method, state), (dense, other)))
        assert same(got, want, 1e-11)


@pytest.mark.parametrize("outside", [kf.nothing, kf.lowest, kf.even])
def test_the_spectrum_outside_of_held_modes(outside, rng):
    """BRAND-10: 0, the smallest of D, or (tr A - tr D) / (d - r)."""
    state, A = run(kf.BrandKFAC(rank=Rank(R, R), outside=outside), rng, 8)
    want = {kf.nothing: 0.0, kf.lowest: state.A.D[0, 0], kf.even: (np.trace(A) - state.A.D.sum()) / (D - R)}
    assert state.A.outside[0] == pytest.approx(want[outside], rel=1e-10)


@pytest.mark.parametrize("few", ["masked", "repeated"])
def test_modes_of_eigenvalue_zero_are_outside(few, rng):
    """Once an average was cut, a batch of fewer different rows leaves held modes empty: rounding picks their
    directions, which have what all others have, and no order of the rows matters."""
    method = kf.BrandKFAC(rank=Rank(R, R), outside=kf.even)
    state, _ = run(method, rng, 8, rows=N)
    rows = np.concatenate([rng.normal(size=(3, D)), np.zeros((N - 3, D))])
    many = 3
    if few == "repeated":
        rows = rows[[0, 1, 2] + [2] * (N - 3)]
        many = N
    mask = None if few == "repeated" else np.arange(N) < 3
    found = []
    for order in (np.arange(N), rng.permutation(N)):
        record = kf.Record(rows[order], batch(rng).g[0, 0, :, 0], float(N), mask=mask if mask is None else mask[order])
        new = method.update(state, method.measure(state, record, HYPER), HYPER)
        found.append(lowrank.dense(method.sides(new).A)[0])
    low = (state.A.U * state.A.D[:, None])[0, :, -R:] @ state.A.U[0, :, -R:].T
    values, Q = np.linalg.eigh(HYPER.decay * low + (1 - HYPER.decay) * rows.T @ rows / many)
    trace = HYPER.decay * state.A.trace[0] + (1 - HYPER.decay) * np.sum(rows**2) / many
    values[: D - R - 3] = (trace - values[D - R - 3 :].sum()) / (D - R - 3)
    want = (Q * values) @ Q.T / new.weight[0]
    assert values[0] > 1e-4 * values[-1]
    for A in found:
        assert same(A, want, 1e-11)


@pytest.mark.parametrize("clocks", [(1, 3), (2, 1)], ids=["rare refresh", "rare update"])
@pytest.mark.parametrize("sizes", [(14, 11), (4, 9), (8, 8)], ids=["others outside", "one side", "none outside"])
@KINDS
def test_the_order_of_the_examples_moves_nothing(kind, sizes, clocks):
    """Masks and repeated examples leave held modes empty, of which rounding picks the directions: also in a refresh."""
    d_in, d_out = sizes
    found = []
    for turned in (False, True):
        rng, orders = np.random.default_rng(23), np.random.default_rng(0)
        method = kind(rank=Rank(3, 3))
        state, directions = method.init(kf.Block(d_out, d_in, rows=6), np.zeros(1)), []
        for k in range(10):
            a, g, mask = rng.normal(size=(3, 2, d_in)), rng.normal(size=(3, 2, d_out)), rng.random((3, 2)) > 0.3
            mask[0, 0] = True
            if k % 3 == 2:
                a[1], g[1] = a[0], g[0]
            order = orders.permutation(3) if turned else np.arange(3)
            record = kf.Record(a[order], g[order], 3.0, mask=mask[order])
            hyper = kf.Hyper(k, 0.5, 0.01)
            state = state if k % clocks[0] else method.update(state, method.measure(state, record, hyper), hyper)
            state = state if k % clocks[1] else method.refresh(state, hyper)
            directions.append(method.solve(state, rng.normal(size=(d_out, d_in)), hyper).direction)
        found.append(np.stack(directions))
    assert same(*found, 1e-10)


def test_short_batches_are_padded(rng):
    """Fewer rows than Block.rows promised: the same as zero rows."""
    method = kf.BrandKFAC(rank=Rank(R, R))
    state = method.init(kf.Block(3, D, rows=10), np.zeros(1))
    record = batch(rng, n=4)
    stats = method.measure(state, record, HYPER)
    padded = replace(stats, a=np.concatenate([stats.a, np.zeros((1, 6, D))], 1))
    one, two = (method.update(state, s, HYPER) for s in (stats, padded))
    assert same(matrix(one.A), matrix(two.A), 1e-13)
    assert one.A.U.shape == (1, D, R + 10)


def test_adaptive_rank_feeds_the_next_update(rng):
    rule = Rank(cap=20, start=10, floor=4, up=3, down=2, above=0.05, below=0.01)
    state, _ = run(kf.BrandKFAC(rank=rule), rng, 6)
    assert 4 <= state.A.rank[0] <= 20
    assert state.A.rank[0] != 10
    assert state.A.U.shape == (1, D, 20)


def test_an_update_never_forms_a_square(rng):
    """d = 4096, 8 rows, rank 8: peak under 40 (rank + rows) d numbers; the square would be 64 MB. From init on."""
    d, n, r = 4096, 8, 8
    a, g = rng.normal(size=(n, d)).astype(np.float32), rng.normal(size=(n, 2)).astype(np.float32)
    record, method = kf.Record(a, g, float(n)), kf.BrandKFAC(rank=Rank(r, r))
    tracemalloc.start()
    state = method.init(kf.Block(2, d), a)
    state = method.update(state, method.measure(state, record, HYPER), HYPER)
    method.solve(state, kf.Factored(record.a, record.g[0], float(n)), HYPER)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * (r + n) * d * 4
