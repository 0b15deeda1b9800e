"""The laws every METHODS row inherits, on every namespace."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kfaccore as kf
from formulas import damped
from kfaccore import tree
from kfaccore.settle import cycle
from rows import METHODS, arrays

N, DAMPING = 2.5, 0.07
rows = pytest.mark.parametrize("row", METHODS, ids=lambda r: r.name)
small = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def solver(row, record, damping=DAMPING):
    """Solves with one state, settled on the record: settling costs most of a law."""
    state = kf.settle(row.method, record, damping=damping)
    return lambda v: row.method.solve(state, v, kf.Hyper(0, 0.0, damping), record)


def solve(row, record, v, damping=DAMPING):
    return solver(row, record, damping)(v)


def make(xp, rng, **sizes):
    a, g = arrays(rng, **sizes)
    return kf.Record(xp.put(a), xp.put(g), N), xp.put(rng.normal(size=(len(a), g.shape[-1], a.shape[-1])))


def close(x, y, tolerance=1e-12):
    x, y = np.asarray(x), np.asarray(y)
    return np.abs(x - y).max() <= tolerance * np.abs(y).max()


@rows
def test_exact_in_its_exact_regime(row, xp, rng):
    a, g = row.regime(rng)
    v = rng.normal(size=(len(a), g.shape[-1], a.shape[-1]))

    def direction(a, g, v):
        return solve(row, kf.Record(a, g, N), v).direction

    run = xp.whole(direction) if row.method.cycles == 1 else direction
    got = xp.get(run(*(xp.put(x) for x in (a, g, v))))
    matrix = row.matrix(a, g, N, DAMPING)
    want = np.stack([np.linalg.solve(m, x.ravel()) for m, x in zip(matrix, v, strict=True)])
    assert close(got, want.reshape(v.shape))


@rows
def test_linear_symmetric_positive(row, xp, rng):
    record, u = make(xp, rng)
    v = xp.put(rng.normal(size=u.shape))
    settled = solver(row, record)
    Ku, Kv, both = (xp.get(settled(x).direction) for x in (u, v, 2.0 * u + v))
    u, v = xp.get(u), xp.get(v)
    assert close(both, 2 * Ku + Kv)
    for block in range(2):
        assert np.sum(u[block] * Kv[block]) == pytest.approx(np.sum(Ku[block] * v[block]), rel=1e-11)
        assert np.sum(u[block] * Ku[block]) > 0


@rows
def test_large_damping_turns_to_the_gradient(row, xp, rng):
    record, v = make(xp, rng)
    direction = xp.get(solve(row, record, v, 1e14).direction)
    assert close(direction * row.scale(1e14), xp.get(v), 1e-5)


@rows
def test_halves_combine_to_the_whole(row, xp, rng):
    a, g = arrays(rng)
    parts = [
        kf.Record(xp.put(a[:, s]), xp.put(g[:, :, s]), N * share)
        for s, share in ((slice(0, 2), 0.4), (slice(2, 5), 0.6))
    ]
    whole = kf.Record(xp.put(a), xp.put(g), N)
    hyper = kf.Hyper(0, 0.0, DAMPING)
    state = kf.settle(row.method, whole, damping=DAMPING)
    one = row.method.measure(state, whole, hyper)
    two = row.method.combine(*(row.method.measure(state, part, hyper) for part in parts))
    for x, y in zip(tree.leaves(one), tree.leaves(two), strict=True):
        x, y = (leaf if isinstance(leaf, float) else xp.get(leaf) for leaf in (x, y))  # n may be a number of the host
        np.testing.assert_allclose(y, x, rtol=1e-12, atol=1e-12)


@rows
def test_inputs_untouched_and_not_kept(row, rng):
    a, g = arrays(rng)
    before = a.copy(), g.copy()
    record = kf.Record(a, g, N)
    state = kf.settle(row.method, record)
    v = rng.normal(size=(2, 3, 4))
    kept = v.copy()
    direction = row.method.solve(state, v, kf.Hyper(0, 0.0, DAMPING)).direction
    assert not np.shares_memory(direction, v)
    assert np.array_equal(a, before[0])
    assert np.array_equal(g, before[1])
    assert np.array_equal(v, kept)
    for leaf in tree.leaves(state):
        assert not np.shares_memory(leaf, a)
        assert not np.shares_memory(leaf, g)


@rows
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_same_tree_dtype_namespace(row, xp, rng, dtype):
    a, g = arrays(rng)
    v = rng.normal(size=(2, 3, 4))
    names: list[list[str]] = []

    def ended(a, g, v):
        record = kf.Record(a, g, N)
        start = row.method.init(kf.Block.of(record), record.g)
        solution = solve(row, record, v)
        names.extend([name for name, _ in tree.items(state)] for state in (start, solution.state))
        return tree.leaves(start), tree.leaves(solution.state), solution.direction

    given = [xp.put(x.astype(dtype)) for x in (a, g, v)]
    # a trace tells all of it but the type; compiling everything once more for another dtype tells nothing else
    traced = xp.name == "jax" and dtype == np.float32
    if traced:
        import jax

        start, end, direction = jax.eval_shape(ended, *given)
    else:
        start, end, direction = ended(*given)
    assert names[0] == names[1]
    for x, y in zip(start, end, strict=True):
        assert (x.shape, x.dtype, type(x)) == (y.shape, y.dtype, type(y))
    assert direction.dtype == given[2].dtype
    assert traced or type(direction) is type(given[2])


@rows
def test_agrees_with_numpy(row, xp, rng):
    a, g = arrays(rng)
    v = rng.normal(size=(2, 3, 4))
    want = solve(row, kf.Record(a, g, N), v)
    got = solve(row, kf.Record(xp.put(a), xp.put(g), N), xp.put(v))
    assert close(xp.get(got.direction), want.direction, 1e-10)
    assert np.array_equal(xp.get(got.code), want.code)


@rows
def test_factored_and_dense_agree(row, xp, rng):
    for batch in (5,) if xp.name == "jax" else (1, 2, 5):  # the shapes that JAX has compiled for other laws
        a, g = arrays(rng, batch=batch)
        record = kf.Record(xp.put(a), xp.put(g), N)
        factored = kf.Factored(xp.put(a), xp.put(g[0]), 3.0)
        dense = np.einsum("bnso,bnsi->boi", g[0], a) / 3.0
        assert close(xp.get(factored.dense()), dense)
        settled = solver(row, record)
        directions = [xp.get(settled(v).direction) for v in (factored, xp.put(dense))]
        assert close(*directions, 1e-11)


@rows
def test_same_inputs_same_bits(row, xp, rng):
    record, v = make(xp, rng)
    first, second = (xp.get(solve(row, record, v).direction) for _ in range(2))
    assert np.array_equal(first, second)


@rows
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["a", "g"])
def test_non_finite_record_changes_nothing(row, xp, rng, bad, where):
    if row.unmeasured:
        return
    a, g = arrays(rng)
    good = kf.Record(xp.put(a), xp.put(g), N)
    state = kf.settle(row.method, good)
    (a if where == "a" else g)[..., 1, 1, 1, 0] = bad  # the second block only
    stats = row.method.measure(state, kf.Record(xp.put(a), xp.put(g), N), kf.Hyper(0, 0.5, DAMPING))
    assert (xp.get(stats.bad) > 0).tolist() == [False, True]
    after = row.method.update(state, stats, kf.Hyper(0, 0.5, DAMPING))
    for x, y in zip(tree.leaves(state), tree.leaves(after), strict=True):
        assert np.array_equal(xp.get(x)[1], xp.get(y)[1])


@rows
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_non_finite_gradient_gives_zero_and_a_code(row, xp, rng):
    record, _ = make(xp, rng)
    v = rng.normal(size=(2, 3, 4))
    settled = solver(row, record)
    before = xp.get(settled(xp.put(v)).code)[0]
    v[1, 0, 0] = np.nan
    solution = settled(xp.put(v))
    direction = xp.get(solution.direction)
    assert not direction[1].any()
    assert np.isfinite(direction).all()
    assert before in (kf.Code.OK, kf.Code.INDEFINITE)  # a true answer about two terms
    assert xp.get(solution.code).tolist() == [before, kf.Code.NONFINITE]


@rows
def test_before_the_first_refresh_the_gradient(row, xp, rng):
    record, v = make(xp, rng)
    hyper = kf.Hyper(0, 0.9, DAMPING)
    state = row.method.init(kf.Block.of(record), record.g)
    for prepared in (state, row.method.refresh(state, hyper)):
        solution = row.method.solve(prepared, v, hyper)
        assert np.array_equal(xp.get(solution.direction), xp.get(v))
        expected = kf.Code.OK if row.unmeasured else kf.Code.IDENTITY
        assert (xp.get(solution.code) == expected).all()


@rows
def test_ok_at_condition_1e8(row, rng):
    d = 6
    a = np.linalg.qr(rng.normal(size=(40, d)))[0] * np.logspace(0, -4, d) * 40**0.5
    g = np.linalg.qr(rng.normal(size=(40, 4)))[0] * 40**0.5
    record = kf.Record(a, g, 40.0)
    solution = solve(row, record, rng.normal(size=(4, d)), 1e-12)
    assert solution.code.tolist() == [kf.Code.OK]


@rows
@given(
    sizes=st.tuples(*(st.integers(1, high) for high in (3, 4, 3, 9, 7, 3))),
    damping=st.sampled_from([1e-3, 0.1, 10.0]),
    seed=st.integers(0, 99),
)
@small
def test_duplicating_and_permuting_change_nothing(row, sizes, damping, seed):
    rng = np.random.default_rng(seed)
    a, g = arrays(rng, *sizes)
    v = rng.normal(size=(sizes[0], sizes[4], sizes[3]))
    record = kf.Record(a, g, N)
    want = solve(row, record, v, damping).direction
    order = rng.permutation(sizes[1])
    assert close(solve(row, kf.Record(a[:, order], g[:, :, order], N), v, damping).direction, want, 1e-8)
    assert close(solve(row, kf.concat(record, record), v, damping).direction, want, 1e-8)


@pytest.mark.parametrize("row", [row for row in METHODS if row.everywhere], ids=lambda r: r.name)
@given(
    sizes=st.tuples(*(st.integers(1, high) for high in (3, 4, 3, 8, 6, 3))),
    dtype=st.sampled_from([np.float32, np.float64]),
    damping=st.sampled_from([0.03, 0.3, 30.0]),
    seed=st.integers(0, 99),
)
@small
def test_direction_is_the_stated_formula(row, sizes, dtype, damping, seed):
    """Not only where it is exact: the damped matrix of the row's own factors, for any shape and dtype."""
    rng = np.random.default_rng(seed)
    a, g = (x.astype(dtype) for x in arrays(rng, *sizes))
    v = rng.normal(size=(sizes[0], sizes[4], sizes[3])).astype(dtype)
    got = solve(row, kf.Record(a, g, N), v, damping).direction
    assert got.dtype == dtype
    matrix = row.matrix(*(x.astype(np.float64) for x in (a, g)), N, damping)
    want = np.linalg.solve(matrix, v.reshape(len(v), -1, 1).astype(np.float64)).reshape(v.shape)
    assert close(got, want, 1e-11 if dtype == np.float64 else 1e-2)


