"""TwoLevel against dense float64 matrices on four layers of unequal size, one a convolution."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import block_diag

import kfaccore as kf
from kfaccore import network as net
from kfaccore.network.two_level.matrices import kronecker
from rows import arrays

DAMPING = 0.05
SHAPES = {"first": (3, 4), "conv": (2, 5), "third": (2, 3), "head": (4, 2)}
SPACES = {
    "nicolaides": net.Nicolaides(),
    "spectral": net.Spectral(),
    "residual": net.Residual(),
    "krylov-nicolaides": net.Krylov(),
    "krylov-residual": net.Krylov(net.Residual()),
    "enriched": net.Enriched(4),
}


def problem(rng, put=np.array, draws=2, batch=9):
    """Records of one batch that share a cause, so that F has strong blocks between layers, and gradients."""
    cause = rng.normal(size=(batch, 1, 1))
    image = rng.normal(size=(batch, 3, 3, 1)) + cause[..., None]
    records = {"conv": (kf.Patches(put(image), kf.Window((2, 2)), bias=True), rng.normal(size=(draws, batch, 4, 2)))}
    for name in ("first", "third", "head"):
        d_out, d_in = SHAPES[name]
        records[name] = put(rng.normal(size=(batch, 1, d_in)) + cause), rng.normal(size=(draws, batch, 1, d_out))
    found = {n: kf.Record(a, put(g * (0.5 + cause) + 0.4 * cause), float(batch)) for n, (a, g) in records.items()}
    grads = {n: put(rng.normal(size=(1, *SHAPES[n]))) for n in SHAPES}
    return {n: found[n] for n in SHAPES}, grads


def blocks(records):
    return {name: kf.Block.of(record) for name, record in records.items()}


def fitted(method, records, damping=DAMPING):
    """State of one measure, update and refresh without memory."""
    hypers = {name: kf.Hyper(0, 0.0, damping) for name in records}
    state = method.init(blocks(records), next(iter(records.values())).g)
    state = method.update(state, method.measure(state, records, hypers), hypers)
    return method.refresh(state, hypers), hypers


def solved(method, records, grads, damping=DAMPING):
    state, hypers = fitted(method, records, damping)
    return method.solve(state, grads, hypers, records)


def flat(tree):
    return np.concatenate([np.ravel(tree[name]) for name in SHAPES])


def split(v):
    found = {}
    for name, (d_out, d_in) in SHAPES.items():
        found[name], v = v[: d_out * d_in].reshape(1, d_out, d_in), v[d_out * d_in :]
    return found


def jacobian(records):
    return np.concatenate([r.examples().reshape(r.draws * r.batch, -1) for r in (records[n] for n in SHAPES)], axis=1)


def curvature(records, damping=DAMPING):
    J = jacobian(records)
    return J.T @ J / records["first"].n + damping * np.eye(J.shape[1])


def factors(record):
    a, g = record.rows().reshape(-1, record.d_in), record.g.reshape(-1, record.d_out)
    return a.T @ a / len(a), g.T @ g / record.n


def fine(records, damping=DAMPING):
    """M, K-FAC's damped block-diagonal matrix, and the factors of each layer."""
    found = {}
    for name in SHAPES:
        A, G = factors(records[name])
        pi = np.sqrt(np.trace(A) / len(A) / (np.trace(G) / len(G)))
        shift = np.sqrt(damping)
        found[name] = np.kron(G + shift / pi * np.eye(len(G)), A + pi * shift * np.eye(len(A)))
    return block_diag(*found.values())


