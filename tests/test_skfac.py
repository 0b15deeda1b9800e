"""SKFAC against dense oracles in float64; identities SKFAC-1 to SKFAC-17."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

import kfaccore as kf
from kfaccore import tree
from kfaccore.methods.rows import factors as stacked
from kfaccore.methods.rows import stack as stacks
from kfaccore.methods.rows import woodbury
from kfaccore.methods.rows.factors import always, cheaper_dense, never
from kfaccore.methods.rows.skfac import release
from kfaccore.record.sharing import mean_mean
from kfaccore.settle import cycle

ROWS = pytest.mark.parametrize("B", [1, 3, 7, 28])  # of d = 7
LOW = kf.SKFAC(branch=always, rows=6, explicit=never)
TALL = kf.SKFAC(branch=always, rows=32, explicit=never)
DENSE = kf.KFAC(sharing=mean_mean, split=kf.equal)


def close(x, y, tolerance=1e-10):
    return np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y)


def pair(rng, B=5, d_in=7, d_out=6):
    return rng.normal(size=(B, d_in)), rng.normal(size=(B, d_out))


def stack(y, capacity=None, d=None):
    empty = stacks.empty(1, capacity or len(y), d or y.shape[-1], y)
    return stacks.push(empty, y[None], np.full(1, 1 / len(y)), 0.0, np.array([True]))


def damped(y, shift):
    return y.T @ y / len(y) + shift * np.eye(y.shape[1])


def shifts(a, g, damping):
    pi = np.sqrt((a**2).sum() / a.size / ((g**2).sum() / g.size))
    return pi * damping**0.5, damping**0.5 / pi


def oracle(a, g, V, d_a, d_g):
    return np.linalg.solve(damped(g, d_g), np.linalg.solve(damped(a, d_a), V.T).T)


def direction(method, a, g, V, damping=0.01, n=None):
    return kf.direction(kf.Record(a, g, n or len(a)), V, method, damping)


def test_the_branch_follows_the_cost_of_the_application(rng):
    """SKFAC-2: rows < 0.414 d: two products with the rows and one with their system cost less than one with the
    inverse."""
    for rows, d in ((41, 100), (42, 100)):
        method = kf.SKFAC(rows=rows)
        state = method.init(kf.Block(6, d), np.zeros(1))
        assert isinstance(state.inverse_a, woodbury.LowRank) == (2 * rows * d + rows**2 < d**2) == (rows == 41)
        assert cheaper_dense(rows, d) == (rows == 42)


@ROWS
@pytest.mark.parametrize("shift", [1e-4, 1e-2, 1.0, 1e6])
def test_woodbury_is_the_dense_inverse(B, shift, rng):
    """SKFAC-1: (Y^T Y / B + c I)^-1 = (I - Y^T (Y Y^T + B c I)^-1 Y) / c."""
    y = rng.normal(size=(B, 7))
    inverse, code = woodbury.inverse(stack(y), np.full(1, shift))
    assert code.tolist() == [kf.Code.OK]
    assert close(woodbury.dense(inverse)[0], np.linalg.inv(damped(y, shift)))


@ROWS
def test_all_ways_to_apply_the_inverse_agree(B, rng):
    """SKFAC-2: low rank, dense, explicit, push-through and span forms are dense K-FAC."""
    stacked = LOW if B <= 6 else TALL
    a, g = pair(rng, B)
    DW = g.T @ a / B
    want = oracle(a, g, DW, *shifts(a, g, 0.01))
    factored = kf.Factored(a, g, B)
    small = (
        np.linalg.inv(g @ g.T / B + shifts(a, g, 0.01)[1] * np.eye(B)),
        np.linalg.inv(a @ a.T / B + shifts(a, g, 0.01)[0] * np.eye(B)),
    )
    modes = {
        "lowrank": direction(stacked, a, g, DW),
        "dense": direction(kf.SKFAC(branch=never), a, g, DW),
        "explicit": direction(kf.SKFAC(branch=always, rows=32, explicit=always), a, g, DW),
        "kfac": direction(kf.KFAC(), a, g, DW),
        "push-through": direction(stacked, a, g, factored)[0],
        "span": g.T @ small[0] @ small[1] @ a / B,
        "branch": direction(kf.SKFAC(rows=7), a, g, DW),
    }
    for name, got in modes.items():
        assert close(got, want), name


def test_the_branch_is_taken_for_each_side(rng):
    """SKFAC-2: rows for A beside a dense G are dense K-FAC all the same."""
    state = kf.SKFAC(rows=7).init(kf.Block(6, 9), np.zeros(1))
    assert isinstance(state.factors.A, stacks.Stack)
    assert state.factors.G.shape == (1, 6, 6)
    state = kf.SKFAC(rows=7).init(kf.Block(6, 9, rows=5), np.zeros(1))
    assert state.factors.A.rows.shape == (1, 5, 9)
    assert state.factors.G.rows.shape == (1, 5, 6)
    a, g = pair(rng, 7, 9, 6)
    V = rng.normal(size=(6, 9))
    assert close(direction(kf.SKFAC(rows=7), a, g, V), oracle(a, g, V, *shifts(a, g, 0.01)))


@ROWS
def test_spectrum_of_the_inverse(B, rng):
    """SKFAC-3: d - rank(Y) eigenvalues 1 / c, the rest 1 / (c + sigma_i^2 / B), all positive."""
    y, shift = rng.normal(size=(B, 7)), 0.03
    inverse = woodbury.dense(woodbury.inverse(stack(y), np.full(1, shift))[0])[0]
    assert np.abs(inverse - inverse.T).max() <= 1e-14 * np.abs(inverse).max()
    sigma = np.zeros(7)
    sigma[: min(B, 7)] = np.linalg.svd(y, compute_uv=False)
    assert close(np.linalg.eigvalsh(inverse), np.sort(1 / (shift + sigma**2 / B)), 1e-12)
    flat = np.abs(np.linalg.eigvalsh(inverse) * shift - 1) < 1e-10
    assert flat.sum() == 7 - np.linalg.matrix_rank(y)
    assert np.linalg.eigvalsh(inverse).min() > 0


@ROWS
def test_log_determinant_from_the_rows(B, rng):
    """SKFAC-4: log det(A + c I) = (d - B) log c + log det(Y Y^T / B + c I)."""
    y, shift = rng.normal(size=(B, 7)), 0.03
    inverse = woodbury.dense(woodbury.inverse(stack(y), np.full(1, shift))[0])[0]
    want = (7 - B) * np.log(shift) + np.linalg.slogdet(y @ y.T / B + shift * np.eye(B))[1]
    assert -np.linalg.slogdet(inverse)[1] == pytest.approx(want, rel=1e-11)
    assert want == pytest.approx(np.linalg.slogdet(damped(y, shift))[1], rel=1e-11)


@pytest.mark.parametrize("method", [kf.SKFAC(), LOW, release], ids=["default", "low", "release"])
def test_zero_rows_and_gradients(method, rng):
    """SKFAC-5: Y = 0 gives I / c, g = 0 gives X = 0 of its own gradient, and pi = 1."""
    inverse, _ = woodbury.inverse(stack(np.zeros((3, 7))), np.full(1, 0.5))
    assert close(woodbury.dense(inverse)[0], np.eye(7) / 0.5, 1e-15)
    a, _ = pair(rng)
    zero = np.zeros((5, 6))
    assert not direction(method, a, zero, zero.T @ a).any()
    V = rng.normal(size=(6, 7))  # a zero trace sets pi to 1: d_a = d_g = sqrt(damping)
    assert close(direction(method, a, zero, V), oracle(a, zero, V, 0.1, 0.1))


def test_large_damping_turns_to_the_gradient(rng):
    """SKFAC-6: c_A c_G X -> V as damping grows."""
    a, g = pair(rng)
    DW = g.T @ a / 5
    d_a, d_g = shifts(a, g, 1e16)
    assert close(direction(LOW, a, g, DW, 1e16) * d_a * d_g, DW, 1e-6)


def test_small_damping_needs_push_through(rng):
    """SKFAC-7: X -> pinv(G) V pinv(A) as damping vanishes, by push-through alone.

    The gradient's own rows keep their digits at any damping; the difference loses some and stays finite."""
    a, g = pair(rng)
    DW, damping = g.T @ a / 5, 1e-20
    want = np.linalg.pinv(g.T @ g / 5) @ DW @ np.linalg.pinv(a.T @ a / 5)
    own = direction(LOW, a, g, kf.Factored(a, g, 5.0), damping)[0]
    generic = direction(LOW, a, g, DW, damping)
    assert close(own, want, 1e-8)
    assert np.isfinite(generic).all()
    assert not close(generic, want, 1e-6)