@rows
def test_matvec_is_the_undamped_matrix(row, xp, rng):
    """F itself in the exact regime, which the row's own formula without damping must be as well."""
    a, g = row.regime(rng)
    record = kf.Record(xp.put(a), xp.put(g), N)
    v = rng.normal(size=(len(a), g.shape[-1], a.shape[-1]))
    state = kf.settle(row.method, record)
    if row.no_matrix:
        with pytest.raises((TypeError, ValueError), match=row.no_matrix):
            row.method.matvec(state, xp.put(v), kf.Hyper(0, 0.0, 0.0))
        return
    got = xp.get(row.method.matvec(state, xp.put(v), kf.Hyper(0, 0.0, 0.0)))
    if row.unmeasured:
        assert np.array_equal(got, v)
        return
    F = damped(a, g, N, 0.0)
    assert close(row.matrix(a, g, N, 0.0), F)
    assert close(got, np.einsum("bde,be->bd", F, v.reshape(len(a), -1)).reshape(v.shape), 1e-11)


@rows
def test_averages_are_debiased(row, rng):
    """Three updates with decay 0.6 equal one on the weighted mean: of A and of G, or of F~."""
    if row.no_average or row.no_matrix:
        return
    given = [arrays(rng) for _ in range(3)]
    records = [kf.Record(a, g, N) for a, g in given]
    hyper = kf.Hyper(0, 0.6, DAMPING)
    state = row.method.init(kf.Block.of(records[0]), records[0].g)
    for record in records:
        state = cycle(row.method, state, record, hyper)
    shares = np.array([0.36 * 0.4, 0.6 * 0.4, 0.4])
    shares = shares / shares.sum()
    v = rng.normal(size=(2, 3, 4))
    got = row.method.matvec(state, v, hyper)
    if row.factors:
        pairs = [row.factors(a, g, N) for a, g in given]
        A, G = (np.tensordot(shares, np.stack(side), 1) for side in zip(*pairs, strict=True))
        want = G @ v @ A
    else:
        products = [row.method.matvec(kf.settle(row.method, record), v, hyper) for record in records]
        want = np.tensordot(shares, np.stack(products), 1)
    assert close(got, want)


def test_a_refresh_resets_the_moments_of_ekfac(rng):
    """Between a refresh and the next update EKFAC is K-FAC with exact Kronecker damping, whatever came before."""
    record, v = kf.Record(*arrays(rng), N), rng.normal(size=(2, 3, 4))
    hyper = kf.Hyper(0, 0.6, DAMPING)
    state = cycle(kf.EKFAC(), kf.EKFAC().init(kf.Block.of(record), record.g), record, hyper)
    state = kf.EKFAC().update(state, kf.EKFAC().measure(state, record, hyper), hyper)
    corrected = kf.EKFAC().solve(state, v, hyper).direction
    got = kf.EKFAC().solve(kf.EKFAC().refresh(state, hyper), v, hyper).direction
    want = kf.direction(record, v, kf.KFAC(inverse=kf.eigh, split=kf.exact), DAMPING)
    assert close(got, want)
    assert not close(got, corrected, 1e-3)
