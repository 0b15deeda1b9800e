"""Randomised K-FAC: sketches against dense eigendecompositions, float64: RSKFAC-1 to RSKFAC-10."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import kfaccore as kf
from jax_needed import jax, jnp
from kfaccore import tree
from kfaccore.methods.lowrank import lowrank
from kfaccore.methods.lowrank.lowrank import LowRank, Rank
from kfaccore.methods.lowrank.sketch import residual
from kfaccore.settle import cycle
from test_catalogue import kronecker, same

SKETCHES = pytest.mark.parametrize("sketch", [kf.Symmetric, kf.Singular])
OUTSIDE = pytest.mark.parametrize("outside", [kf.nothing, kf.lowest, kf.even])


def spectrum(d, values, rng):
    """A symmetric matrix with the given eigenvalues, and its eigenvectors."""
    q = np.linalg.qr(rng.normal(size=(d, d)))[0]
    return (q * values) @ q.T, q


def low(rng, d=9, k=4, outside=0.0):
    U = np.linalg.qr(rng.normal(size=(2, d, k)))[0]
    D = np.sort(rng.uniform(0.1, 3, size=(2, k)))
    one = np.ones(2)
    return LowRank(U, D, outside * one, D.sum(-1), np.full(2, k, np.int32))


@pytest.mark.parametrize("outside", [0.0, 0.03])
@pytest.mark.parametrize("k", [0, 4, 9])
def test_the_inverse_by_modes_is_the_dense_inverse(k, outside, xp, rng):
    """RSKFAC-1: x (U ((D + c)^-1 - (o + c)^-1) U^T + I / (o + c)) is the dense solve.

    Also with the outside of its own: the continued spectrum is exact for U D U^T + outside (I - U U^T)."""
    factor, x, shift = low(rng, k=k, outside=outside), rng.normal(size=(2, 5, 9)), np.array([0.3, 1e-3])
    matrix = (factor.U * factor.D[:, None]) @ factor.U.mT + outside * (np.eye(9) - factor.U @ factor.U.mT)
    there = tree.map(xp.put, factor)
    assert same(xp.get(lowrank.times(xp.put(x), there)) + 1, x @ matrix + 1)
    got, lifted = lowrank.inverse(there, xp.put(shift), xp.put(np.zeros(2, bool)))
    want = x @ np.linalg.inv(matrix + shift[:, None, None] * np.eye(9))
    assert same(xp.get(lowrank.times(xp.put(x), got)), want, 1e-12)
    assert not xp.get(lifted).any()


@SKETCHES
@pytest.mark.parametrize("rank", [5, 6, 100])
def test_full_rank_is_kfac(sketch, rank, rng):
    """RSKFAC-2: rank >= d has K-FAC's direction under every split."""
    record = kf.Record(rng.normal(size=(20, 5)), rng.normal(size=(20, 4)), 20.0)
    v = rng.normal(size=(4, 5))
    for split in (kf.pi, kf.equal, kf.per_factor, kf.Relative(kf.pi)):
        method = kf.RandomizedKFAC(rank=Rank(rank, rank), sketch=sketch(oversample=0), split=split)
        assert same(kf.direction(record, v, method, 0.1), kf.direction(record, v, kf.KFAC(split=split), 0.1))


@SKETCHES
def test_passes_lead_to_the_largest_modes(sketch, rng):
    """RSKFAC-3: fifty passes: the best rank-6 matrix; one pass is far from it, and each further pass is no worse."""
    M, q = spectrum(40, 0.8 ** np.arange(40), rng)
    best, errors = (q[:, :6] * 0.8 ** np.arange(6)) @ q[:, :6].T, []
    for passes in (1, 2, 4, 8, 50):
        rule = sketch(passes=passes, oversample=4)
        U, D, code = rule.modes(M[None], rule.draw(1, 40, 6, 0, M), 6)
        assert same(U[0].T @ U[0], np.eye(6), 1e-13)
        assert code.tolist() == [kf.Code.OK]
        errors.append(np.linalg.norm((U[0] * D[0]) @ U[0].T - best))
    assert errors[0] > 0.1
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-12
    assert residual(M[None], U, D)[0] < 1e-12


@SKETCHES
def test_the_error_is_near_the_first_value_cut(sketch, rng):
    """RSKFAC-4: |M - U D U^T|_2 <= 1.05 sigma_(r+1) at four passes on a decaying spectrum, never under sigma_(r+1)."""
    for decay in (0.7, 0.9, 0.95):
        values = decay ** np.arange(120)
        M, _ = spectrum(120, values, rng)
        rule = sketch()
        U, D, _ = rule.modes(M[None], rule.draw(1, 120, 20, 0, M), 20)
        error = np.linalg.norm(M - (U[0] * D[0]) @ U[0].T, 2)
        assert values[20] * (1 - 1e-8) <= error <= 1.05 * values[20]


