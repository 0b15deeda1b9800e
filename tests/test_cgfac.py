"""CG-FAC against dense oracles in float64; identities CGFAC-1 to CGFAC-16."""

from __future__ import annotations

import math
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest

import kfaccore as kf
from kfaccore import tree
from kfaccore.linalg import cg
from kfaccore.linalg.cg import CG, Iterations, Progress, Residual
from kfaccore.methods.rows import span
from kfaccore.methods.rows.cgfac import Empirical, InRows, Kron, KronFactored
from kfaccore.methods.rows.factors import always
from kfaccore.settle import cycle

SIZES = pytest.mark.parametrize("sizes", [(5, 7, 6), (20, 7, 6), (6, 6, 6), (3, 1, 4), (1, 5, 4)], ids=str)
LONG = CG(Residual(1e-14), 400)
KINDS = {
    "kron": Kron(branch=always),
    "kron-matrices": Kron(),
    "factored": KronFactored(branch=always),
    "sides": KronFactored(branch=always, one_side=True),
    "empirical": Empirical(),
}
EVERY = pytest.mark.parametrize("kind", KINDS)
N_HYPER = kf.Hyper(0, 0.0, 0.1)


def close(x, y, tolerance=1e-11):
    x, y = np.asarray(x), np.asarray(y)
    return np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y)


def pair(rng, sizes):
    B, d_in, d_out = sizes
    return rng.normal(size=(B, d_in)), rng.normal(size=(B, d_out))


def method(kind, solver=LONG, rows=64):
    return kf.CGFAC(KINDS[kind] if isinstance(kind, str) else kind, solver, rows)


def settled(kind, a, g, damping=0.1, n=None, solver=LONG):
    return kf.settle(method(kind, solver), kf.Record(a, g, n or float(len(a))), damping=damping)


def solved(kind, a, g, V, damping=0.1, solver=LONG, n=None):
    state = settled(kind, a, g, damping, n, solver)
    return method(kind, solver).solve(state, V, kf.Hyper(0, 0.0, damping))


def matrix(kind, a, g, damping, n=None):
    """The damped operator, dense."""
    n = n or len(a)
    A, G = a.T @ a / len(a), g.T @ g / n
    P = a.shape[1] * g.shape[1]
    if kind in ("factored", "sides"):
        pi = np.sqrt(np.trace(A) / len(A) / (np.trace(G) / len(G)))
        return np.kron(G + damping**0.5 / pi * np.eye(len(G)), A + pi * damping**0.5 * np.eye(len(A)))
    if kind == "empirical":
        U = np.einsum("no,ni->noi", g, a).reshape(len(a), -1)
        return U.T @ U / n + damping * np.eye(P)
    return np.kron(G, A) + damping * np.eye(P)


def oracle(kind, a, g, V, damping):
    return np.linalg.solve(matrix(kind, a, g, damping), V.ravel()).reshape(V.shape)


def apply(kind, a, g, V, damping=0.1):
    operator = KINDS[kind] if isinstance(kind, str) else kind
    (system,) = operator.systems(settled(operator, a, g).parts, damping)
    return system(V[None])[0]


@SIZES
@pytest.mark.parametrize("kind", ["kron", "kron-matrices", "factored"])
def test_both_product_orders_are_the_dense_operator(sizes, kind, rng):
    """CGFAC-1: (1/B^2) g^T (g V a^T) a + c V = G V A + c V, in both orders."""
    a, g = pair(rng, sizes)
    V = rng.normal(size=(sizes[2], sizes[1]))
    want = (matrix(kind, a, g, 0.1) @ V.ravel()).reshape(V.shape)
    assert close(apply(kind, a, g, V), want, 1e-13)
    if kind == "kron":
        for order in (True, False):
            assert close(apply(Kron(branch=always, through_batch=order), a, g, V), want, 1e-13)


