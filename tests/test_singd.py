"""SINGD and its structures against dense matrices, float64: identities SINGD-1 to SINGD-9."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

import kfaccore as kf
from kfaccore import tree
from kfaccore.methods.singd import recursion, structured
from kfaccore.methods.singd.blocks import BlockDiagonal, Dense, Diagonal
from kfaccore.methods.singd.recursion import Rule, by_entries, by_norm, by_radius, independent, unlimited
from kfaccore.methods.singd.toeplitz import LowerToeplitz, UpperToeplitz
from kfaccore.methods.singd.triangular import Hierarchical, Transposed, lower, lower_last, upper, upper_last
from kfaccore.xp import to_bfloat16
from test_catalogue import kronecker, same

STRUCTURES = {
    "dense": Dense(),
    "diagonal": Diagonal(),
    "block": BlockDiagonal(3),
    "upper toeplitz": UpperToeplitz(),
    "lower toeplitz": LowerToeplitz(),
    "upper": upper(1),
    "lower": lower(1),
    "upper last": upper_last(1),
    "lower last": lower_last(1),
    "upper 3": upper(3),
    "lower 2": lower(2),
    "upper last 2": upper_last(2),
    "lower last 3": lower_last(3),
    "hierarchical": Hierarchical(3, 2),
    "hierarchical transposed": Transposed(Hierarchical(3, 2)),
}
TOEPLITZ = ("upper toeplitz", "lower toeplitz")
SIZES = [1, 2, 3, 4, 5, 6, 10]
PLAIN = Rule(momentum=0.0, rate=1e-2, warm=0.0, limit=unlimited)
IKFAC = kf.SINGD(coupling=independent, rule=PLAIN)
LIMITS = {"radius": by_radius, "norm": by_norm, "entries": by_entries, "unlimited": unlimited}
structures = pytest.mark.parametrize("name", STRUCTURES)
sizes = pytest.mark.parametrize("d", SIZES)


def pattern(name: str, d: int) -> np.ndarray:
    """Where a matrix of the structure may be non-zero, written down from its definition."""
    i, j = np.indices((d, d))
    masks = {
        "dense": i == i,
        "diagonal": i == j,
        "block": i // 3 == j // 3,
        "upper toeplitz": i <= j,
        "lower toeplitz": i >= j,
        "upper": (i == j) | (i < 1),
        "lower": (i == j) | (j < 1),
        "upper last": (i == j) | (j >= d - 1),
        "lower last": (i == j) | (i >= d - 1),
        "upper 3": (i == j) | (i < 3),
        "lower 2": (i == j) | (j < 2),
        "upper last 2": (i == j) | (j >= d - 2),
        "lower last 3": (i == j) | (i >= d - 3),
    }
    two = min(2, d - min(3, d))
    three = (i == j) | (i < 3) | ((i >= d - two) & (j >= 3))
    masks |= {"hierarchical": three, "hierarchical transposed": three.T}
    return masks[name]


def projected(name: str, M: np.ndarray) -> np.ndarray:
    """Pi of a symmetric M: doubled where the transposed partner is outside, averaged over diagonals for Toeplitz."""
    mask = pattern(name, len(M))
    if name not in TOEPLITZ:
        return M * mask * np.where(mask & ~mask.T, 2, 1)
    found = np.zeros_like(M)
    for k in range(len(M)):
        value = (np.trace(M, k) + (np.trace(M, -k) if k else 0.0)) / (len(M) - k)
        found += value * np.eye(len(M), k=k if name == "upper toeplitz" else -k)
    return found


def member(name: str, d: int, rng: np.random.Generator) -> np.ndarray:
    """A random matrix inside the structure, well away from singular."""
    x = rng.normal(size=(d, d))
    if name in TOEPLITZ:
        x = sum(rng.normal() * np.eye(d, k=k) for k in range(d))
        x = x if name == "upper toeplitz" else x.T
    return x * pattern(name, d) + 3 * np.eye(d)


def pair(name, d, rng):
    side, X, Y = STRUCTURES[name], member(name, d, rng), member(name, d, rng)
    return side, X, Y, side.take(X[None]), side.take(Y[None])


@structures
@sizes
def test_structures_against_dense_matrices(name, d, rng):
    """SINGD-9: x K, x K^T, K M, sums, Pi(M), traces and norms are those of the dense matrices."""
    side, X, Y, K, M = pair(name, d, rng)
    x, s = rng.normal(size=(1, 7, d)), rng.normal(size=(1, 7, d))
    S = X @ X.T
    assert side.size(K) == d
    assert same(side.dense(K)[0], X)
    assert same(side.dense(side.eye(1, d, x))[0], np.eye(d))
    assert same(side.times(x, K)[0], x[0] @ X)
    assert same(side.times_transposed(x, K)[0], x[0] @ X.T)
    assert same(side.dense(side.product(K, M))[0], X @ Y)
    assert same(side.dense(structured.combine(2.0, K, np.array([-0.5]), M))[0], 2 * X - 0.5 * Y)
    assert same(side.dense(structured.scaled(0.0, K))[0] + 1, np.ones((d, d)))
    assert same(side.dense(side.project(S[None]))[0], projected(name, S))
    assert same(side.dense(side.gram(s))[0], projected(name, s[0].T @ s[0]))
    assert same(side.dense(side.inner(K))[0], projected(name, X.T @ X))
    assert side.trace(K)[0] == pytest.approx(np.trace(X), rel=1e-12)
    assert side.trace(side.project(S[None]))[0] == pytest.approx(np.trace(S), rel=1e-12)
    assert side.square(K)[0] == pytest.approx((X**2).sum(), rel=1e-12)
    assert structured.largest(K)[0] == pytest.approx(np.abs(X).max(), rel=1e-12)


DISTINCT = ["dense", "diagonal", "block", "lower toeplitz", "hierarchical", "hierarchical transposed"]


@pytest.mark.parametrize("name", DISTINCT)
def test_structures_on_every_namespace(name, xp, rng):
    """SINGD-9: x K, x K^T, K M and Pi in every namespace are those of dense NumPy."""
    side, X, Y, K, M = pair(name, 7, rng)
    x = rng.normal(size=(1, 4, 7))
    there = [tree.map(xp.put, part) for part in (K, M)]
    for got, want in (
        (side.times(xp.put(x), there[0]), x @ X),
        (side.times_transposed(xp.put(x), there[0]), x @ X.T),
        (side.dense(side.product(*there)), X @ Y),
        (side.dense(side.gram(xp.put(x))), projected(name, x[0].T @ x[0])),
        (side.dense(side.inner(there[0])), projected(name, X.T @ X)),
    ):
        assert same(xp.get(got), want)


@structures
@sizes
def test_nothing_leaks_out_of_the_structure(name, d, rng):
    """SINGD-2: K (I - b m) has the structure's pattern, where m = Pi(M) has it."""
    side, X, _, K, _ = pair(name, d, rng)
    m = side.project((X @ X.T)[None])
    step = structured.combine(1.0, side.eye(1, d, X[None]), -0.1, m)
    want = X @ (np.eye(d) - 0.1 * projected(name, X @ X.T))
    assert np.abs(want[~pattern(name, d)]).max(initial=0.0) <= 1e-14 * np.abs(want).max()
    got = side.dense(side.product(K, step))[0]
    assert same(got, want, 1e-13)
    if name in TOEPLITZ:
        for k in range(-d + 1, d):
            assert np.ptp(np.diagonal(got, k)) <= 1e-14 * np.abs(want).max() * d