def rows(space, records, grads, damping=DAMPING):
    """R of a space, from its definition."""
    M, F, g = fine(records, damping), curvature(records, damping), flat(grads)
    r = g - F @ np.linalg.solve(M, g)
    found, at = [], 0
    for name, (d_out, d_in) in SHAPES.items():
        here = np.zeros(len(g))
        here[at : at + d_out * d_in] = 1.0
        at += d_out * d_in
        (a, Qa), (h, Qg) = (np.linalg.eigh(x) for x in factors(records[name]))
        modes = np.kron(Qg, Qa)
        if space == "nicolaides":
            local = [here]
        elif space == "spectral":
            local = [_at(here, modes[:, np.argmin(np.kron(h, a))])]
        elif space == "residual":
            local = [np.linalg.solve(M, here * r)]
        elif space == "krylov-nicolaides":
            local = [here, np.linalg.solve(M, here)]
        elif space == "krylov-residual":
            local = [np.linalg.solve(M, here * r), np.linalg.solve(M, np.linalg.solve(M, here * r))]
        else:
            order = np.argsort(-np.abs(modes.T @ grads[name].ravel()))[:3]
            local = [here, *(_at(here, modes[:, i]) for i in order)]
        found += [v / np.abs(v).max() for v in local]
    return np.stack(found)


def _at(here, v):
    full = np.zeros(len(here))
    full[here > 0] = v
    return full


def energy(F, z, g):
    gap = z - np.linalg.solve(F, g)
    return gap @ F @ gap


def exact_step(records, grads, damping=DAMPING):
    """F_d^-1 g through the Gram matrix, never forming F."""
    J, g, n = jacobian(records), flat(grads), records["first"].n
    inner = np.linalg.solve(np.eye(len(J)) + J @ J.T / (damping * n), J @ g)
    return g / damping - J.T @ inner / (n * damping**2)