@pytest.mark.parametrize("damping", [1e-6, 1e-12, 1e-18, 1e-24])
def test_more_rows_than_their_width_lose_nothing_at_small_damping(rng, damping):
    """Their small system is singular but for the damping, so it is not what they are inverted by."""
    a, g = pair(rng, 28)
    V = rng.normal(size=(6, 7))
    record = kf.Record(a, g, 28.0)
    for grad in (V, kf.Factored(a, g, 28.0)):
        want = kf.direction(record, grad, kf.KFAC(), damping)
        assert close(kf.direction(record, grad, TALL, damping), want, 1e-13)
        assert close(kf.direction(record, grad, release, damping), kf.direction(record, grad, DENSE, damping), 1e-13)


@pytest.mark.parametrize("damping", [1e-4, 1e-6, 1e-8, 1e-20, 1e-26])
def test_a_gradient_of_repeated_examples_that_is_multiplied_out(rng, damping):
    """V lies in the span of rows that depend on each other: the small system has 1 / c in it, and V nothing there.

    Multiplying V out rounds it, which alone costs K-FAC's digits; its own rows keep theirs."""
    again = [0, 1, 2, 0, 1, 2, 0, 0]
    a, g = (x[again] for x in pair(rng, 3, 18, 17))
    V = g.T @ a / 8
    d_a, d_g = shifts(a, g, damping)
    # singular vectors of the rows: nothing cancels
    (Ua, sa, Qa), (Ug, sg, Qg) = (np.linalg.svd(y / 8**0.5, full_matrices=False) for y in (a, g))
    inside = (Ug[:, :3].T * sg[:3, None]) @ (Ua[:, :3] * sa[:3])
    want = Qg[:3].T @ (inside / (sg[:3, None] ** 2 + d_g) / (sa[:3] ** 2 + d_a)) @ Qa[:3]
    method = kf.SKFAC(branch=always, rows=8, explicit=never)
    found = direction(method, a, g, V, damping)
    dense = direction(kf.KFAC(), a, g, V, damping)
    assert np.linalg.norm(found - want) < 5 * np.linalg.norm(dense - want)
    own = direction(method, a, g, kf.Factored(a, g, 8.0), damping)[0]
    assert close(own, want, 1e-9 if damping < 1e-18 else 1e-7)