def test_the_singular_variant_is_half_a_pass_better(rng):
    """RSKFAC-5: errors of one pass: symmetric > singular > symmetric with two."""
    M, _ = spectrum(120, 0.95 ** np.arange(120), rng)
    errors = {}
    for rule in (kf.Symmetric(passes=1), kf.Singular(passes=1), kf.Symmetric(passes=2)):
        U, D, _ = rule.modes(M[None], rule.draw(1, 120, 20, 0, M), 20)
        errors[type(rule).__name__, rule.passes] = np.linalg.norm(M - (U[0] * D[0]) @ U[0].T)
    assert errors["Symmetric", 1] > errors["Singular", 1] > errors["Symmetric", 2]


def test_damping_relative_to_the_top_eigenvalue(rng):
    """RSKFAC-6: (G + c max(G) I)^-1 V (A + c max(A) I)^-1, max the largest eigenvalue.

    Each factor's shift is damping times its own largest eigenvalue, so a rescaled loss changes only the length."""
    record, v = kf.Record(rng.normal(size=(20, 5)), rng.normal(size=(20, 4)), 20.0), rng.normal(size=(4, 5))
    A, G = kronecker(record)
    A_d, G_d = (M + 0.3 * np.linalg.eigvalsh(M)[-1] * np.eye(len(M)) for M in (A, G))
    want = np.linalg.solve(G_d, v) @ np.linalg.inv(A_d)
    for method in (kf.RandomizedKFAC(split=kf.top), kf.BrandKFAC(split=kf.top), kf.KFAC(split=kf.top)):
        assert same(kf.direction(record, v, method, 0.3), want)
        scaled = kf.Record(7 * record.a, 0.1 * record.g, 20.0)
        assert same(kf.direction(scaled, v, method, 0.3), want / 0.49)
    zero = kf.Record(record.a, 0 * record.g, 20.0)
    assert same(kf.direction(zero, v, kf.KFAC(split=kf.top), 0.3), v @ np.linalg.inv(A_d) / 0.3)


@pytest.mark.parametrize("method", [kf.RandomizedKFAC, kf.BrandKFAC, kf.BrandRKFAC, kf.BrandCKFAC])
@pytest.mark.parametrize("start", [0.0, 1.0, 2.0])
def test_the_identity_start_decays_with_the_updates(method, start, rng):
    """RSKFAC-7: k updates leave start decay^k of the identity, as a dense average begun at start I has it."""
    decay, v = 0.7, rng.normal(size=(4, 5))
    method, hyper = method(split=kf.per_factor, start=start), kf.Hyper(0, decay, 0.01)
    A, G, state = start * np.eye(5), start * np.eye(4), None
    for k in range(1, 4):
        record = kf.Record(rng.normal(size=(3, 5)), rng.normal(size=(3, 4)), 3.0)
        state = method.init(kf.Block.of(record), record.g) if state is None else state
        state = cycle(method, state, record, hyper)
        new = kronecker(record)
        A, G = (decay * old + (1 - decay) * x for old, x in zip((A, G), new, strict=True))
        weight = start * decay**k + 1 - decay**k
        A_d, G_d = (M / weight + 0.01 * np.eye(len(M)) for M in (A, G))
        want = np.linalg.solve(G_d, v) @ np.linalg.inv(A_d)
        assert same(method.solve(state, v, hyper).direction, want, 1e-11)


@OUTSIDE
def test_the_spectrum_outside(outside, rng):
    """RSKFAC-8: nothing: 0; lowest: the smallest kept; even: what the trace leaves, which keeps the trace."""
    record, v = kf.Record(rng.normal(size=(30, 9)), rng.normal(size=(30, 2)), 30.0), rng.normal(size=(2, 9))
    A, G = kronecker(record)
    values, vectors = np.linalg.eigh(A)
    beyond = {kf.nothing: 0.0, kf.lowest: values[5], kf.even: values[:5].mean()}[outside]
    M = (vectors * np.r_[np.full(5, beyond), values[5:]]) @ vectors.T
    method = kf.RandomizedKFAC(
        rank=Rank(4, 4), sketch=kf.Symmetric(passes=120, oversample=2), split=kf.per_factor, outside=outside
    )
    got = kf.direction(record, v, method, 0.1)
    want = np.linalg.solve(G + 0.1 * np.eye(2), v) @ np.linalg.inv(M + 0.1 * np.eye(9))
    assert same(got, want, 1e-9)
    state = kf.settle(method, record)
    if outside is kf.even:
        assert np.trace(lowrank.dense(state.modes_A)[0]) == pytest.approx(np.trace(A), rel=1e-12)


