"""What must never happen silently: states poisoned by one batch, exceptions where a code is due, numbers that are
something else with code OK."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

import kfaccore as kf
import kfaccore_numpy as kn
from conftest import FEW
from kfaccore import tree
from kfaccore.methods.rows import cgfac
from kfaccore.methods.rows.factors import always, never
from kfaccore.methods.singd.recursion import Rule, bfloat16
from kfaccore.xp import eigen, eigh, spd_inverse
from rows import METHODS, arrays

rows = pytest.mark.parametrize("row", METHODS, ids=lambda r: r.name)
HYPER = kf.Hyper(0, 0.5, 0.07)
# where rows that do not exist stand in the stack as zeros, which take room
ROWS_KEPT = ("skfac-stacked", "cgfac", "cgfac-factored", "cgfac-empirical")


def settled(row, xp, rng):
    a, g = arrays(rng, blocks=1)
    record = kf.Record(xp.put(a), xp.put(g), 2.5)
    return record, kf.settle(row.method, record, damping=0.07)


def moved(row, state, record):
    """The state after one more update, without refresh, and whether its Stats were called bad."""
    stats = row.method.measure(state, record, HYPER)
    return row.method.update(state, stats, HYPER), np.asarray(stats.bad).any()


def equal(xp, x, y):
    return all(np.array_equal(xp.get(p), xp.get(q)) for p, q in zip(tree.leaves(x), tree.leaves(y), strict=True))


@rows
@pytest.mark.parametrize("xp", FEW, ids=lambda n: n.name)
def test_a_mask_without_a_row_adds_nothing(row, xp, rng):
    record, state = settled(row, xp, rng)
    empty = xp.put(np.zeros((record.batch, record.shared), dtype=bool))
    after, bad = moved(row, state, kf.Record(record.a, record.g, record.n, empty))
    assert equal(xp, after, state)
    assert not bad


@pytest.mark.parametrize("row", [row for row in METHODS if row.name not in ROWS_KEPT], ids=lambda row: row.name)
def test_a_micro_batch_without_a_row_counts_in_n(row, rng):
    """F of both is the sum of J J^T over both shares, as for an expert that one of two micro-batches leaves out."""
    record, state = settled(row, FEW[0], rng)
    empty = kf.Record(record.a, record.g, 1.5, np.zeros((record.batch, record.shared), dtype=bool))
    both = row.method.combine(row.method.measure(state, record, HYPER), row.method.measure(state, empty, HYPER))
    whole = kf.Record(record.a, record.g, record.n + 1.5)
    want = row.method.update(state, row.method.measure(state, whole, HYPER), HYPER)
    found = row.method.update(state, both, HYPER)
    for x, y in zip(tree.leaves(found), tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)


@rows
@pytest.mark.parametrize(("dtype", "size"), [(np.float32, 1e25), (np.float64, 1e200)])
def test_one_batch_too_large_to_average_poisons_nothing(row, rng, dtype, size):
    a, g = (x.astype(dtype) for x in arrays(rng, blocks=1))
    state = kf.settle(row.method, kf.Record(a, g, 2.5), damping=0.07)
    scale = dtype(size)
    with np.errstate(all="ignore"):
        for record in (kf.Record(a * scale, g, 2.5), kf.Record(a, g * scale, 2.5), kf.Record(a, g, 1e-320)):
            after, _ = moved(row, state, record)
            assert all(np.isfinite(x).all() for x in tree.leaves(after))


def dead(rng, xp):
    """A factor with a unit that never fires, one of zeros, and one that is not finite."""
    x = rng.normal(size=(4, 3, 3))
    x = x @ x.swapaxes(1, 2)
    x[1, 1, :] = 0
    x[1, :, 1] = 0
    x[2] = 0
    x[3, 0, 0] = np.nan
    return xp.put(x)


def test_inverse_of_singular_matrices_is_a_code(xp, rng):
    inverse, code = spd_inverse(dead(rng, xp))
    assert np.isfinite(xp.get(inverse)).all()
    codes = list(xp.get(code))
    assert codes[0] == kf.Code.OK
    assert codes[1] in (kf.Code.JITTERED, kf.Code.INDEFINITE)
    assert codes[2:] == [kf.Code.INDEFINITE, kf.Code.NONFINITE]


def test_eigenpairs_of_the_largest_numbers(xp):
    top = np.finfo(float).max
    values, _, code = eigh(xp.put(np.array([[[top, 0.0], [0.0, top / 2]]])))
    assert list(xp.get(code)) == [kf.Code.OK]
    np.testing.assert_allclose(xp.get(values) / top, [[0.5, 1.0]])


def test_eigenpairs_when_divide_and_conquer_fails(rng, monkeypatch):
    x = rng.normal(size=(2, 4, 4))
    x = x + x.swapaxes(1, 2)
    want = eigh(x)
    true = eigen.scipy_eigh

    def failing(block, driver, **how):
        if driver == "evd" or block[0, 0] == x[1, 0, 0]:
            raise np.linalg.LinAlgError("did not converge")
        return true(block, driver=driver, **how)

    monkeypatch.setattr(eigen, "scipy_eigh", failing)
    values, vectors, code = eigh(x)
    assert list(code) == [kf.Code.OK, kf.Code.UNCONVERGED]
    np.testing.assert_allclose(values[0], want[0][0], atol=1e-13)
    np.testing.assert_allclose(vectors[0] * values[0] @ vectors[0].T, x[0], atol=1e-13)
    assert np.array_equal(vectors[1], np.eye(4))


@pytest.mark.parametrize("index", [7, -1])
def test_an_id_that_does_not_exist_is_not_another_row(xp, rng, index):
    ids = np.array([[0, 3], [index, 2], [1, 1]])
    g = rng.normal(size=(1, 1, 3, 2, 4))
    record = kf.Record(kf.Ids(xp.put(ids), 7), xp.put(g), 3.0)
    method = kf.KFAC()
    good = kf.Record(kf.Ids(xp.put(np.where(ids == index, 5, ids)), 7), xp.put(g), 3.0)
    state = kf.settle(method, good)
    stats = method.measure(state, record, HYPER)
    assert list(xp.get(stats.bad)) == [1.0]
    assert equal(xp, method.update(state, stats, HYPER), state)


@pytest.mark.parametrize(
    "method", [kf.FNGD(sharing=kf.expand, steps=0), kf.CGFAC(cgfac.Empirical(kf.expand), cgfac.InRows(), 96)]
)
def test_a_position_of_patches_is_an_example_under_expand(xp, rng, method):
    image = rng.normal(size=(3, 4, 4, 2))
    window = kf.Window((2, 2))
    g = rng.normal(size=(1, 1, 3, 9, 2))
    patches = kf.Record(kf.Patches(xp.put(image), window), xp.put(g), 3.0)
    unfolded = kf.Record(patches.rows(), xp.put(g), 3.0)
    v = xp.put(rng.normal(size=(1, 2, 8)))
    found = [xp.get(kf.direction(record, v, method, 0.1)) for record in (patches, unfolded)]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-9)
    a = xp.get(unfolded.a).reshape(27, 8)
    J = np.einsum("ro,ri->roi", g.reshape(27, 2), a).reshape(27, -1)
    want = np.linalg.solve(J.T @ J / 3.0 + 0.1 * np.eye(16), xp.get(v).ravel())
    np.testing.assert_allclose(found[1].ravel(), want, rtol=1e-9)


@pytest.mark.parametrize(
    "method",
    [
        kf.FNGD(steps=0),
        kf.CGFAC(cgfac.Empirical(), cgfac.InRows(), 96),
        kf.SKFAC(branch=always, rows=96, explicit=never),
    ],
    ids=["fngd", "cgfac", "skfac"],
)
@pytest.mark.parametrize("xp", FEW, ids=lambda n: n.name)
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 2e-3), (np.float64, 1e-10)])
def test_more_rows_than_parameters(xp, rng, method, dtype, tolerance):
    """Where every direction has curvature, a difference of two vectors 1 / damping long would leave only rounding."""
    a, g = (x.astype(dtype) for x in arrays(rng, blocks=1, batch=12, shared=1, d_in=3, d_out=2, draws=1))
    v = rng.normal(size=(1, 2, 3)).astype(dtype)
    damping = 1e-6
    got = xp.get(kf.direction(kf.Record(xp.put(a), xp.put(g), 12.0), xp.put(v), method, damping))
    a, g = a[0, :, 0].astype(float), g[0, 0, :, 0].astype(float)
    J = np.einsum("ro,ri->roi", g, a).reshape(12, -1)
    F = J.T @ J / 12
    if isinstance(method, kf.SKFAC):
        A, G = a.T @ a / 12, g.T @ g / 12
        pi = np.sqrt(np.trace(A) / 3 / (np.trace(G) / 2))
        root = damping**0.5
        F = np.kron(G + root / pi * np.eye(2), A + root * pi * np.eye(3)) - damping * np.eye(6)
    want = np.linalg.solve(F + damping * np.eye(6), v.astype(float).ravel())
    assert np.abs(got.ravel() - want).max() <= tolerance * np.abs(want).max()


@pytest.mark.parametrize("method", [kf.SINGD(), kf.IKFAC()], ids=["ingd", "ikfac"])
def test_inverse_free_roots_move_on_large_inputs(rng, method):
    """The eighth power of a move of 1e5 is no number of float32."""
    a, g = (x.astype(np.float32) for x in arrays(rng, blocks=1))
    record = kf.Record(200 * a, 200 * g, 2.5)
    state = method.init(kf.Block.of(record), record.g)
    after = method.update(state, method.measure(state, record, HYPER), HYPER)
    (moved_to,) = after.K.values()
    assert not np.array_equal(moved_to, *state.K.values())
    wide = kf.Record(record.a.astype(float), record.g.astype(float), 2.5)
    exact = method.init(kf.Block.of(wide), wide.g)
    exact = method.update(exact, method.measure(exact, wide, HYPER), HYPER)
    np.testing.assert_allclose(moved_to, *exact.K.values(), rtol=1e-4, atol=1e-4)


def test_conjugate_gradients_in_float32_at_any_scale(rng):
    """|x|^2 and |Op p|^2 may be no numbers of float32 where x and Op p are."""
    a, g = (x.astype(np.float32) for x in arrays(rng, blocks=1))
    v = rng.normal(size=(1, 3, 4)).astype(np.float32)
    method = kf.CGFAC(cgfac.Kron(), cgfac.CG(kf.linalg.cg.Residual(1e-6), 200), 96)
    one = kf.direction(kf.Record(a, g, 2.5), v, method, 1.0)
    small = np.float32(2.0**-20)
    tiny = kf.direction(kf.Record(a * small, g * small, 2.5), v, method, 2.0**-80)
    np.testing.assert_allclose(tiny * np.float32(2.0**-80), one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("method", [kf.Lanczos(), kf.TEKFAC()], ids=["lanczos", "tekfac"])
def test_fourth_powers_stay_in_float32(rng, method, scale):
    a, g = (x.astype(np.float32) for x in arrays(rng, blocks=1, batch=1, shared=1, draws=1))
    v = rng.normal(size=(1, 3, 4)).astype(np.float32)
    one = kf.direction(kf.Record(a, g, 1.0), v, method, 1.0)
    c = np.float32(scale)
    other = kf.direction(kf.Record(a * c, g * c, 1.0), v, method, scale**4)
    np.testing.assert_allclose(other * np.float32(scale**2) * np.float32(scale**2), one, rtol=2e-3, atol=1e-4)


def test_bfloat16_roots_are_saved_and_come_back(xp, rng, tmp_path):
    a, g = (x.astype(np.float32) for x in arrays(rng, blocks=1))
    record = kf.Record(xp.put(a), xp.put(g), 2.5)
    method = kf.SINGD(rule=replace(Rule(), storage=bfloat16))
    state = kf.settle(method, record)
    kf.save(tmp_path / "state.safetensors", state)
    back = kf.load(tmp_path / "state.safetensors", state)
    for x, y in zip(tree.leaves(back), tree.leaves(state), strict=True):
        assert x.dtype == y.dtype
        assert str(x) == str(y)


@pytest.mark.parametrize("method", [kf.FNGD(), kf.CGFAC(cgfac.Empirical())], ids=["fngd", "cgfac"])
def test_zero_draws_are_refused_by_name_at_every_call(rng, method):
    a, g = arrays(rng, blocks=1)
    record = kf.Record(a, g[:1], 2.5)
    none = kf.Record(a, g[:0], 2.5)
    state = kf.settle(method, record)
    with pytest.raises(ValueError, match="zero draws"):
        method.measure(state, none, HYPER)
    if isinstance(method, kf.FNGD):
        with pytest.raises(ValueError, match="zero draws"):
            method.solve(state, np.ones((1, 3, 4)), HYPER, none)


def trained(seed: int) -> list[np.ndarray]:
    """A small network after twenty self-tuning steps."""
    net = kn.Sequential((6,), (kn.Dense(8), kn.Tanh(), kn.Dense(4)))
    rng = np.random.default_rng(seed)
    params = net.init(rng, np.asarray)
    x = rng.normal(size=(32, 6))
    target = rng.integers(0, 4, size=32)
    pre = kf.Preconditioner(kf.KFAC(), clocks=kf.Clocks(1, 2), step=kf.SelfTuning(), donate=True)
    steps = kn.fit(net, params, (x, target), kf.SoftmaxCrossEntropy(), pre, steps=20, batch=16, seed=seed)
    *_, last = steps
    return list(last.params.values())


def test_two_models_in_two_threads_are_one_after_the_other():
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(trained, (1, 2)))
    for seed, found in zip((1, 2), together, strict=True):
        for x, y in zip(found, trained(seed), strict=True):
            assert np.array_equal(x, y)