def test_one_example_is_a_multiple_of_its_gradient(rng):
    """SKFAC-8: X = V / ((|a|^2 + c_A)(|g|^2 + c_G))."""
    a, g = pair(rng, 1)
    d_a, d_g = shifts(a, g, 0.01)
    want = g.T @ a / (((a**2).sum() + d_a) * ((g**2).sum() + d_g))
    assert close(direction(LOW, a, g, g.T @ a), want, 1e-12)


@pytest.mark.parametrize("method", [kf.SKFAC(), LOW, kf.SKFAC(rows=6)], ids=["default", "low", "mixed"])
def test_permuting_and_duplicating_change_nothing(method, rng):
    """SKFAC-9: a permuted or copied batch has the same direction."""
    a, g = pair(rng, 3)
    V = rng.normal(size=(6, 7))
    want = direction(method, a, g, V)
    order = rng.permutation(3)
    assert close(direction(method, a[order], g[order], V), want)
    assert close(direction(method, np.tile(a, (2, 1)), np.tile(g, (2, 1)), V), want)


def test_mean_and_sum_losses_have_one_direction(rng):
    """SKFAC-10: per-example g with n = B, or hook values g / B times B, have one direction; a sum loss (n = 1) has B
    times the G and the gradient."""
    a, g = pair(rng)
    hook, V = g / 5, g.T @ a / 5
    want = direction(LOW, a, g, V)
    assert close(direction(LOW, a, hook * 5, hook.T @ a), want)
    assert close(direction(LOW, a, g, 5 * V, 5 * 0.01, n=1.0), want)