def test_the_oracle_is_the_dense_solve(rng):
    """TWOLEVEL-9: F_d^-1 g = g / c - J^T (I + J J^T / (n c))^-1 J g / (n c^2)."""
    records, grads = problem(rng)
    F = curvature(records)
    assert np.linalg.norm(F[:12, 12:]) > 0.2 * np.linalg.norm(F[:12, :12])
    np.testing.assert_allclose(exact_step(records, grads), np.linalg.solve(F, flat(grads)), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("space", SPACES)
def test_gain_and_galerkin_condition(rng, space):
    """TWOLEVEL-1: the step is its dense definition, the gain E(z) - E(z0) = -(R r)^T F_c^-1 R r <= 0, and R (g - F_d z)
    = 0."""
    records, grads = problem(rng)
    F, M, R, g = curvature(records), fine(records), rows(space, records, grads), flat(grads)
    z0 = np.linalg.solve(M, g)
    found = solved(kf.TwoLevel(space=SPACES[space]), records, grads)
    z = flat(found.direction)
    rhs = R @ (g - F @ z0)
    beta = np.linalg.solve(R @ F @ R.T, rhs)
    np.testing.assert_allclose(z, z0 + R.T @ beta, rtol=1e-10, atol=1e-10)
    gain = float(found.info["gain"])
    assert gain == pytest.approx(energy(F, z, g) - energy(F, z0, g), rel=1e-10, abs=1e-11)
    assert gain == pytest.approx(-rhs @ beta, rel=1e-10, abs=1e-11)
    assert gain < 0
    assert np.linalg.norm(R @ (g - F @ z)) <= 1e-11 * np.linalg.norm(g)
    assert all(code == kf.Code.OK for code in found.code.values())


def test_a_coefficient_scales_the_gain(rng):
    """TWOLEVEL-2: gain(k) = (2 k - k^2) gain(1)."""
    records, grads = problem(rng)
    whole = solved(kf.TwoLevel(), records, grads)
    for c in (0.0, 0.1, 0.7, 2.5):
        found = solved(kf.TwoLevel(coefficient=c), records, grads)
        want = (2 * c - c * c) * float(whole.info["gain"])
        assert float(found.info["gain"]) == pytest.approx(want, rel=1e-9, abs=1e-12)
        if c == 0.0:
            assert np.array_equal(flat(found.direction), flat(block_solutions(records, grads)))


def block_solutions(records, grads):
    return {n: kf.direction(records[n], grads[n], kf.KFAC(), DAMPING) for n in grads}


def test_nested_spaces_only_gain(rng):
    """TWOLEVEL-3: E falls as R grows: Krylov over its first vector, enriched over ones."""
    for _ in range(5):
        records, grads = problem(rng)
        gains = {name: float(solved(kf.TwoLevel(space=s), records, grads).info["gain"]) for name, s in SPACES.items()}
        assert gains["krylov-nicolaides"] <= gains["nicolaides"] + 1e-12
        assert gains["krylov-residual"] <= gains["residual"] + 1e-12
        assert gains["enriched"] <= gains["nicolaides"] + 1e-12
        one = float(solved(kf.TwoLevel(space=net.Enriched(1)), records, grads).info["gain"])
        assert one == pytest.approx(gains["nicolaides"], rel=1e-10)


def units(name, block):
    size = block.d_out * block.d_in
    return np.eye(size).reshape(size, 1, block.d_out, block.d_in)


def test_all_coordinates_are_exact_but_not_added(rng):
    """TWOLEVEL-4: R = I gives F_d^-1 g by deflation and balancing, M^-1 g + F_d^-1 g by adding."""
    records, grads = problem(rng)
    want, z0 = exact_step(records, grads), flat(block_solutions(records, grads))
    for correction in (net.deflate_last, net.deflate_first, net.balance):
        found = solved(kf.TwoLevel(space=net.Given(units), correction=correction), records, grads)
        np.testing.assert_allclose(flat(found.direction), want, rtol=1e-10, atol=1e-10)
    added = solved(kf.TwoLevel(space=net.Given(units), correction=net.add), records, grads)
    np.testing.assert_allclose(flat(added.direction), z0 + want, rtol=1e-10, atol=1e-10)
    F, g = curvature(records), flat(grads)
    assert energy(F, flat(added.direction), g) > energy(F, want, g) + 1e-3


def operator(method, records):
    """X with z = X g, from unit gradients."""
    state, hypers = fitted(method, records)
    size = sum(a * b for a, b in SHAPES.values())
    return np.stack([flat(method.solve(state, split(e), hypers, records).direction) for e in np.eye(size)], axis=1)


def test_projections_and_operators_of_the_corrections(rng):
    """TWOLEVEL-5: P^2 = P, P F_d R^T = 0, and each correction is its operator in P, Q and M^-1."""
    records, grads = problem(rng)
    F, M, R = curvature(records), fine(records), rows("krylov-nicolaides", records, grads)
    Q = R.T @ np.linalg.solve(R @ F @ R.T, R)
    close = {"rtol": 1e-10, "atol": 1e-10}
    last = operator(kf.TwoLevel(space=net.Krylov()), records)
    P = ((last - Q) @ M).T
    np.testing.assert_allclose(P @ P, P, **close)
    np.testing.assert_allclose(P @ F @ R.T, np.zeros_like(R.T), **close)
    np.testing.assert_allclose(F @ P.T, P @ F, **close)
    np.testing.assert_allclose(R @ F @ last, R, **close)
    first = operator(kf.TwoLevel(space=net.Krylov(), correction=net.deflate_first), records)
    np.testing.assert_allclose(first @ F @ R.T, R.T, **close)
    np.testing.assert_allclose(first, np.linalg.solve(M, P) + Q, **close)
    both = operator(kf.TwoLevel(space=net.Krylov(), correction=net.balance), records)
    np.testing.assert_allclose(both, both.T, **close)
    np.testing.assert_allclose(both @ F @ R.T, R.T, **close)
    np.testing.assert_allclose(R @ F @ both, R, **close)
    np.testing.assert_allclose(both, P.T @ np.linalg.solve(M, P) + Q, **close)
    added = operator(kf.TwoLevel(space=net.Krylov(), correction=net.add), records)
    np.testing.assert_allclose(added, np.linalg.inv(M) + Q, **close)


@pytest.mark.parametrize("correction", [net.deflate_first, net.balance, net.add, net.woodbury])
def test_the_gain_of_every_correction_is_the_true_one(rng, correction):
    """TWOLEVEL-8: the gain told is E(z) - E(z0)."""
    records, grads = problem(rng)
    F, g = curvature(records), flat(grads)
    found = solved(kf.TwoLevel(correction=correction, coefficient=0.6), records, grads)
    z0 = np.linalg.solve(fine(records), g)
    want = energy(F, flat(found.direction), g) - energy(F, z0, g)
    assert float(found.info["gain"]) == pytest.approx(want, rel=1e-10, abs=1e-11)


def test_an_empty_space_is_the_block_method_bit_for_bit(rng):
    """TWOLEVEL-6: no vectors leave z0 bit for bit."""
    records, grads = problem(rng)
    found = solved(kf.TwoLevel(space=net.Given(lambda name, block: [])), records, grads)
    assert np.array_equal(flat(found.direction), flat(block_solutions(records, grads)))


def test_nothing_is_left_where_the_blocks_are_exact(rng):
    """TWOLEVEL-7: F block-diagonal (layers see different examples) and M its exact blocks: r = 0, and no 0/0."""
    records, grads = problem(rng, batch=12)
    seen = {}
    for i, name in enumerate(SHAPES):
        g = records[name].g.copy()
        g[:, :, np.arange(12) % 4 != i] = 0.0
        seen[name] = kf.Record(records[name].a, g, 12.0)
    for space in (net.Residual(), net.Krylov(net.Residual())):
        found = solved(kf.TwoLevel(kf.Exact(), space), seen, grads)
        want = np.linalg.solve(curvature(seen), flat(grads))
        np.testing.assert_allclose(flat(found.direction), want, rtol=1e-9, atol=1e-11)
        assert abs(float(found.info["gain"])) < 1e-12
    none = solved(kf.TwoLevel(kf.Exact(), net.Residual()), seen, {n: 0 * g for n, g in grads.items()})
    assert not flat(none.direction).any()


def test_kronecker_coarse_matrix(rng):
    """TWOLEVEL-10: R F~ R^T with F~_ij = G_ij kron A_ij, on dense layers; it is not the exact one."""
    records, grads = problem(rng)
    dense_layers = {n: records[n] for n in ("first", "third", "head")}
    method = kf.TwoLevel(space=net.Enriched(3), matrix=kronecker)
    state, hypers = fitted(method, dense_layers)
    g = {n: grads[n] for n in dense_layers}
    z0 = {n: kf.direction(records[n], g[n], kf.KFAC(), DAMPING) for n in g}
    level = method._level(state, g, z0, hypers, dense_layers)
    a = {n: r.rows()[0, :, 0] for n, r in dense_layers.items()}
    h = {n: r.g[:, 0, :, 0] for n, r in dense_layers.items()}
    tiles = [
        [np.kron(np.einsum("vbo,vbp->op", h[i], h[j]) / 9, a[i].T @ a[j] / 9) for j in dense_layers]
        for i in dense_layers
    ]
    sizes = np.cumsum([0, *(SHAPES[n][0] * SHAPES[n][1] for n in dense_layers)])
    starts = dict(zip(dense_layers, sizes, strict=False))
    R = np.zeros((len(level.layers), sizes[-1]))
    for i, (name, v) in enumerate(zip(level.layers, level.vectors, strict=True)):
        R[i, starts[name] : starts[name] + v.dense().size] = v.dense().ravel()
    np.testing.assert_allclose(kronecker(level), R @ np.block(tiles) @ R.T, rtol=1e-10, atol=1e-11)
    J = np.concatenate([r.examples().reshape(18, -1) for r in dense_layers.values()], axis=1)
    np.testing.assert_allclose(net.exact(level), R @ (J.T @ J / 9) @ R.T, rtol=1e-10, atol=1e-11)
    assert np.linalg.norm(kronecker(level) - net.exact(level)) > 0.1 * np.linalg.norm(net.exact(level))


def test_kronecker_between_maps_of_unequal_size(rng):
    """TWOLEVEL-10: the larger map is pooled to the smaller: inputs by mean, gradients by sum over a cell."""
    a, g = rng.normal(size=(3, 4, 4, 1)), rng.normal(size=(1, 3, 16, 2))
    b, h = rng.normal(size=(3, 2, 2, 2)), rng.normal(size=(1, 3, 4, 3))
    records = {
        "large": kf.Record(kf.Patches(a, kf.Window((1, 1))), g, 3.0),
        "small": kf.Record(kf.Patches(b, kf.Window((1, 1))), h, 3.0),
    }
    grads = {"large": np.ones((1, 2, 1)), "small": np.ones((1, 3, 2))}
    method = kf.TwoLevel(matrix=kronecker)
    state, hypers = fitted(method, records)
    found = kronecker(method._level(state, grads, grads, hypers, records))
    cells = a.reshape(3, 2, 2, 2, 2).mean((2, 4)).reshape(3, 4)
    sums = g[0].sum(-1).reshape(3, 2, 2, 2, 2).sum((2, 4)).reshape(3, 4)
    A = (cells * b.sum(-1).reshape(3, 4)).sum() / 12
    G = (sums * h[0].sum(-1)).sum() / 3
    assert found[0, 1] == pytest.approx(A * G, rel=1e-12)
    assert found[0, 0] == pytest.approx((a**2).sum() / 48 * (g.sum(-1) ** 2).sum() / 3, rel=1e-12)
    with pytest.raises(ValueError, match="matrix=kronecker needs vectors that are products"):
        kf.TwoLevel(space=net.Residual(), matrix=kronecker)


def test_one_layer_one_vector(rng):
    """TWOLEVEL-11: the additive term is v v^T g / (v^T F v + damping |v|^2)."""
    records, grads = problem(rng)
    one, g = {"first": records["first"]}, {"first": grads["first"]}
    found = solved(kf.TwoLevel(correction=net.add), one, g)
    v, F = np.ones(12), kf.dense(records["first"])[0]
    want = v * (v @ g["first"].ravel()) / (v @ F @ v + DAMPING * 12)
    z0 = kf.direction(records["first"], g["first"], kf.KFAC(), DAMPING)
    np.testing.assert_allclose((found.direction["first"] - z0).ravel(), want, rtol=1e-10)


@pytest.mark.parametrize("matrix", [net.exact, kronecker])
def test_both_woodbury_forms_are_the_dense_inverse(rng, matrix):
    """TWOLEVEL-12: both forms are (M + R^T F_o R)^-1 g, F_o the coarse matrix without its diagonal."""
    records, grads = problem(rng)
    space, damping = net.Nicolaides(), 3000.0
    method = kf.TwoLevel(space=space, matrix=matrix, correction=net.woodbury)
    state, hypers = fitted(method, records, damping)
    level = method._level(state, grads, grads, hypers, records)
    R, M, g = rows("nicolaides", records, grads, damping), fine(records, damping), flat(grads)
    Fo = matrix(level) * (1 - np.eye(4))
    whole = M + R.T @ Fo @ R
    assert np.linalg.eigvalsh(whole)[0] > 0
    for form in (net.woodbury, net.woodbury_inverse):
        found = solved(kf.TwoLevel(space=space, matrix=matrix, correction=form), records, grads, damping)
        np.testing.assert_allclose(flat(found.direction), np.linalg.solve(whole, g), rtol=1e-9, atol=1e-12)
        assert int(found.info["coarse"][0]) == kf.Code.OK


def test_an_indefinite_woodbury_sum_is_told_and_left_out(rng):
    """TWOLEVEL-12: M + R^T F_o R with a negative eigenvalue gives INDEFINITE and z0."""
    records, grads = problem(rng)
    method = kf.TwoLevel(correction=net.woodbury)
    state, hypers = fitted(method, records)
    level = method._level(state, grads, grads, hypers, records)
    R = rows("nicolaides", records, grads)
    whole = fine(records) + R.T @ (net.exact(level) * (1 - np.eye(4))) @ R
    assert np.linalg.eigvalsh(whole)[0] < 0
    for form in (net.woodbury, net.woodbury_inverse):
        found = solved(kf.TwoLevel(correction=form), records, grads)
        assert {int(code[0]) for code in found.code.values()} == {kf.Code.INDEFINITE}
        np.testing.assert_array_equal(flat(found.direction), flat(block_solutions(records, grads)))


@pytest.mark.parametrize("method", [kf.EKFAC(), kf.Exact(), kf.Diagonal(), kf.Identity()])
def test_any_block_method_gains(rng, method):
    """TWOLEVEL-8: without memory or luck: the residual form never loses, whatever M is."""
    records, grads = problem(rng)
    F, g = curvature(records), flat(grads)
    state, hypers = fitted(kf.TwoLevel(method), records)
    z0 = {n: method.solve(state.layers[n], grads[n], hypers[n]).direction for n in grads}
    for space in SPACES.values():
        if isinstance(method, kf.Exact) and isinstance(space, net.Spectral | net.Enriched):
            with pytest.raises(ValueError, match="layer 'first': Exact knows no eigenvectors"):
                solved(kf.TwoLevel(method, space), records, grads)
            continue
        found = solved(kf.TwoLevel(method, space), records, grads)
        want = energy(F, flat(found.direction), g) - energy(F, flat(z0), g)
        assert float(found.info["gain"]) == pytest.approx(want, rel=1e-7, abs=1e-10)
        assert want < 0


def test_every_namespace_agrees(xp):
    if xp.name == "jax":
        pytest.skip("compiled below: one by one its operations take half a minute")
    for space in ("nicolaides", "krylov-residual", "enriched"):
        want = solved(kf.TwoLevel(space=SPACES[space]), *problem(np.random.default_rng(5)))
        found = solved(kf.TwoLevel(space=SPACES[space]), *problem(np.random.default_rng(5), xp.put))
        for name in SHAPES:
            np.testing.assert_allclose(xp.get(found.direction[name]), want.direction[name], rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(xp.get(found.info["gain"]), want.info["gain"], rtol=1e-8)


def test_a_step_under_jit(rng):
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    records, grads = problem(rng)
    inputs = {n: records[n].a.image if n == "conv" else records[n].a for n in ("first", "conv")}
    given = {n: (np.asarray(a), np.asarray(records[n].g), grads[n]) for n, a in inputs.items()}

    def step(given, damping):
        seen = {}
        for name, (a, g, _) in given.items():
            a = kf.Patches(a, kf.Window((2, 2)), bias=True) if name == "conv" else a
            seen[name] = kf.Record(a, g, 9.0)
        method = kf.TwoLevel(space=net.Krylov(net.Residual()))
        return solved(method, seen, {n: v[2] for n, v in given.items()}, damping).direction

    want = step(given, DAMPING)
    found = jax.jit(step)(jax.tree.map(jax.numpy.asarray, given), DAMPING)
    for name in want:
        np.testing.assert_allclose(found[name], want[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("matrix", [net.exact, kronecker])
def test_embeddings_and_several_blocks(rng, matrix):
    records = {
        "table": kf.Record(kf.Ids(rng.integers(0, 6, (5, 3)), 6), rng.normal(size=(2, 5, 3, 2)), 5.0),
        "heads": kf.Record(*arrays(rng), 5.0),
    }
    grads = {"table": rng.normal(size=(1, 2, 6)), "heads": rng.normal(size=(2, 3, 4))}
    J = np.concatenate(
        [r.examples().transpose(0, 2, 1, 3, 4).reshape(10, -1) for r in (records["table"], records["heads"])], axis=1
    )
    F, g = J.T @ J / 5 + DAMPING * np.eye(36), np.concatenate([v.ravel() for v in grads.values()])
    R = np.zeros((2, 36))
    R[0, :12] = R[1, 12:] = 1.0
    found = solved(kf.TwoLevel(matrix=matrix), records, grads)
    z = np.concatenate([found.direction[n].ravel() for n in grads])
    if matrix is net.exact:
        assert np.linalg.norm(R @ (g - F @ z)) < 1e-11
    assert np.isfinite(z).all()
    spectral = solved(kf.TwoLevel(space=net.Spectral()), records, grads)
    assert float(spectral.info["gain"]) < 0


def preconditioner(**fields):
    return kf.Preconditioner(network=kf.TwoLevel(**fields), schedules=kf.Schedules(DAMPING))


def test_a_preconditioner_takes_it(rng):
    records, grads = problem(rng)
    pre = preconditioner(space=net.Residual())
    state = pre.init(blocks(records), grads["first"])
    given = {n: g[0] for n, g in grads.items()}
    updates, after, info = pre.step(state, records, given)
    want = solved(kf.TwoLevel(space=net.Residual()), records, grads)
    np.testing.assert_allclose(flat(updates), flat(want.direction), rtol=1e-10)
    assert updates["first"].shape == (3, 4)
    assert float(info.layers["network"]["gain"]) < 0
    assert info.counts() == {kf.Code.OK: 4}
    assert pre.wants_records(after)
    assert kf.tree.leaves(after.network)
    halves = {}
    for name, r in records.items():
        image = isinstance(r.a, kf.Patches)
        cut = [slice(0, 4), slice(4, 9)]
        parts = [kf.Patches(r.a.image[:, s], r.a.window, r.a.bias) if image else r.a[:, s] for s in cut]
        halves[name] = [kf.Record(a, r.g[:, :, s], s.stop - s.start) for a, s in zip(parts, cut, strict=True)]
    np.testing.assert_allclose(flat(pre.step(state, halves, given)[0]), flat(updates), rtol=1e-9, atol=1e-12)
    assert pre.memory(blocks(records), grads["first"]) == {
        "network": sum(np.asarray(x).nbytes for x in kf.tree.leaves(after.network))
    }


def test_averages_follow_the_clock_and_records_every_step(rng):
    records, grads = problem(rng)
    pre = kf.Preconditioner(network=kf.TwoLevel(), clocks=kf.Clocks(2, 2), schedules=kf.Schedules(DAMPING))
    state = pre.init(blocks(records), grads["first"])
    _, first, _ = pre.step(state, records, grads)
    fresh, _ = problem(rng)
    _, second, info = pre.step(first, fresh, grads)
    assert not info.updated
    assert np.array_equal(second.network.layers["first"].A, first.network.layers["first"].A)
    with pytest.raises(ValueError, match=r"layers .* have gradients but no records, which TwoLevel"):
        pre.step(first, {}, grads)


def test_a_checkpoint_continues_bit_for_bit(rng, tmp_path):
    records, grads = problem(rng)
    pre = preconditioner(space=net.Krylov())
    _, state, _ = pre.step(pre.init(blocks(records), grads["first"]), records, grads)
    kf.save(tmp_path / "state", state)
    again = kf.load(tmp_path / "state", pre.init(blocks(records), grads["first"]))
    for one, two in ((pre.step(s, records, grads)[0] for s in (state, again)),):
        assert np.array_equal(flat(one), flat(two))


def test_what_is_not_finite_is_a_code(rng):
    records, grads = problem(rng)
    pre = preconditioner()
    _, state, _ = pre.step(pre.init(blocks(records), grads["first"]), records, grads)
    bad = {**grads, "third": np.full_like(grads["third"], np.nan)}
    updates, after, info = pre.step(state, records, bad)
    assert np.isfinite(flat(updates)).all()
    assert not updates["third"].any()
    assert info.codes["third"][0] == kf.Code.NONFINITE
    alone = kf.KFAC().solve(after.network.layers["first"], grads["first"], kf.Hyper(1, 0.95, DAMPING))
    assert np.array_equal(updates["first"], alone.direction)
    spoiled = kf.Record(records["head"].a * np.inf, records["head"].g, 9.0)
    updates, after, info = pre.step(state, {**records, "head": spoiled}, grads)
    assert np.isfinite(flat(updates)).all()
    assert info.codes["head"][0] == kf.Code.NONFINITE
    assert np.array_equal(after.network.layers["head"].A, state.network.layers["head"].A)


def test_float32_records_with_a_float64_state(rng):
    records, grads = problem(rng, lambda x: np.array(x, np.float32))
    pre = preconditioner(space=net.Krylov(net.Residual()))
    updates, state, _ = pre.step(pre.init(blocks(records), np.zeros(1)), records, grads)
    assert {u.dtype for u in updates.values()} == {np.dtype(np.float32)}
    assert state.network.layers["first"].A.dtype == np.float64
    exact64 = solved(kf.TwoLevel(space=net.Krylov(net.Residual())), *problem(np.random.default_rng(20)))
    np.testing.assert_allclose(flat(updates), flat(exact64.direction), rtol=1e-2, atol=1e-3)


def test_layers_it_is_told_about(rng):
    records, grads = problem(rng)
    mixed = kf.TwoLevel({"first": kf.KFAC(), "conv": kf.EKFAC(), "third": kf.Identity(), "head": kf.KFAC()})
    assert float(solved(mixed, records, grads).info["gain"]) < 0
    with pytest.raises(ValueError, match=r"TwoLevel.method has no entry for layer 'head'"):
        solved(kf.TwoLevel({n: kf.KFAC() for n in ("first", "conv", "third")}), records, grads)
    pre = preconditioner()
    state = pre.init(blocks(records), grads["first"])
    with pytest.raises(ValueError, match=r"layers \['head'\] have no gradients"):
        pre.step(state, records, {n: g for n, g in grads.items() if n != "head"})
    other = kf.Record(records["head"].a[:, :5], records["head"].g[:, :, :5], 9.0)
    with pytest.raises(ValueError, match="batch is 9 in layer 'first' and 5 in 'head'"):
        pre.step(state, {**records, "head": other}, grads)
    with pytest.raises(ValueError, match=r"has shape \(3,\); need \(1, 3, 4\)"):
        kf.TwoLevel(space=net.Given(lambda name, block: [np.ones(3)])).init(blocks(records), grads["first"])
    with pytest.raises(ValueError, match="layer 'conv': FNGD solves with the rows of its batch, which TwoLevel"):
        solved(kf.TwoLevel({**dict.fromkeys(SHAPES, kf.KFAC()), "conv": kf.FNGD()}), records, grads)
    with pytest.raises(ValueError, match="needs methods, such as KFAC"):
        kf.Preconditioner()


def test_copies_and_permutations_of_the_batch_change_nothing(rng):
    records, grads = problem(rng)
    want = flat(solved(kf.TwoLevel(space=net.Krylov(net.Residual())), records, grads).direction)
    twice = {n: kf.concat(r, r) for n, r in records.items()}
    order = rng.permutation(9)
    mixed = {}
    for n, r in records.items():
        image = isinstance(r.a, kf.Patches)
        a = kf.Patches(r.a.image[:, order], r.a.window, r.a.bias) if image else r.a[:, order]
        mixed[n] = kf.Record(a, r.g[:, :, order], r.n)
    for other in (twice, mixed):
        found = solved(kf.TwoLevel(space=net.Krylov(net.Residual())), other, grads)
        np.testing.assert_allclose(flat(found.direction), want, rtol=1e-7, atol=1e-10)