def test_the_product_order_follows_the_cost(rng, monkeypatch):
    """CGFAC-1: through the batch iff rows < harmonic mean of d_in and d_out; never for unfolded rows that forbid it."""
    import kfaccore.methods.rows.factors as module

    for rows, through in ((11, True), (13, False)):  # harmonic mean of 20 and 8.57 is 12
        a, g = pair(rng, (rows, 20, 9))
        V, calls = rng.normal(size=(9, 20)), []
        state = kf.settle(method("kron", rows=rows), kf.Record(a, g, rows))
        original = module.times
        monkeypatch.setattr(module, "times", lambda v, f, c=calls, o=original: c.append(1) or o(v, f))
        method("kron").matvec(state, V[None], N_HYPER)
        monkeypatch.setattr(module, "times", original)
        assert (not calls) == through


@SIZES
def test_the_empirical_operator_is_the_dense_one(sizes, rng):
    """CGFAC-2: (1/B) sum_n g_n (g_n^T V a_n) a_n^T + c V = F V + c V."""
    a, g = pair(rng, sizes)
    V = rng.normal(size=(sizes[2], sizes[1]))
    assert close(apply("empirical", a, g, V), (matrix("empirical", a, g, 0.1) @ V.ravel()).reshape(V.shape), 1e-13)


def test_the_empirical_operator_with_shared_positions_and_draws(rng):
    """CGFAC-2: F V of whole examples, or of positions as examples, with draws and blocks."""
    a, g = rng.normal(size=(2, 4, 3, 5)), rng.normal(size=(2, 2, 4, 3, 6))
    record, v = kf.Record(a, g, 3.0), rng.normal(size=(2, 6, 5))
    state = kf.settle(method("empirical"), record)
    want = np.stack([(F @ x.ravel()).reshape(x.shape) for F, x in zip(kf.dense(record), v, strict=True)])
    assert close(method("empirical").matvec(state, v, N_HYPER), want, 1e-13)
    token = kf.settle(method(Empirical(kf.expand)), record)
    want = np.stack([(F @ x.ravel()).reshape(x.shape) for F, x in zip(kf.dense(kf.expand(record)), v, strict=True)])
    assert close(method("empirical").matvec(token, v, N_HYPER), want, 1e-13)


@SIZES
@pytest.mark.parametrize("kind", ["kron", "factored", "empirical"])
def test_operators_are_symmetric_and_bounded_below_by_damping(sizes, kind, rng):
    """CGFAC-3: <U, Op V> = <Op U, V> and <V, Op V> >= c |V|^2."""
    a, g = pair(rng, sizes)
    u, v = rng.normal(size=(2, sizes[2], sizes[1]))
    Au, Av = (apply(kind, a, g, x) for x in (u, v))
    assert np.sum(u * Av) == pytest.approx(np.sum(Au * v), rel=1e-12, abs=1e-12)
    assert np.sum(v * Av) >= 0.1 * np.sum(v * v) * (1 - 1e-12)


@SIZES
@EVERY
def test_converged_is_the_dense_solve(sizes, kind, rng):
    """CGFAC-4: at a residual of 1e-14 X is Op^-1 V of the dense matrix."""
    a, g = pair(rng, sizes)
    V = rng.normal(size=(sizes[2], sizes[1]))
    found = solved(kind, a, g, V)
    assert close(found.direction, oracle(kind, a, g, V, 0.1))
    assert found.code.tolist() == [kf.Code.OK]


@SIZES
@pytest.mark.parametrize("kind", ["kron", "empirical"])
def test_iterations_are_bounded_by_the_rank(sizes, kind, rng):
    """CGFAC-5: no more than rank(a) rank(g) + 1, or rank(K) + 1, iterations, and what rounding adds."""
    a, g = pair(rng, sizes)
    found = solved(kind, a, g, g.T @ a / len(a), solver=CG(Residual(1e-12), 400))
    rank = np.linalg.matrix_rank
    K = (a @ a.T) * (g @ g.T)
    bound = (rank(a) * rank(g) if kind == "kron" else rank(K)) + 1
    assert found.info["iterations"][0] <= math.ceil(1.3 * bound) + 5