def test_the_released_form_is_woodbury(rng):
    """SKFAC-11: (I - y^T L^-T L^-1 y) / s with y = Y / sqrt(B), L L^T = y y^T + s I, is Woodbury's form."""
    y, s = rng.normal(size=(5, 7)), 0.03**0.5
    hat = y / 5**0.5
    half = np.linalg.inv(np.linalg.cholesky(hat @ hat.T + s * np.eye(5)))
    want = (np.eye(7) - hat.T @ half.T @ half @ hat) / s
    assert close(woodbury.dense(woodbury.inverse(stack(y), np.full(1, s))[0])[0], want, 1e-12)


def test_the_released_preset(rng):
    """SKFAC-11: sqrt(damping) on both factors, means over positions of a and g, and the small system also for B > d."""
    a, g = rng.normal(size=(9, 4, 7)), rng.normal(size=(9, 4, 6))
    V = rng.normal(size=(6, 7))
    want = oracle(a.mean(1), g.mean(1), V, 0.03**0.5, 0.03**0.5)
    assert close(direction(release, a, g, V, 0.03), want)
    state = release.init(kf.Block(6, 7, rows=9), a)
    for _ in range(2):  # a batch replaces the last, whatever the decay
        fresh = rng.normal(size=(9, 4, 7)), rng.normal(size=(9, 4, 6))
        state = cycle(release, state, kf.Record(*fresh, 9.0), kf.Hyper(0, 0.95, 0.03))
    want = oracle(fresh[0].mean(1), fresh[1].mean(1), V, 0.03**0.5, 0.03**0.5)
    assert close(release.solve(state, V, kf.Hyper(0, 0.95, 0.03)).direction, want)


@pytest.mark.parametrize("decay", [0.0, 0.7])
@pytest.mark.parametrize("rank", [0, 8])
def test_stacked_rows_are_the_moving_average(decay, rank, rng):
    """SKFAC-12: with room for all rows, or a compressed past of full rank, the dense average; without room, the
    truncated one."""
    batches = [pair(rng, B, 12, 8) for B in (4, 6, 5)]
    method = kf.SKFAC(kf.expand, kf.per_factor, always, 24 if rank else 15, rank=rank)
    hyper, V = kf.Hyper(0, decay, 0.05), rng.normal(size=(8, 12))
    state = method.init(kf.Block(8, 12), V)
    for a, g in batches:
        state = cycle(method, state, kf.Record(a, g, len(a)), hyper)
    w = (1 - decay) * decay ** np.arange(2, -1, -1)
    A, G = (sum(k * b[i].T @ b[i] / len(b[i]) for k, b in zip(w, batches, strict=True)) / w.sum() for i in (0, 1))
    want = np.linalg.solve(G + 0.05 * np.eye(8), V) @ np.linalg.inv(A + 0.05 * np.eye(12))
    assert close(method.solve(state, V, hyper).direction, want, 1e-12)
    assert close(method.matvec(state, V, hyper), G @ V @ A, 1e-12)


def test_products_leave_out_what_nothing_was_put_into(rng):
    """Of room for 64 rows those that came; of a state that saw nothing a row of zeros."""
    stack = stacks.empty(2, 64, 5, rng.normal(size=(1,)))
    assert stacks.filled(stack).rows.shape == (2, 1, 5)
    share = np.ones(2) / 3
    for count in (3, 6):
        stack = stacks.push(stack, rng.normal(size=(2, 3, 5)), share, 0.9, np.ones(2, bool))
        shorter = stacks.filled(stack)
        assert shorter.rows.shape == (2, count, 5)
        np.testing.assert_array_equal(stacks.dense(shorter), stacks.dense(stack))