def one_move(name, method, d_in, d_out, rng, moves=2):
    """The recursion written with dense matrices and Pi, beside the method's own."""
    side = STRUCTURES[name]
    method = replace(method, inputs=side, outputs=side)
    hyper = kf.Hyper(0, 0.0, 0.3)
    start = kf.Record(rng.normal(size=(6, d_in)), rng.normal(size=(6, d_out)), 6.0)
    state = method.init(kf.Block.of(start), start.g)
    K, C, m_K, m_C = np.eye(d_in), np.eye(d_out), 0.0, 0.0
    for _ in range(moves):
        record = kf.Record(rng.normal(size=(6, d_in)), rng.normal(size=(6, d_out)), 6.0)
        state = method.update(state, method.measure(state, record, hyper), hyper)
        A, G = kronecker(record)
        H_K, H_C = K.T @ A @ K, C.T @ G @ C
        c_K, e_K, c_C, e_C = 1.0, 1.0, 1.0, 1.0
        if method.coupling is not independent:
            c_K, e_K = np.trace(H_C) / d_out, (C**2).sum() / d_out
            c_C, e_C = np.trace(H_K) / d_in, (K**2).sum() / d_in
        w = 0.5 if method.rule.limit is unlimited else (1 - method.rule.momentum) / 2
        m_K = method.rule.momentum * m_K + w * projected(name, c_K * H_K + 0.3 * e_K * K.T @ K - np.eye(d_in))
        m_C = method.rule.momentum * m_C + w * projected(name, c_C * H_C + 0.3 * e_C * C.T @ C - np.eye(d_out))
        sizes = {by_norm: np.linalg.norm, by_entries: lambda m: np.abs(m).max(), unlimited: lambda m: 1.0}
        sizes[by_radius] = lambda m: np.linalg.norm(m @ m @ m @ m) ** 0.25
        b_K, b_C = (method.rule.rate / max(1.0, sizes[method.rule.limit](m)) for m in (m_K, m_C))
        K, C = K @ (np.eye(d_in) - b_K * m_K), C @ (np.eye(d_out) - b_C * m_C)
    return state, K, C