def test_few_distinct_rows_need_few_iterations(rng):
    """CGFAC-5: two distinct a and three distinct g: at most 2 * 3 + 1, and rank(K) + 1, iterations."""
    a, g = rng.normal(size=(2, 7))[[0, 1, 0, 1, 0, 1]], rng.normal(size=(3, 6))[[0, 1, 2, 1, 0, 2]]
    V = g.T @ a / 6
    assert solved("kron", a, g, V, solver=CG(Residual(1e-12))).info["iterations"][0] <= 7
    K = (a @ a.T) * (g @ g.T)
    found = solved("empirical", a, g, V, solver=CG(Residual(1e-12)))
    assert found.info["iterations"][0] <= np.linalg.matrix_rank(K) + 1


@EVERY
def test_error_and_phi_fall_at_every_iteration(kind, rng):
    """CGFAC-6: |X_k - X*|_Op and phi(X_k) = <X, Op X> / 2 - <V, X> fall with k."""
    a, g = pair(rng, (5, 7, 6))
    V = rng.normal(size=(6, 7))
    M, want = matrix(kind, a, g, 0.1), oracle(kind, a, g, V, 0.1).ravel()
    if kind == "sides":
        return  # two systems, one after the other: no common phi
    errors = []
    for k in range(1, 16):
        x = solved(kind, a, g, V, solver=CG(Iterations(k))).direction.ravel()
        errors.append((x - want) @ M @ (x - want))
        phi = 0.5 * x @ M @ x - V.ravel() @ x
        assert phi == pytest.approx(0.5 * errors[-1] - 0.5 * want @ M @ want, rel=1e-9)
    assert all(after < before or after < 1e-20 for before, after in pairwise(errors))
    assert errors[0] < want @ M @ want


@pytest.mark.parametrize("kind", ["kron", "factored", "empirical"])
def test_one_iteration_is_steepest_descent(kind, rng):
    """CGFAC-7: X_1 = (|V|^2 / <V, Op V>) V."""
    a, g = pair(rng, (5, 7, 6))
    V = rng.normal(size=(6, 7))
    found = solved(kind, a, g, V, solver=CG(Iterations(1)))
    b = V.ravel()
    assert close(found.direction, (b @ b) / (b @ matrix(kind, a, g, 0.1) @ b) * V, 1e-13)
    assert found.info["iterations"].tolist() == [1]
    assert found.code.tolist() == [kf.Code.OK]


@EVERY
def test_the_solution_does_not_depend_on_the_start(kind, rng):
    """CGFAC-8: from zero, another solution or its own, X is the dense solve."""
    a, g = pair(rng, (5, 7, 6))
    warm = CG(Residual(1e-13), 400, warm=1.0)
    state, hyper = settled(kind, a, g, solver=warm), kf.Hyper(0, 0.0, 0.1)
    V, other = rng.normal(size=(2, 6, 7))
    want = oracle(kind, a, g, V, 0.1)
    first = method(kind, warm).solve(state, other, hyper)
    second = method(kind, warm).solve(first.state, V, hyper)
    again = method(kind, warm).solve(second.state, V, hyper)
    assert close(second.direction, want, 1e-10)
    assert close(again.direction, want, 1e-10)
    assert again.info["iterations"][0] <= (1 if kind != "sides" else 60)
    assert not close(second.state.start[0], other, 0.1)


def test_starting_at_the_solution_takes_no_iteration(rng):
    """CGFAC-8: X_0 = Op^-1 V takes 0 iterations."""
    M = rng.normal(size=(5, 5))
    M = M @ M.T + np.eye(5)
    V = rng.normal(size=(1, 1, 5))
    X = np.linalg.solve(M, V[0, 0])[None, None]
    found = cg.solve(lambda v: v @ M, V, CG(Residual(1e-12)), start=X)
    assert found.iterations.tolist() == [0]
    assert close(found.x, X, 1e-14)


@EVERY
def test_zero_gradients_take_no_iteration(kind, rng):
    """CGFAC-9: V = 0 gives X = 0 in 0 iterations; g = 0 gives X = V / c."""
    a, g = pair(rng, (5, 7, 6))
    for given in (g, 0 * g):
        found = solved(kind, a, given, np.zeros((6, 7)))
        assert not found.direction.any()
        assert found.info["iterations"].tolist() == [0]
        assert found.code.tolist() == [kf.Code.OK]
    V = rng.normal(size=(6, 7))
    if kind not in ("factored", "sides"):  # no curvature: damping alone
        assert close(solved(kind, a, 0 * g, V).direction, V / 0.1, 1e-13)