def test_truncation_and_compression_err_by_what_was_cut(rng):
    """SKFAC-12: rows that do not fit leave with their mass; compressed, the factor errs by no more than what was cut
    off."""
    batches = [rng.normal(size=(5, 30)) * np.logspace(0, -3, 30) for _ in range(6)]
    w = 0.2 * 0.8 ** np.arange(5, -1, -1)
    full = sum(k * y.T @ y / 5 for k, y in zip(w, batches, strict=True)) / w.sum()
    kept, merged = (stacks.empty(1, capacity, 30, full) for capacity in (10, 13))
    for y in batches:
        kept = stacks.push(kept, y[None], np.full(1, 0.2 / 5), 0.8, np.array([True]))
        merged = stacks.push(merged, y[None], np.full(1, 0.2 / 5), 0.8, np.array([True]), rank=8)
    last = sum(k * y.T @ y / 5 for k, y in zip(w[4:], batches[4:], strict=True)) / w[4:].sum()
    assert close(stacks.times(np.eye(30)[None], kept)[0], last, 1e-12)
    assert merged.mass.sum() == pytest.approx(w.sum(), rel=1e-12)
    error = np.linalg.norm(stacks.times(np.eye(30)[None], merged)[0] - full, 2)
    assert error < np.linalg.norm(last - full, 2) / 10
    assert error <= 5 * np.linalg.eigvalsh(full)[-9] + 1e-12  # five merges, none cuts more than the ninth eigenvalue
    y = rng.normal(size=(40, 30)) * np.logspace(0, -3, 30)
    for rows in (y, y[:20]):  # more rows than columns, and fewer
        best = stacks.compressed(rows[None], 8)[0]
        assert np.linalg.norm(best.T @ best - rows.T @ rows, 2) == pytest.approx(
            np.linalg.svd(rows, compute_uv=False)[8] ** 2, rel=1e-8
        )


def test_a_batch_larger_than_the_capacity_is_compressed(rng):
    """SKFAC-12: a batch of more rows than fit is cut to its best approximation that does: exact for a batch of that
    rank."""
    a, g = rng.normal(size=(20, 5)) @ rng.normal(size=(5, 9)), rng.normal(size=(20, 4)) @ rng.normal(size=(4, 8))
    V = rng.normal(size=(8, 9))
    got = direction(kf.SKFAC(rows=6), a, g, V)
    assert close(got, oracle(a, g, V, *shifts(a, g, 0.01)))


def test_subsampling_is_unbiased_and_whole_at_all_positions(rng):
    """SKFAC-13: S of S positions are expand, and the mean over all subsets of 3 is the whole factor."""
    a, g = rng.normal(size=(2, 5, 7)), rng.normal(size=(2, 5, 6))
    record, V = kf.Record(a, g, 2.0), rng.normal(size=(6, 7))
    all_of_them = kf.SKFAC(kf.Subsample(5))
    assert close(kf.direction(record, V, all_of_them), kf.direction(record, V, kf.KFAC()), 1e-12)
    A = [np.zeros((7, 7)), np.zeros((6, 6))]
    subsets = list(combinations(range(5), 3))
    for positions in subsets:
        part = kf.Subsample(positions=positions)(record)
        A[0] += part.a[0, :, 0].T @ part.a[0, :, 0] / part.batch / len(subsets)
        A[1] += part.g[0, 0, :, 0].T @ part.g[0, 0, :, 0] / part.n / len(subsets)
    rows, gs = a.reshape(-1, 7), g.reshape(-1, 6)
    assert close(A[0], rows.T @ rows / 10, 1e-12)
    assert close(A[1], gs.T @ gs / 2, 1e-12)
    assert kf.Subsample(2).chosen(5) == (0, 2)
    drawn = kf.Subsample(3, seed=4).chosen(50)
    assert len(set(drawn)) == 3
    assert drawn == kf.Subsample(3, seed=4).chosen(50)
    for wrong in ({"count": 0}, {"count": 2, "positions": (1,)}):
        with pytest.raises(ValueError, match="need count"):
            kf.Subsample(**wrong)
    with pytest.raises(ValueError, match="only 5"):
        kf.Subsample(positions=(5,))(record)


def test_subsampling_patches_is_subsampling_unfolded_rows(rng):
    """SKFAC-13: chosen positions of folded patches are those of the unfolded ones, with their mask."""
    image, window = rng.normal(size=(9, 5, 6, 2)), kf.Window((3, 2), stride=(2, 1), padding=1)
    patches = kf.Patches(image, window, bias=True)
    g = rng.normal(size=(9, patches.shape[2], 3))
    chosen = kf.Subsample(4, seed=1)
    got, want = chosen(kf.Record(patches, g, 9.0)), chosen(kf.Record(patches.unfold(), g[None, None], 9.0))
    assert np.array_equal(got.a, want.a)
    assert np.array_equal(got.g, want.g)
    mask = np.ones((2, 5), bool)
    mask[0, 2:] = False
    part = kf.Subsample(positions=(1, 3))(kf.Record(rng.normal(size=(2, 5, 7)), rng.normal(size=(2, 5, 6)), 2.0, mask))
    assert part.mask[:, 0].tolist() == [True, False, True, True]
    with pytest.raises(TypeError, match="embedding"):
        chosen(kf.Record(kf.Ids(np.zeros((9, 4), int), 5), rng.normal(size=(9, 4, 3)), 9.0))