@structures
@pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("method", [kf.SINGD(rule=Rule(rate=0.1, warm=0.0)), IKFAC], ids=["ingd", "ikfac"])
def test_moves_are_the_stated_recursion_from_the_old_factors(name, method, limit, rng):
    state, K, C = one_move(name, replace(method, rule=replace(method.rule, limit=limit)), 6, 5, rng)
    side = STRUCTURES[name]
    assert same(side.dense(state.K)[0], K, 1e-11)
    assert same(side.dense(state.C)[0], C, 1e-11)
    v = rng.normal(size=(5, 6))
    got = kf.SINGD(inputs=side, outputs=side).solve(state, v, kf.Hyper(0, 0.0, 0.3)).direction
    assert same(got, C @ C.T @ v @ K @ K.T, 1e-11)
    assert (state.m_K == {}) == (method.rule.momentum == 0.0)


@structures
def test_by_radius_keeps_moves_invertible(name, rng):
    """The bound is at least the spectral radius, so 0.9 m / bound has no eigenvalue near 1."""
    side, X, _, _, _ = pair(name, 6, rng)
    m = projected(name, 50 * X @ X.T)
    shrink = by_radius.shrink(side, side.take(m[None]))[0]
    assert np.abs(np.linalg.eigvals(m)).max() * shrink <= 1 + 1e-12
    assert by_radius.shrink(side, side.take(1e-3 * m[None] / np.abs(m).max()))[0] == 1.0


def test_the_first_rates_are_those_of_an_average(rng):
    record, hyper = kf.Record(rng.normal(size=(9, 5)), rng.normal(size=(9, 4)), 9.0), kf.Hyper(0, 0.0, 0.1)
    method = replace(IKFAC, rule=replace(PLAIN, rate=0.2, warm=0.9))
    state = method.init(kf.Block.of(record), record.g)
    for rate in (0.9, 0.45, 0.3, 0.225, 0.2, 0.2):
        stats = method.measure(state, record, hyper)
        want = replace(IKFAC, rule=replace(PLAIN, rate=rate)).update(state, stats, hyper)
        state = method.update(state, stats, hyper)
        assert np.array_equal(state.K["M"], want.K["M"])