@pytest.mark.parametrize("kind", ["kron", "empirical"])
def test_one_example_is_a_multiple_of_its_gradient(kind, rng):
    """CGFAC-10: X = V / (|a|^2 |g|^2 + c)."""
    a, g = pair(rng, (1, 7, 6))
    V = g.T @ a
    assert close(solved(kind, a, g, V).direction, V / ((a**2).sum() * (g**2).sum() + 0.1), 1e-13)


@pytest.mark.parametrize("kind", ["kron", "factored", "empirical"])
def test_large_damping_turns_to_the_gradient(kind, rng):
    """CGFAC-11: c X -> V as c grows."""
    a, g = pair(rng, (5, 7, 6))
    V = rng.normal(size=(6, 7))
    assert close(solved(kind, a, g, V, 1e14).direction * 1e14, V, 1e-5)


@pytest.mark.parametrize("solver", [CG(Residual(1e-13), 2000), InRows()], ids=["cg", "rows"])
def test_small_damping_matches_every_example(solver, rng):
    """CGFAC-11: <J_n, X> -> 1 and X -> pinv(F) V as c vanishes; InRows takes a difference, which loses eps times the
    largest eigenvalue over c, here 1e-4."""
    a, g = pair(rng, (5, 7, 6))
    DW = g.T @ a / 5
    x = solved("empirical", a, g, DW, 1e-10, solver).direction
    U = np.einsum("no,ni->noi", g, a).reshape(5, -1)
    np.testing.assert_allclose(U @ x.ravel(), 1, rtol=1e-3 if isinstance(solver, InRows) else 1e-6)
    want = np.linalg.pinv(U.T @ U / 5, rcond=1e-12) @ DW.ravel()
    assert close(x.ravel(), want, 1e-3 if isinstance(solver, InRows) else 1e-6)


@SIZES
@pytest.mark.parametrize("kind", ["kron", "empirical"])
def test_closed_forms_in_the_space_of_the_rows(sizes, kind, rng):
    """CGFAC-12: kron X = g^T M a / B, K_G M K_A / B^2 + c M = I; empirical X = sum_n y_n J_n, (K + B c I) y = 1."""
    a, g = pair(rng, sizes)
    B = len(a)
    for V in (g.T @ a / B, rng.normal(size=(sizes[2], sizes[1]))):  # in the span of the rows, and not
        rows = solved(kind, a, g, V, solver=InRows()).direction
        assert close(rows, oracle(kind, a, g, V, 0.1))
        assert close(rows, solved(kind, a, g, V).direction)
    scale, shift = B**-0.5, np.full(1, 0.1)
    if kind == "kron":
        M = span.coefficients(g[None] * scale, a[None] * scale, np.eye(B)[None], shift)[0]
        assert close(g.T @ M @ a / B, oracle(kind, a, g, g.T @ a / B, 0.1), 1e-12)
        K_A, K_G = a @ a.T, g @ g.T
        assert close(K_G @ M @ K_A / B**2 + 0.1 * M, np.eye(B), 1e-12)
    else:
        c = np.linalg.solve((a @ a.T) * (g @ g.T) + B * 0.1 * np.eye(B), np.ones(B))
        assert close((g * c[:, None]).T @ a, oracle(kind, a, g, g.T @ a / B, 0.1), 1e-12)


def test_closed_forms_with_shared_positions(rng):
    """CGFAC-12: CG and the closed form solve (F + c I) X = V of whole examples with draws."""
    record = kf.Record(rng.normal(size=(4, 3, 5)), rng.normal(size=(2, 4, 3, 6)), 4.0)
    V = rng.normal(size=(6, 5))
    want = np.linalg.solve(kf.dense(record)[0] + 0.1 * np.eye(30), V.ravel()).reshape(6, 5)
    for solver in (LONG, InRows()):
        assert close(kf.direction(record, V, method("empirical", solver), 0.1), want)