def test_the_adaptive_rank_follows_the_spectrum(rng):
    """RSKFAC-9: grows where the last mode kept is still large, shrinks where it is small, within floor and cap, and
    masks."""
    rule = Rank(cap=12, start=6, floor=3, up=2, down=1, above=0.053, below=0.026)
    found = {}
    for name, decay in (("slow", 0.9), ("fast", 0.1), ("between", 0.51)):
        _, q = spectrum(20, np.ones(20), rng)
        record = kf.Record((q * (20 * decay ** np.arange(20)) ** 0.5).T, rng.normal(size=(20, 2)), 20.0)
        method = kf.RandomizedKFAC(rank=rule, sketch=kf.Symmetric(passes=8, oversample=6), outside=kf.nothing)
        state, hyper = method.init(kf.Block.of(record), record.g), kf.Hyper(0, 0.0, 0.1)
        state = method.update(state, method.measure(state, record, hyper), hyper)
        found[name] = []
        for _ in range(5):
            found[name].append(int(state.modes_A.rank[0]))
            state = method.refresh(state, hyper)
            assert (state.modes_A.D[0] > 0).sum() == found[name][-1]
        assert state.modes_A.U.shape == (1, 20, 12)
    assert found == {"slow": [6, 8, 10, 12, 12], "fast": [6, 5, 4, 3, 3], "between": [6, 6, 6, 6, 6]}


def four_errors(got, want, v):
    """Relative errors of the inverses of A and G and of the step G^-1 v A^-1, and the steps' angle (Puiu 2022)."""
    steps = [G[0] @ v @ A[0] for A, G in (got, want)]
    u, w = (step / np.linalg.norm(step) for step in steps)
    angle = 2 * np.arctan2(np.linalg.norm(u - w), np.linalg.norm(u + w))
    pairs = {"A": (got[0], want[0]), "G": (got[1], want[1]), "step": steps}
    return {name: np.linalg.norm(x - y) / np.linalg.norm(y) for name, (x, y) in pairs.items()} | {"angle": angle}


def test_four_errors_vanish_at_full_rank_and_fall_with_it(rng):
    """RSKFAC-10: errors of A^-1, G^-1, the step and its angle fall with the rank and are 0 at rank d."""
    scale = 0.6 ** np.arange(12)
    record = kf.Record(rng.normal(size=(40, 12)) * scale, rng.normal(size=(40, 10)) * scale[:10], 40.0)
    v, found = rng.normal(size=(10, 12)), []
    want = kf.RandomizedKFAC(rank=Rank(12, 12))
    exact = want.inverses(kf.settle(want, record), kf.Hyper(0, 0.0, 1e-2))
    for rank in (1, 4, 8, 12):
        method = replace(want, rank=Rank(rank, rank))
        found.append(four_errors(method.inverses(kf.settle(method, record), kf.Hyper(0, 0.0, 1e-2)), exact, v))
    for name in ("A", "G", "step", "angle"):
        values = [errors[name] for errors in found]
        assert values == sorted(values, reverse=True)
        assert values[0] > 1e-3
        assert values[-1] == pytest.approx(0.0, abs=1e-7)
    A, G = kronecker(record)
    d_a, d_g = kf.pi.shifts(lowrank.scale(_side(A)), lowrank.scale(_side(G)), 1e-2)
    assert same(exact[0][0], np.linalg.inv(A + d_a * np.eye(12)))
    assert same(exact[1][0], np.linalg.inv(G + d_g * np.eye(10)))


def _side(M):
    return LowRank(np.eye(len(M))[None], np.diagonal(M)[None], np.zeros(1), np.trace(M)[None], np.ones(1, np.int32))


def test_the_same_seed_gives_the_same_bits_and_another_does_not(rng):
    record, v = kf.Record(rng.normal(size=(30, 20)), rng.normal(size=(30, 3)), 30.0), rng.normal(size=(3, 20))

    def run(seed):
        return kf.direction(record, v, kf.RandomizedKFAC(rank=Rank(5, 5), sketch=kf.Symmetric(seed=seed, oversample=2)))

    assert np.array_equal(run(0), run(0))
    assert not np.array_equal(run(0), run(1))


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_nought_is_damping_alone(rank, rng):
    record, v = kf.Record(rng.normal(size=(30, 6)), rng.normal(size=(30, 5)), 30.0), rng.normal(size=(5, 6))
    for kind in (kf.RandomizedKFAC, kf.BrandKFAC, kf.BrandRKFAC, kf.BrandCKFAC):
        method = kind(rank=Rank(rank, rank), split=kf.equal, outside=kf.nothing)
        solution = method.solve(kf.settle(method, record, damping=0.25), v, kf.Hyper(0, 0.0, 0.25))
        assert solution.code.tolist() == [kf.Code.OK]
        assert same(solution.direction, v / 0.25) == (rank == 0)