def test_rooted_is_kfac_with_the_root_on_each_side(rng):
    record = kf.Record(rng.normal(size=(20, 6)), rng.normal(size=(20, 4)), 20.0)
    v = rng.normal(size=(4, 6))
    got = kf.direction(record, v, kf.IKFAC(cycles=200), 0.01)
    assert same(got, kf.direction(record, v, kf.KFAC(split=kf.equal), 0.01), 1e-10)


def ikfac_step(S: np.ndarray, U: np.ndarray, rate: float, damping: float) -> tuple[np.ndarray, np.ndarray]:
    """K K^T after one IKFAC step from K K^T = S^-1 by the method itself, and 0.75 rate^2 K M^2 K^T."""
    d = len(S)
    K = np.linalg.cholesky(np.linalg.inv(S))
    a = np.linalg.cholesky(U * d).T
    record = kf.Record(a, np.ones((d, 1)), float(d))
    method, hyper = replace(IKFAC, rule=replace(PLAIN, rate=rate)), kf.Hyper(0, 0.0, damping)
    state = replace(method.init(kf.Block.of(record), record.g), K={"M": K[None]})
    new = method.update(state, method.measure(state, record, hyper), hyper).K["M"][0]
    M = K.T @ U @ K + damping * K.T @ K - np.eye(d)
    return new @ new.T, 0.75 * rate**2 * K @ M @ M @ K.T


def test_ikfac_follows_kfac_to_second_order(rng):
    """SINGD-1: K K^T - ((1 - b) S + b (A + c I))^-1 = -(3/4) b^2 K M^2 K^T + O(b^3)."""
    S, U = (x @ x.T / 12 + 0.1 * np.eye(8) for x in rng.normal(size=(2, 8, 12)))
    errors = []
    for rate in (1e-3, 5e-4, 2.5e-4):
        got, leading = ikfac_step(S, U, rate, 0.01)
        exact = np.linalg.inv((1 - rate) * S + rate * (U + 0.01 * np.eye(8)))
        errors.append(np.linalg.norm(got - exact))
        assert errors[-1] == pytest.approx(np.linalg.norm(leading), rel=0.05)
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.05)


def test_a_stationary_point_does_not_move(rng):
    """SINGD-1: K K^T = (A + c I)^-1 has M = 0 and stays."""
    U = (lambda x: x @ x.T / 12)(rng.normal(size=(8, 12)))
    S = U + 0.01 * np.eye(8)
    got, _ = ikfac_step(S, U, 0.5, 0.01)
    assert same(got, np.linalg.inv(S), 1e-12)


def orthogonal_record(rng, d_in=4, d_out=3, rows=24):
    """A and G diagonal, with equal entries twice in no place."""
    q = np.linalg.qr(rng.normal(size=(rows, d_in + d_out)))[0] * rows**0.5
    return kf.Record(q[:, :d_in] * [2.0, 1.0, 0.5, 0.3], q[:, d_in:] * [1.5, 0.7, 0.2], float(rows))


def test_diagonal_is_dense_on_diagonal_factors(rng):
    """SINGD-3: where A and G are diagonal, the diagonal structure is the dense one; elsewhere not."""
    record, v = orthogonal_record(rng), rng.normal(size=(3, 4))
    dense = kf.SINGD(rule=Rule(rate=0.3), cycles=5)
    want = kf.direction(record, v, dense)
    assert same(kf.direction(record, v, replace(dense, inputs=Diagonal(), outputs=Diagonal())), want)
    mixed = kf.Record(record.a[0, :, 0] @ (np.eye(4) + 0.3), record.g[0, 0, :, 0], 24.0)
    want = kf.direction(mixed, v, dense)
    assert not same(kf.direction(mixed, v, replace(dense, inputs=Diagonal())), want, 1e-3)