@EVERY
def test_duplicating_permuting_scaling(kind, rng):
    """CGFAC-13: a copied or permuted batch has the same X; g, V times s and c times s^2 have X / s."""
    a, g = pair(rng, (5, 7, 6))
    V, order = rng.normal(size=(6, 7)), rng.permutation(5)
    want = solved(kind, a, g, V).direction
    assert close(solved(kind, np.tile(a, (2, 1)), np.tile(g, (2, 1)), V).direction, want)
    assert close(solved(kind, a[order], g[order], V).direction, want)
    assert close(solved(kind, a, 3 * g, 3 * V, 0.9).direction, want / 3)


def test_factored_is_skfac_and_kfac(rng):
    """CGFAC-14: CG on (G + c_G I) V (A + c_A I) ends in SKFAC's and K-FAC's direction."""
    for B in (3, 20):
        a, g = pair(rng, (B, 7, 6))
        V, record = rng.normal(size=(6, 7)), kf.Record(a, g, float(B))
        want = kf.direction(record, V, kf.KFAC(), 0.1)
        assert close(kf.direction(record, V, kf.SKFAC(branch=always, rows=B), 0.1), want, 1e-12)
        for kind in ("factored", "sides"):
            assert close(solved(kind, a, g, V, solver=CG(Residual(1e-15), 400)).direction, want, 1e-12)


@EVERY
@pytest.mark.parametrize("power", [0.75, 1.0])
def test_preconditioning_leaves_the_solution(kind, power, rng):
    """CGFAC-15: Jacobi-preconditioned X is the dense solve, and the diagonal is the operator's."""
    a, g = pair(rng, (5, 7, 6))
    V = rng.normal(size=(6, 7))
    found = solved(kind, a, g, V, solver=CG(Residual(1e-13), 800, jacobi=power))
    assert close(found.direction, oracle(kind, a, g, V, 0.1))
    if kind in ("kron", "empirical"):
        parts = settled(kind, a, g).parts
        (diagonal,) = KINDS[kind].diagonals(parts, 0.1)
        assert close(diagonal.ravel(), np.diag(matrix(kind, a, g, 0.1)), 1e-13)


@pytest.mark.parametrize("kind", ["kron", "factored", "empirical"])
def test_nothing_of_d_squared_is_allocated(kind, rng):
    """CGFAC-16: d_in 4,096, d_out 8, 8 rows: a whole cycle peaks under 10 times the weights plus the rows."""
    a, g = pair(rng, (8, 4096, 8))
    V, record = rng.normal(size=(8, 4096)), kf.Record(a, g, 8.0)
    chosen = method(kind, CG(Iterations(10)), rows=8)
    state = chosen.init(kf.Block.of(record), V)
    assert max(leaf.size for leaf in tree.leaves(state)) <= 8 * 4096
    tracemalloc.start()
    state = cycle(chosen, state, record, N_HYPER)
    chosen.solve(state, V, N_HYPER)
    peak = tracemalloc.get_traced_memory()[1] / 8
    tracemalloc.stop()
    assert peak < 10 * V.size + 8 * (4096 + 8)


def records(kind, B, rng):
    """A layer's record and the gradient of its batch."""
    if kind == "conv":
        patches = kf.Patches(rng.normal(size=(B, 5, 5, 2)), kf.Window((3, 3), stride=2, padding=1), bias=True)
        return kf.Record(patches, rng.normal(size=(B, 9, 4)), float(B))
    shape = (B, 3) if kind == "sequence" else (B,)
    a = rng.normal(size=(*shape, 7))
    a[..., -1] = 1.0 if kind == "bias" else a[..., -1]
    return kf.Record(a, rng.normal(size=(*shape, 6)), 1.0 if kind == "sum loss" else float(B))