@pytest.mark.parametrize("damping", [0.0, 1e-40, 1e30])
def test_damping_to_nought_and_infinity(damping, rng):
    """At rank < d and no damping nothing is left to divide by: lifted, JITTERED, finite."""
    record, v = kf.Record(rng.normal(size=(30, 20)), rng.normal(size=(30, 3)), 30.0), rng.normal(size=(3, 20))
    for kind in (kf.RandomizedKFAC, kf.BrandKFAC):
        method = kind(rank=Rank(5, 5), outside=kf.nothing)
        solution = method.solve(kf.settle(method, record, damping=damping), v, kf.Hyper(0, 0.0, damping))
        assert np.isfinite(solution.direction).all()
        assert solution.code.tolist() == [kf.Code.OK if damping > 1 else kf.Code.JITTERED]
        if damping > 1:
            assert same(solution.direction * damping, v, 1e-6)


def test_an_embedding_keeps_its_diagonal(rng):
    index, g, v = rng.integers(0, 5, (8, 3)), rng.normal(size=(8, 3, 4)), rng.normal(size=(4, 5))
    record = kf.Record(kf.Ids(index, 5), g, 8.0)
    for kind in (kf.RandomizedKFAC, kf.BrandKFAC, kf.BrandRKFAC, kf.BrandCKFAC):
        assert same(kf.direction(record, v, kind()), kf.direction(record, v, kf.KFAC()))
        assert kf.settle(kind(), record).code.tolist() == [kf.Code.OK]


def test_forward_only_and_patches(rng):
    patches = kf.Patches(rng.normal(size=(4, 6, 6, 2)), kf.Window((3, 3), padding=1))
    record = kf.Record(patches, np.zeros((0, 4, 36, 3)), 4.0)
    v = rng.normal(size=(3, 18))
    for kind in (kf.RandomizedKFAC, kf.BrandKFAC):
        assert same(kf.direction(record, v, kind()), kf.direction(record, v, kf.KFAC()), 1e-11)


def test_a_failed_refresh_keeps_the_previous_modes(rng):
    record = kf.Record(rng.normal(size=(30, 20)), rng.normal(size=(30, 3)), 30.0)
    method = kf.RandomizedKFAC(rank=Rank(5, 5))
    state = kf.settle(method, record)
    after = method.refresh(replace(state, A=state.A * np.nan), kf.Hyper(0, 0.0, 0.1))
    assert after.code.tolist() == [kf.Code.PREVIOUS]
    assert np.array_equal(after.modes_A.U, state.modes_A.U)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Rank(-1), "at least 0"),
        (lambda: kf.Symmetric(passes=0), "Symmetric.passes is 0; need a whole number"),
        (lambda: kf.RandomizedKFAC(split=kf.exact), "does not shift each factor"),
        (lambda: kf.BrandKFAC(split=kf.exact), "does not shift each factor"),
    ],
)
def test_messages(call, message):
    with pytest.raises(ValueError, match=message):
        call()


RANKS = {"cut": Rank(5, 5), "few": Rank(8, 3), "fewer": Rank(8, 8, 2, down=3, below=1.1), "full": Rank(12, 5)}


@pytest.mark.parametrize("rank", RANKS.values(), ids=RANKS)
@pytest.mark.parametrize("oversample", [10, 4], ids=["whole", "sketched"])
@pytest.mark.parametrize("sketch", [kf.Symmetric, kf.Singular])
def test_a_cut_through_equal_eigenvalues_is_not_left_to_rounding(sketch, oversample, rank):
    """G of a head that begins at zero has C - 1 of them: batches in two parts, and under jit, keep the same modes, and
    count the same of those that are held."""
    rng = np.random.default_rng(0)
    classes, batch = 12, 60
    a = rng.normal(size=(batch, 4))
    g = kf.type2(kf.SoftmaxCrossEntropy(), np.zeros((batch, classes)), rng.integers(classes, size=batch))
    method = kf.RandomizedKFAC(rank=rank, sketch=sketch(oversample=oversample))
    V = rng.normal(size=(classes, 4))
    hyper = kf.Hyper(0, 0.5, 0.01)

    def direction(cut, put=np.asarray):
        state = method.init(kf.Block(classes, 4), put(np.zeros(1)))
        records = [kf.Record(put(a[s]), put(g[:, s]), float(len(a[s]))) for s in (slice(0, cut), slice(cut, batch))]
        for _ in range(2):
            stats = method.combine(*(method.measure(state, record, hyper) for record in records))
            state = method.refresh(method.update(state, stats, hyper), hyper)
        return method.solve(state, put(V), hyper).direction

    want = direction(30)
    for got in (direction(7), direction(46), jax.jit(lambda: direction(17, jnp.asarray))()):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-10 * np.abs(want).max())