@pytest.mark.parametrize("k", [5, 6, 30])
def test_a_block_as_wide_as_the_layer_is_dense(k, rng):
    """SINGD-4: block-diagonal, hierarchical and triangular structures of width >= d are dense."""
    record, v = kf.Record(rng.normal(size=(9, 5)), rng.normal(size=(9, 4)), 9.0), rng.normal(size=(4, 5))
    dense = kf.SINGD(rule=Rule(rate=0.3), cycles=5)
    got = kf.direction(record, v, replace(dense, inputs=BlockDiagonal(k), outputs=BlockDiagonal(k)))
    assert same(got, kf.direction(record, v, dense))
    assert same(kf.direction(record, v, replace(dense, inputs=Hierarchical(k, 3), outputs=upper(k))), got)


def test_ingd_with_a_unit_trace_is_ikfac_for_the_inputs(rng):
    """SINGD-5: tr(C^T G C) = d_out and c = 0 give INGD the K of IKFAC, and another C."""
    record = kf.Record(rng.normal(size=(9, 5)), rng.normal(size=(9, 4)), 9.0)
    G = kronecker(record)[1]
    record = kf.Record(record.a, record.g * (4 / np.trace(G)) ** 0.5, 9.0)
    hyper = kf.Hyper(0, 0.0, 0.0)

    def moved(method):
        state = method.init(kf.Block.of(record), record.g)
        return method.update(state, method.measure(state, record, hyper), hyper)

    ingd, ikfac = moved(replace(IKFAC, coupling=recursion.coupled)), moved(IKFAC)
    assert same(ingd.K["M"], ikfac.K["M"])
    assert not same(ingd.C["M"], ikfac.C["M"], 1e-3)


def test_scaling_the_loss_enters_each_bracket(rng):
    """SINGD-6: g times c: INGD sees c^2 on both sides' products, IKFAC on C's alone."""
    a, g, c, hyper = rng.normal(size=(9, 5)), rng.normal(size=(9, 4)), 1.7, kf.Hyper(0, 0.0, 0.0)

    def bracket(method, g):
        record = kf.Record(a, g, 9.0)
        state = method.init(kf.Block.of(record), record.g)
        new = method.update(state, method.measure(state, record, hyper), hyper)
        return [
            (np.eye(len(x["M"][0])) - x["M"][0]) * 2 / method.rule.rate + np.eye(len(x["M"][0])) for x in (new.K, new.C)
        ]

    for method, power in ((replace(IKFAC, coupling=recursion.coupled), 2), (IKFAC, 0)):
        one, scaled = bracket(method, g), bracket(method, c * g)
        assert same(scaled[0], c**power * one[0], 1e-11)
        assert same(scaled[1], c**2 * one[1], 1e-11)


@pytest.mark.parametrize("method", [kf.SINGD(inputs=Hierarchical(2, 1)), IKFAC], ids=["ingd", "ikfac"])
def test_micro_batches_and_repeats_are_the_batch(method, rng):
    """SINGD-7: statistics of parts of 3 and 5 combine to those of 8, and of a doubled batch to the batch's."""
    a, g, hyper = rng.normal(size=(8, 5)), rng.normal(size=(8, 4)), kf.Hyper(0, 0.0, 0.1)
    whole = kf.Record(a, g, 8.0)
    start = kf.settle(method, whole, 2)
    parts = [
        method.measure(start, kf.Record(a[i], g[i], float(n)), hyper) for i, n in ((slice(3), 3), (slice(3, 8), 5))
    ]
    want = method.update(start, method.measure(start, whole, hyper), hyper)
    for stats in (method.combine(*parts), method.measure(start, kf.concat(whole, whole), hyper)):
        got = method.update(start, stats, hyper)
        for x, y in zip(tree.leaves(got), tree.leaves(want), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)