@pytest.mark.parametrize("kind", ["linear", "bias", "sum loss", "sequence", "conv"])
@pytest.mark.parametrize("damping", [1e-8, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("B", [1, 3, 7, 28])
def test_methods_that_must_agree(kind, damping, B, rng):
    """CG on F = F in the space of its rows = FNGD = dense; CG on damped factors = SKFAC = K-FAC of one batch;
    CG on G (x) A + damping I = its closed form = K-FAC with exact damping."""
    record = records(kind, B, rng)
    V = record.examples().sum((0, 2))[0] / record.n
    long, room = CG(Residual(1e-15), 3000), record.batch * record.shared
    groups = {
        "empirical": [
            kf.Exact(),
            kf.CGFAC(Empirical(), long, room),
            kf.CGFAC(Empirical(), InRows(), room),
            kf.FNGD(),
        ],
        "factored": [
            kf.KFAC(),
            kf.SKFAC(branch=always, rows=room),
            kf.CGFAC(KronFactored(branch=always), long, room),
            kf.CGFAC(KronFactored(branch=always, one_side=True), long, room),
        ],
        "kron": [
            kf.KFAC(inverse=kf.eigh, split=kf.exact),
            kf.CGFAC(Kron(branch=always), long, room),
            kf.CGFAC(Kron(branch=always), InRows(), room),
        ],
    }
    hyper = kf.Hyper(0, 0.0, damping)
    for chosen in groups.values():
        found = []
        for one in chosen:
            solution = one.solve(kf.settle(one, record, damping=damping), V, hyper, record)
            assert solution.code.tolist() == [kf.Code.OK], one
            found.append(solution.direction)
        for one, x in zip(chosen, found, strict=True):
            assert close(x, found[0], 1e-9 if damping >= 1e-3 else 1e-3), one


@pytest.mark.parametrize("B", [1, 3, 28])
@pytest.mark.parametrize("damping", [1e-2, 1.0, 1e6])
def test_float32_agrees(B, damping, rng):
    a, g = pair(rng, (B, 7, 6))
    V, single = g.T @ a / B, [x.astype(np.float32) for x in (a, g)]
    for one in (
        kf.CGFAC(KINDS["kron"], LONG, 64),
        kf.CGFAC(KINDS["empirical"], LONG, 64),
        kf.CGFAC(KINDS["empirical"], InRows(), 64),
        kf.SKFAC(branch=always, rows=64),
        kf.FNGD(),
    ):
        hyper, found = kf.Hyper(0, 0.0, damping), []
        for x, y, v in ((a, g, V), (*single, V.astype(np.float32))):
            record = kf.Record(x, y, float(B))
            found.append(one.solve(kf.settle(one, record, damping=damping), v, hyper, record).direction)
        assert found[1].dtype == np.float32
        assert close(found[1], found[0], 2e-4 if damping < 1 else 1e-5), one


def test_blocks_end_on_their_own(rng):
    """Each block has its own alpha, beta and end: stacked blocks are what each gives alone."""
    a, g = rng.normal(size=(2, 6, 1, 5)), rng.normal(size=(2, 6, 1, 4))
    a[1] = a[1, :1]  # one distinct row: rank 1
    V, hyper = rng.normal(size=(2, 4, 5)), kf.Hyper(0, 0.0, 0.1)
    both = method("kron", CG(Residual(1e-10))).solve(kf.settle(method("kron"), kf.Record(a, g[None], 6.0)), V, hyper)
    for block in range(2):
        alone = solved("kron", a[block, :, 0], g[block, :, 0], V[block], solver=CG(Residual(1e-10)))
        assert close(both.direction[block], alone.direction, 1e-13)
        assert both.info["iterations"][block] == alone.info["iterations"][0]
    assert both.info["iterations"][0] > both.info["iterations"][1]


def test_unconverged_is_said(rng):
    a, g = pair(rng, (20, 7, 6))
    V = rng.normal(size=(6, 7))
    found = solved("kron", a, g, V, solver=CG(Residual(1e-12), 3))
    assert found.code.tolist() == [kf.Code.UNCONVERGED]
    assert found.info["iterations"].tolist() == [3]
    rest = V - (matrix("kron", a, g, 0.1) @ found.direction.ravel()).reshape(V.shape)
    assert found.info["residual"][0] == pytest.approx(np.linalg.norm(rest) / np.linalg.norm(V), rel=1e-10)


def test_an_operator_that_is_not_positive(rng):
    V = rng.normal(size=(2, 1, 4))
    M = np.stack([np.diag([1.0, 2, 3, 4]), -np.eye(4)])
    found = cg.solve(lambda v: v @ M, V, CG(Residual(1e-12)))
    assert found.code.tolist() == [kf.Code.OK, kf.Code.INDEFINITE]
    assert close(found.x[0, 0], V[0, 0] / [1, 2, 3, 4], 1e-12)
    assert not found.x[1].any()


def test_no_damping_on_a_singular_operator(rng):
    """In the span of the rows the least-norm solution; outside it a code or a finite answer, never NaN."""
    a, g = pair(rng, (3, 7, 6))
    DW = g.T @ a / 3
    x = solved("empirical", a, g, DW, 0.0).direction
    F = matrix("empirical", a, g, 0.0)
    assert close(x.ravel(), np.linalg.pinv(F, rcond=1e-12) @ DW.ravel(), 1e-8)
    for kind in ("kron", "empirical"):
        assert np.isfinite(solved(kind, a, g, rng.normal(size=(6, 7)), 0.0).direction).all()
        assert np.isfinite(solved(kind, a, g, DW, 0.0, InRows()).direction).all()


def test_progress_is_martens_rule(rng):
    M = np.diag(np.logspace(0, 5, 60))
    V = rng.normal(size=(1, 1, 60))
    stop = Progress()
    found = cg.solve(lambda v: v @ M, V, CG(stop, 200))
    k = int(found.iterations[0])
    phi = [0.0]
    for i in range(1, k + 1):
        x = cg.solve(lambda v: v @ M, V, CG(Iterations(i), 200)).x
        phi.append((0.5 * np.sum(x * (x @ M)) - np.sum(x * V)) / np.sum(V * V))
    held = [
        i
        for i in range(11, k + 1)
        if phi[i] < 0 and i > (j := max(10, int(0.1 * i))) and (phi[i] - phi[i - j]) / phi[i] < j * 5e-4
    ]
    assert held == [k]
    assert found.code.tolist() == [kf.Code.OK]
    assert found.residual[0] > 1e-12


def test_the_residual_is_renewed(rng):
    """Every 50 iterations the recurrence is replaced: in float32 the reported residual is the true one."""
    M = np.diag(np.logspace(0, 4, 200)).astype(np.float32)
    V = rng.normal(size=(1, 1, 200)).astype(np.float32)
    found = cg.solve(lambda v: v @ M, V, CG(Iterations(100), 100))
    true = np.linalg.norm(V - found.x @ M) / np.linalg.norm(V)
    assert found.residual[0] == pytest.approx(true, rel=1e-2)


@EVERY
def test_moving_averages(kind, rng):
    """Exact while the rows fit; what leaves takes its mass along."""
    batches = [pair(rng, (B, 9, 8)) for B in (4, 6, 5)]
    for rows, used in ((15, batches), (11, batches[1:])):
        chosen, hyper = method(kind, rows=rows), kf.Hyper(0, 0.7, 0.1)
        state = chosen.init(kf.Block(8, 9), batches[0][0])
        for a, g in batches:
            state = cycle(chosen, state, kf.Record(a, g, float(len(a))), hyper)
        if rows == 11 and kind == "kron-matrices":
            continue  # a matrix forgets nothing
        V = rng.normal(size=(8, 9))
        w = 0.3 * 0.7 ** np.arange(2, -1, -1)[-len(used) :]
        w = w / w.sum()
        if kind == "empirical":
            F = sum(k * matrix(kind, a, g, 0.0) for k, (a, g) in zip(w, used, strict=True))
            want = (F @ V.ravel()).reshape(V.shape)
        else:
            A, G = (sum(k * b[i].T @ b[i] / len(b[i]) for k, b in zip(w, used, strict=True)) for i in (0, 1))
            want = G @ V @ A
        assert close(chosen.matvec(state, V[None], hyper)[0], want, 1e-12)


def test_an_example_leaves_whole(rng):
    """Room for one and a half of the old examples of two positions: the half is not kept."""
    first, second = (kf.Record(rng.normal(size=(2, 2, 5)), rng.normal(size=(2, 2, 4)), 2.0) for _ in range(2))
    chosen, hyper = method("empirical", rows=7), kf.Hyper(0, 0.5, 0.1)
    state = chosen.init(kf.Block(4, 5), first.g)
    for record in (first, second, second, first, second):
        state = cycle(chosen, state, record, hyper)
    kept = kf.Record(first.a[:, :1], first.g[:, :, :1], 1.0)
    F = (0.5 * kf.dense(second) + 0.125 * kf.dense(kept)) / 0.625
    # the kept example has share 0.5 0.5 / 2 of the first's n, and half of its mass
    V = rng.normal(size=(1, 4, 5))
    assert close(chosen.matvec(state, V, hyper).ravel(), F[0] @ V.ravel(), 1e-12)


def test_a_batch_that_does_not_fit(rng):
    a, g = pair(rng, (9, 7, 6))
    with pytest.raises(ValueError, match="room for 8"):
        kf.settle(method("empirical", rows=8), kf.Record(a, g, 9.0))
    state = kf.settle(method("empirical", rows=8), kf.Record(a[:8], g[:8], 8.0))
    assert state.parts.a.shape == (1, 8, 7)


def test_refusals(rng):
    a, g = pair(rng, (5, 7, 6))
    with pytest.raises(ValueError, match="limit"):
        CG(limit=0)
    with pytest.raises(ValueError, match="warm"):
        CG(warm=1.5)
    with pytest.raises(ValueError, match="SKFAC"):
        solved("factored", a, g, g.T @ a, solver=InRows())
    with pytest.raises(ValueError, match="branch=always"):
        solved("kron-matrices", a, g, g.T @ a, solver=InRows())
    with pytest.raises(TypeError, match="embedding"):
        kf.settle(method("empirical"), kf.Record(kf.Ids(np.zeros(5, int), 7), g, 5.0))
    with pytest.raises(ValueError, match="zero draws"):
        kf.settle(method("empirical"), kf.Record(a, np.zeros((0, 5, 6)), 5.0))


def test_under_jit(rng):
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    a, g = pair(rng, (5, 7, 6))
    V = rng.normal(size=(6, 7))
    for kind in ("kron", "sides", "empirical"):

        def run(a, g, V, kind=kind):
            return kf.direction(kf.Record(a, g, 5.0), V, method(kind), 0.1)

        got = jax.jit(run)(*(jax.numpy.asarray(x) for x in (a, g, V)))
        assert close(np.asarray(got), oracle(kind, a, g, V, 0.1))


def test_training_with_a_truncated_iteration(rng):
    """Ten iterations, warm: the loss of a small regression falls as with K-FAC's own steps, within a factor."""
    x = rng.normal(size=(64, 12)) * np.logspace(0, -1.5, 12)
    y = np.tanh(x @ rng.normal(size=(12, 5)))
    ends = {}
    for name, chosen in (
        ("kfac", kf.KFAC()),
        ("cg", kf.CGFAC(Kron(branch=always), CG(Iterations(10), warm=0.5), rows=64)),
        ("none", kf.Identity()),
    ):
        W, pre = np.zeros((5, 12)), kf.Preconditioner(chosen, kf.Clocks(1, 1), kf.Schedules(1e-2, 0.0))
        state = pre.init({"fc": kf.Block(5, 12)}, W)
        for _ in range(20):
            r = np.tanh(x @ W.T) - y
            g = r * (1 - (r + y) ** 2)
            updates, state, _ = pre.step(state, {"fc": kf.Record(x, g, 64.0)}, {"fc": g.T @ x / 64})
            W = W - 0.05 * updates["fc"]
        ends[name] = 0.5 * np.mean(np.sum((np.tanh(x @ W.T) - y) ** 2, 1))
    assert ends["cg"] < 0.5 * ends["none"]