def test_reductions_of_one_position_and_of_constant_inputs(rng):
    """SKFAC-14: at one position every reduction is the dense layer; of constant a, reduce has K_A o K_G = U U^T."""
    a, g = pair(rng)
    V = rng.normal(size=(6, 7))
    want = direction(kf.SKFAC(rows=5), a, g, V)
    pixel = kf.Patches(a[:, None, None, :], kf.Window((1, 1)))
    for sharing in (kf.reduce, kf.mean_mean, kf.sum_sum, kf.Subsample(1)):
        method = kf.SKFAC(sharing, rows=5)
        assert close(direction(method, a[:, None], g[:, None], V), want, 1e-12)
        assert close(kf.direction(kf.Record(pixel, g[:, None], 5.0), V, method, 0.01), want, 1e-12)
    constant, gs = np.repeat(a[:, None], 4, 1), rng.normal(size=(5, 4, 6))
    reduced = kf.reduce(kf.Record(constant, gs, 5.0))
    K = (reduced.a[0, :, 0] @ reduced.a[0, :, 0].T) * (reduced.g[0, 0, :, 0] @ reduced.g[0, 0, :, 0].T)
    U = np.einsum("bso,bsi->boi", gs, constant).reshape(5, -1)
    assert close(K, U @ U.T, 1e-12)


def test_sums_and_means_differ_by_the_square_of_positions(rng):
    """SKFAC-15: A_sum = S^2 A_mean, so (S^2 A + d I)^-1 = (A + d / S^2 I)^-1 / S^2; alike for G."""
    a, g = rng.normal(size=(5, 3, 7)), rng.normal(size=(5, 3, 6))
    V = rng.normal(size=(6, 7))

    def solved(sharing, d_a, d_g):
        record = sharing(kf.Record(a, g, 5.0))
        return oracle(record.a[0, :, 0], record.g[0, 0, :, 0], V, d_a, d_g)

    method = kf.SKFAC(kf.sum_sum, kf.per_factor, rows=5)
    assert close(kf.direction(kf.Record(a, g, 5.0), V, method, 0.1), solved(kf.sum_sum, 0.1, 0.1))
    assert close(solved(kf.sum_sum, 0.1, 0.1), solved(kf.reduce, 0.1 / 9, 0.1) / 9)
    assert close(solved(kf.mean_mean, 0.1, 0.1), solved(kf.reduce, 0.1, 0.1 * 9) * 9)
    mask = np.ones((5, 3), bool)
    mask[1, 1:] = False
    masked = kf.Record(a, g, 5.0, mask)
    assert close(kf.mean_mean(masked).g[0, 0, 1, 0], g[1, 0], 1e-14)
    assert close(kf.sum_sum(masked).a[0, 1, 0], a[1, 0], 1e-14)


def test_a_folded_bias_adds_one_to_the_gram(rng):
    """SKFAC-16: K_A gains 1 1^T, so K_A o K_G gains K_G."""
    a, g = pair(rng)
    folded = np.concatenate([a, np.ones((5, 1))], 1)
    assert close(folded @ folded.T, a @ a.T + 1, 1e-14)
    assert close((folded @ folded.T) * (g @ g.T), (a @ a.T) * (g @ g.T) + g @ g.T, 1e-13)
    V = rng.normal(size=(6, 8))
    assert close(direction(LOW, folded, g, V), oracle(folded, g, V, *shifts(folded, g, 0.01)))