def stalled(storage, condition, rate, steps=400, d=32) -> float:
    """Relative error of K K^T after `steps` IKFAC steps on one U against the same run in float64."""
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(d, d)))[0]
    a = (q * np.logspace(0, -np.log10(condition) / 2, d) * d**0.5).T
    found = []
    for dtype, kept in ((np.float64, recursion.full), (np.float32, storage)):
        record = kf.Record(a.astype(dtype), np.ones((d, 1), dtype), float(d))
        method, hyper = replace(IKFAC, rule=replace(PLAIN, rate=rate, storage=kept)), kf.Hyper(0, 0.0, 1e-3)
        state = method.init(kf.Block.of(record), record.g)
        for _ in range(steps):
            state = method.update(state, method.measure(state, record, hyper), hyper)
        K = state.K["M"][0].astype(np.float64)
        assert np.isfinite(K).all()
        found.append(K @ K.T)
    return float(np.linalg.norm(found[1] - found[0]) / np.linalg.norm(found[0]))


@pytest.mark.parametrize(("condition", "rate"), [(1e2, 1e-2), (1e4, 1e-2)])
def test_bfloat16_stalls_and_a_master_does_not(condition, rate):
    """SINGD-8: 400 steps kept in bfloat16 err by over 0.1, with a float32 master by under 0.02."""
    assert stalled(recursion.bfloat16, condition, rate) > 0.1
    assert stalled(recursion.master, condition, rate) < 0.02


def test_a_long_float64_run_reaches_the_inverse_of_kfac(rng):
    """SINGD-8: K K^T -> (A + c I)^-1, C C^T -> (G + c I)^-1."""
    record = kf.Record(rng.normal(size=(20, 6)), rng.normal(size=(20, 4)), 20.0)
    v = rng.normal(size=(4, 6))
    got = kf.direction(record, v, replace(IKFAC, rule=replace(PLAIN, rate=0.05), cycles=700), 1e-1)
    assert same(got, kf.direction(record, v, kf.KFAC(split=kf.per_factor), 1e-1), 1e-10)


def test_bfloat16_is_rounding_to_the_nearest(xp, rng):
    x = np.concatenate([rng.normal(size=200) * 10.0 ** rng.integers(-20, 20, 200), [0.0, 1.0, -3.0]])
    x = x.astype(np.float32)
    got = to_bfloat16(xp.put(x))
    got = np.asarray(xp.get(got.float() if hasattr(got, "float") else got)).astype(np.float32)
    assert not (got.view(np.uint32) & np.uint32(0xFFFF)).any()
    assert (np.abs(got - x) <= 2.0**-9 * 2 ** np.ceil(np.log2(np.abs(x) + 1e-38))).all()
    assert np.array_equal(np.abs(got[-3:]), [0.0, 1.0, 3.0])


@pytest.mark.parametrize("name", ["diagonal", "block"])
def test_bfloat16_states_stay_so_on_every_namespace(name, xp, rng):
    if (xp.name, name) == ("jax", "block"):
        return  # twenty seconds of compiling
    side = STRUCTURES[name]
    a, g = (rng.normal(size=(9, d)).astype(np.float32) for d in (7, 5))
    record, v = kf.Record(xp.put(a), xp.put(g), 9.0), xp.put(rng.normal(size=(5, 7)).astype(np.float32))
    exact = kf.SINGD(rule=Rule(rate=0.5), cycles=4, inputs=side, outputs=side)
    want = xp.get(kf.direction(record, v, exact, 0.1))
    for storage in (recursion.bfloat16, recursion.master):
        method = replace(exact, rule=Rule(rate=0.5, storage=storage))
        start, state = method.init(kf.Block.of(record), record.g), kf.settle(method, record, damping=0.1)
        assert [x.dtype for x in tree.leaves(start)] == [x.dtype for x in tree.leaves(state)]
        got = method.solve(state, v, kf.Hyper(0, 0.0, 0.1))
        assert got.direction.dtype == v.dtype
        assert np.linalg.norm(xp.get(got.direction) - want) < 0.1 * np.linalg.norm(want)