@ROWS
def test_the_inverse_is_positive_where_a_wrong_scale_is_not(B, rng):
    """SKFAC-17: the least eigenvalue is positive; with Y Y^T / B + B c I as small system it is not.

    A public implementation scales the small system by n twice: its inverse is indefinite on such data."""
    y, s = 3 * rng.normal(size=(B, 7)), 0.05
    inverse = woodbury.dense(woodbury.inverse(stack(y), np.full(1, s))[0])[0]
    assert np.linalg.eigvalsh(inverse).min() > 0
    if B > 1:
        wrong = (np.eye(7) - y.T @ np.linalg.inv(y @ y.T / B + B * s * np.eye(B)) @ y) / s
        assert np.linalg.eigvalsh(wrong).min() < 0


def decaying(rng, B=64, d=256):
    scale = np.logspace(0, -3, d)
    return rng.normal(size=(B, d)) * scale, rng.normal(size=(B, 96)) * scale[:96]


def float32_errors(record_rows, gradient_rows, damping=1e-8):
    """Relative errors of float32 against float64 arithmetic on the same numbers: rows, and the formed gradient."""
    found = []
    for kind in (lambda a, g: kf.Factored(a, g, float(len(a))), lambda a, g: g.T @ a / np.asarray(len(a), a.dtype)):
        exact, single = (
            kf.direction(
                kf.Record(*(x.astype(t) for x in record_rows), float(record_rows[0].shape[0])),
                kind(*(x.astype(t) for x in gradient_rows)),
                kf.SKFAC(split=kf.equal, rows=64, explicit=never),
                damping,
            )
            for t in (np.float64, np.float32)
        )
        assert single.dtype == np.float32
        found.append(np.linalg.norm(single - exact) / np.linalg.norm(exact))
    return found


def test_float32_with_the_gradients_own_rows(rng):
    a, g = (x.astype(np.float32) for x in decaying(rng))
    assert float32_errors((a, g), (a, g))[0] < 2e-6


def test_float32_with_stale_rows(rng):
    """Another batch's rows do not match: the difference is taken in float64, and rows lose nothing."""
    first, second = ([x.astype(np.float32) for x in decaying(rng)] for _ in range(2))
    assert float32_errors(first, second)[0] < 2e-6
    inverse, _ = woodbury.inverse(stack(first[0].astype(np.float64), 64), np.full(1, 1e-4))
    assert close(
        woodbury.times_rows(second[0][None].astype(np.float64), inverse)[0],
        woodbury.times(second[0][None].astype(np.float64), inverse)[0],
        1e-14,
    )


def test_float32_with_monte_carlo_rows(rng):
    """a is the gradient's own, g is another draw: push-through on the side of A alone."""
    a, g = (x.astype(np.float32) for x in decaying(rng))
    sampled = (g * rng.choice([-1.0, 1.0], size=(64, 1)) + 0.1 * rng.normal(size=g.shape)).astype(np.float32)
    assert float32_errors((a, sampled), (a, g))[0] < 2e-6
    A, G = (woodbury.inverse(stack(x, 64), np.full(1, np.float32(1e-4)))[0] for x in (a, sampled))
    rows = woodbury.times_rows(a[None], A), woodbury.times_rows(g[None], G)
    assert np.array_equal(rows[0], woodbury._pushed(A, 64))
    assert np.array_equal(rows[1], woodbury.times(g[None], G))


def test_push_through_in_its_own_dtype_beats_the_difference(rng):
    """What push-through is for: a small system of no more digits than the rows (no float64)."""
    a = decaying(rng)[0].astype(np.float32)
    inverse = woodbury.inverse(stack(a, 64), np.full(1, np.float32(1e-4)))[0]
    single = woodbury.LowRank(inverse.rows, inverse.scale, inverse.small.astype(np.float32), inverse.shift)
    exact = woodbury._pushed(inverse, 64)
    errors = [
        np.linalg.norm(x - exact) / np.linalg.norm(exact)
        for x in (woodbury._pushed(single, 64), woodbury.times(a[None], single))
    ]
    assert errors[0] < 3e-6
    assert errors[1] > 30 * errors[0]


def test_stacked_product_orders_agree(rng):
    a, g = pair(rng, 3, 30, 20)
    V = rng.normal(size=(1, 20, 30))
    A, G = stack(a), stack(g)
    want = G_dense(g) @ V[0] @ G_dense(a)
    for order in (None, True, False):
        assert close(stacked.product(G, V, A, order)[0], want, 1e-12)


def G_dense(y):
    return y.T @ y / len(y)


def test_fifty_steps_are_those_of_kfac(rng):
    """One batch as curvature, refreshed every step: the loss curve of dense K-FAC."""
    x, y = rng.normal(size=(16, 40)), rng.normal(size=(16, 30))
    curves = []
    for method in (kf.KFAC(), kf.SKFAC(rows=16)):
        W, losses = np.zeros((30, 40)), []
        pre = kf.Preconditioner(method, kf.Clocks(1, 1), kf.Schedules(0.1, 0.0))
        state = pre.init({"fc": kf.Block(30, 40)}, W)
        for _ in range(50):
            r = np.tanh(x @ W.T) - y
            losses.append(0.5 * np.mean(np.sum(r * r, 1)))
            g = r * (1 - (r + y) ** 2)
            updates, state, _ = pre.step(state, {"fc": kf.Record(x, g, 16.0)}, {"fc": kf.Factored(x, g, 16.0)})
            W = W - 0.3 * updates["fc"][0]
        curves.append(losses)
    np.testing.assert_allclose(*curves, rtol=1e-6)
    assert losses[-1] < 0.7 * losses[0]


def test_no_array_of_d_squared(rng):
    a, g = pair(rng, 4, 300, 200)
    state = kf.settle(kf.SKFAC(rows=8), kf.Record(a, g, 4.0))
    assert max(x.size for x in tree.leaves(state)) <= 8 * 300


@pytest.mark.parametrize("method", [kf.SKFAC(rows=6), LOW, release], ids=["default", "low", "release"])
def test_no_damping(method, rng):
    """Singular factors at damping 0: a code that says what was done, a finite direction."""
    a, g = pair(rng, 3)
    found = kf.settle(method, kf.Record(a, g, 3.0), damping=0.0)
    assert found.code.tolist() == [kf.Code.JITTERED]
    for V in (g.T @ a / 3, rng.normal(size=(6, 7))):
        assert np.isfinite(method.solve(found, V, kf.Hyper(0, 0.0, 0.0)).direction).all()


def test_refusals(rng):
    with pytest.raises(ValueError, match="split"):
        kf.SKFAC(split=kf.exact)
    with pytest.raises(ValueError, match="rank"):
        kf.SKFAC(rank=512)
    with pytest.raises(ValueError, match="zero draws"):
        kf.settle(LOW, kf.Record(rng.normal(size=(5, 7)), np.zeros((0, 5, 6)), 5.0))


@pytest.mark.parametrize("first", [kf.reduce, kf.expand, kf.mean_mean])
@pytest.mark.parametrize("bias", [True, False])
def test_receptive_field_mean(first, bias, xp):
    """A is I_K (x) A_c and a lone 1, whatever the spatial reduction; G stays that of the reduction."""
    rng = np.random.default_rng(0)
    window = kf.Window((2, 3), padding=1)
    image = rng.normal(size=(4, 5, 4, 3))
    patches = kf.Patches(image, window, bias=bias)
    g = rng.normal(size=(2, 4, patches.shape[2], 5))
    plain = first(kf.Record(patches, g, 4))
    mean = plain.rows()[..., :18].reshape(-1, 6, 3).mean(1)
    A = np.kron(np.eye(6), mean.T @ mean / len(mean))
    if bias:
        A = np.block([[A, np.zeros((18, 1))], [np.zeros((1, 18)), np.ones((1, 1))]])
    given = kf.Record(kf.Patches(xp.put(image), window, bias=bias), xp.put(g), 4)
    method = kf.SKFAC(sharing=kf.ReceptiveMean(6, bias, first))
    found = method.sharing(given)
    rows = xp.get(found.a).reshape(-1, 18 + bias)
    np.testing.assert_allclose(rows.T @ rows / len(rows), A, rtol=1e-12, atol=1e-13)
    gs, wanted = xp.get(found.g).reshape(-1, 5), plain.g.reshape(-1, 5)
    np.testing.assert_allclose(gs.T @ gs, wanted.T @ wanted, rtol=1e-12)
    with pytest.raises(ValueError, match="positions of equal channels"):
        kf.ReceptiveMean(5, bias)(given)