@pytest.mark.parametrize("side", [Diagonal(), BlockDiagonal(8), UpperToeplitz(), upper(4), Hierarchical(4, 4)], ids=str)
def test_structured_moves_never_form_a_square(side, rng):
    """Peak of a cycle and a solve stays a multiple of (k + rows) d; a square of d would be 16 MB here."""
    d, rows = 2048, 8
    record = kf.Record(
        rng.normal(size=(rows, d)).astype(np.float32), rng.normal(size=(rows, 2)).astype(np.float32), 8.0
    )
    method, v = kf.SINGD(inputs=side), kf.Factored(record.a, record.g[0], 8.0)
    hyper = kf.Hyper(0, 0.0, 0.1)
    state = kf.settle(method, record)
    tracemalloc.start()
    state = method.update(state, method.measure(state, record, hyper), hyper)
    method.solve(state, v, hyper)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * (8 + rows) * d * 4
    assert sum(x.nbytes for x in tree.leaves((state.K, state.m_K))) <= 2 * 9 * d * 4


def test_chunks_of_rows_change_nothing(monkeypatch, rng):
    image = rng.normal(size=(4, 6, 6, 2))
    window = kf.Window((3, 3), padding=1)
    g = rng.normal(size=(2, 4, 36, 3))
    record = kf.Record(kf.Patches(image, window), g, 4.0)
    v, method = rng.normal(size=(3, 18)), kf.SINGD(rule=Rule(rate=0.3), cycles=4, inputs=Hierarchical(2, 2))
    want = kf.direction(record, v, method)
    monkeypatch.setattr("kfaccore.methods.singd.singd._CHUNK", 1)
    assert same(kf.direction(record, v, method), want)
    unfolded = kf.Record(record.rows()[0], g, 4.0)
    assert same(kf.direction(unfolded, v, method), want)


def test_an_embedding_keeps_a_diagonal_K(rng):
    index, g, v = rng.integers(0, 5, (8, 3)), rng.normal(size=(8, 3, 4)), rng.normal(size=(4, 5))
    method = kf.SINGD(rule=Rule(rate=0.3), cycles=4)
    record = kf.Record(kf.Ids(index, 5), g, 8.0)
    dense = kf.Record(record.rows()[0], g, 8.0)
    assert same(kf.direction(record, v, method), kf.direction(dense, v, method))


def test_forward_only_records_have_a_unit_G(rng):
    a, v = rng.normal(size=(9, 5)), rng.normal(size=(4, 5))
    got = kf.direction(
        kf.Record(a, np.zeros((0, 9, 4)), 9.0), v, replace(IKFAC, rule=replace(PLAIN, rate=0.5), cycles=80), 0.1
    )
    want = v @ np.linalg.inv(a.T @ a / 9 + 0.1 * np.eye(5)) / 1.1
    assert same(got, want, 1e-10)


def test_a_blow_up_keeps_the_previous_factors(rng):
    a, g, hyper = rng.normal(size=(9, 5)), rng.normal(size=(9, 4)), kf.Hyper(0, 0.0, 0.1)
    record, method = kf.Record(a, g, 9.0), replace(IKFAC, rule=replace(PLAIN, rate=0.3))
    start = method.init(kf.Block.of(record), record.g)
    state = method.update(start, method.measure(start, record, hyper), hyper)
    with np.errstate(over="ignore", invalid="ignore"):
        huge = method.measure(state, kf.Record(1e154 * a, g, 9.0), kf.Hyper(0, 0.0, 0.1))
        after = method.update(state, huge, kf.Hyper(0, 0.0, 1e300))
        first = method.update(start, huge, kf.Hyper(0, 0.0, 1e308))
    assert np.isfinite(after.K["M"]).all()
    assert first.code.tolist() in ([kf.Code.IDENTITY], [kf.Code.OK])
