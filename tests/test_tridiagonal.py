"""Tridiagonal against dense float64 matrices built from its definition, on dense chains and on convolutions."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import block_diag

import kfaccore as kf

DAMPING = 0.03
DENSE = {"one": (3, 4), "two": (5, 4), "three": (2, 6), "four": (3, 2)}
CONV = {"one": (2, 7), "two": (3, 9), "three": (2, 19)}


def problem(rng, put=np.array, shapes=DENSE, draws=2, batch=20, shared=1):
    """Records of one batch that share a cause; convolutions of 3 x 2 maps with kernels of 3 x 2 or 2 x 2."""
    cause = rng.normal(size=(batch, 1, 1))
    records, grads = {}, {}
    for name, (d_out, d_in) in shapes.items():
        g = put(rng.normal(size=(draws, batch, shared, d_out)) + 0.7 * cause)
        if shared == 1:
            a = put(rng.normal(size=(batch, 1, d_in)) + cause)
        else:
            tall = 2 if name == "two" else 3
            window = kf.Window((tall, 2), padding=((tall - 2, 1), (0, 1)))
            image = rng.normal(size=(batch, 3, 2, d_in // (2 * tall))) + cause[..., None]
            a = kf.Patches(put(image), window, bias=True)
        records[name], grads[name] = kf.Record(a, g, float(batch)), put(rng.normal(size=(1, d_out, d_in)))
    return records, grads


def blocks(records):
    return {name: kf.Block.of(record) for name, record in records.items()}


def fitted(records, damping=DAMPING):
    method = kf.Tridiagonal()
    hypers = {name: kf.Hyper(0, 0.0, damping) for name in records}
    state = method.init(blocks(records), next(iter(records.values())).g)
    state = method.update(state, method.measure(state, records, hypers), hypers)
    return method.refresh(state, hypers), hypers


def solved(records, grads, damping=DAMPING):
    state, hypers = fitted(records, damping)
    return kf.Tridiagonal().solve(state, grads, hypers)


def flat(tree):
    return np.concatenate([np.ravel(x) for x in tree.values()])


def tiles(records, damping=DAMPING):
    """F~: G_ij kron A_ij between any two layers, damped factors on the diagonal."""
    names, found = list(records), []
    a = {n: r.rows().reshape(-1, r.d_in) for n, r in records.items()}
    g = {n: r.g.reshape(-1, r.d_out) for n, r in records.items()}
    for i in names:
        row = []
        for j in names:
            A, G = a[i].T @ a[j] / len(a[i]), g[i].T @ g[j] / records[i].n
            if i == j:
                pi = np.sqrt(np.trace(A) / len(A) / (np.trace(G) / len(G)))
                A, G = A + pi * np.sqrt(damping) * np.eye(len(A)), G + np.sqrt(damping) / pi * np.eye(len(G))
            row.append(np.kron(G, A))
        found.append(row)
    return found


def dense(F):
    """F^ = (Xi^T Lambda Xi)^-1 from its definition."""
    count, sizes = len(F), [len(F[i][i]) for i in range(len(F))]
    Xi, Lambda = [[np.zeros((m, n)) for n in sizes] for m in sizes], []
    for i in range(count):
        Xi[i][i] = np.eye(sizes[i])
        S = F[i][i]
        if i + 1 < count:
            psi = F[i][i + 1] @ np.linalg.inv(F[i + 1][i + 1])
            Xi[i][i + 1] = -psi
            S = S - psi @ F[i + 1][i + 1] @ psi.T
        Lambda.append(np.linalg.inv(S))
    Xi, Lambda = np.block(Xi), block_diag(*Lambda)
    return np.linalg.inv(Xi.T @ Lambda @ Xi)


@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_the_solve_is_its_definition(rng, kind):
    """TRIDIAGONAL-1: X = H^-1 V; H is T on the three diagonals, positive, and H^-1 is block-tridiagonal."""
    shape = {"shapes": CONV, "shared": 6} if kind == "conv" else {}
    records, grads = problem(rng, **shape)
    F = tiles(records)
    want = dense(F)
    found = solved(records, grads)
    np.testing.assert_allclose(flat(found.direction), np.linalg.solve(want, flat(grads)), rtol=1e-10, atol=1e-11)
    assert all(code == kf.Code.OK for code in found.code.values())
    state, hypers = fitted(records)
    ends = np.cumsum([0, *(len(F[i][i]) for i in range(len(F)))])
    columns = []
    for e in np.eye(ends[-1]):
        unit = {n: e[ends[i] : ends[i + 1]].reshape(grads[n].shape) for i, n in enumerate(records)}
        columns.append(flat(kf.Tridiagonal().solve(state, unit, hypers).direction))
    inverse = np.stack(columns, axis=1)
    np.testing.assert_allclose(inverse, inverse.T, rtol=1e-10, atol=1e-10)
    assert np.linalg.eigvalsh((inverse + inverse.T) / 2)[0] > 0
    whole = np.linalg.inv(inverse)
    for i in range(len(F)):
        for j in range(len(F)):
            part = slice(ends[i], ends[i + 1]), slice(ends[j], ends[j + 1])
            if abs(i - j) <= 1:
                np.testing.assert_allclose(whole[part], F[i][j], rtol=1e-9, atol=1e-9)
            else:
                assert np.abs(inverse[part]).max() < 1e-11
                assert np.abs(whole[part]).max() > 1e-4


def test_products_are_those_of_the_matrix(rng):
    """TRIDIAGONAL-2: matvec is H V, with damping and without."""
    records, grads = problem(rng)
    state, hypers = fitted(records)
    found = kf.Tridiagonal().matvec(state, grads, hypers)
    np.testing.assert_allclose(flat(found), dense(tiles(records)) @ flat(grads), rtol=1e-10, atol=1e-10)
    bare = {name: kf.Hyper(0, 0.0, 0.0) for name in records}
    found = kf.Tridiagonal().matvec(state, grads, bare)
    np.testing.assert_allclose(flat(found), dense(tiles(records, 0.0)) @ flat(grads), rtol=1e-10, atol=1e-10)


def test_two_layers_are_the_whole_kronecker_matrix(rng):
    """TRIDIAGONAL-3: for two layers H = T."""
    records, grads = problem(rng, shapes={n: DENSE[n] for n in ("one", "two")})
    F = np.block(tiles(records))
    found = solved(records, grads)
    np.testing.assert_allclose(flat(found.direction), np.linalg.solve(F, flat(grads)), rtol=1e-8, atol=1e-10)


def test_two_layers_and_one_example_are_exact(rng):
    """TRIDIAGONAL-3: for two layers and one example the block between them is J_1 J_2^T, that of F itself."""
    records, grads = problem(rng, shapes={n: DENSE[n] for n in ("one", "two")}, draws=1, batch=1)
    J = np.concatenate([r.examples().ravel() for r in records.values()])
    F = block_diag(*(row[i] for i, row in enumerate(tiles(records))))
    F[:12, 12:], F[12:, :12] = np.outer(J, J)[:12, 12:], np.outer(J, J)[12:, :12]
    found = solved(records, grads)
    np.testing.assert_allclose(flat(found.direction), np.linalg.solve(F, flat(grads)), rtol=1e-9, atol=1e-10)


def test_one_layer_is_kfac(rng):
    """TRIDIAGONAL-4: one layer has K-FAC's direction."""
    records, grads = problem(rng, shapes={"one": (3, 4)})
    want = kf.direction(records["one"], grads["one"], kf.KFAC(), DAMPING)
    np.testing.assert_allclose(solved(records, grads).direction["one"], want, rtol=1e-10)


def test_unrelated_layers_are_kfac(rng):
    """TRIDIAGONAL-4: cross factors of zero leave K-FAC's step."""
    records, grads = problem(rng, shapes={n: DENSE[n] for n in ("one", "two")}, batch=8)
    halves = {}
    for name, keep in (("one", slice(0, 4)), ("two", slice(4, 8))):
        a, g = np.zeros_like(records[name].a), np.zeros_like(records[name].g)
        a[:, keep], g[:, :, keep] = records[name].a[:, keep], records[name].g[:, :, keep]
        halves[name] = kf.Record(a, g, 8.0)
    found = solved(halves, grads)
    for name, record in halves.items():
        want = kf.direction(record, grads[name], kf.KFAC(), DAMPING)
        np.testing.assert_allclose(found.direction[name], want, rtol=1e-9)


def test_it_turns_to_the_gradient_and_vanishes_with_it(rng):
    """TRIDIAGONAL-5: c X -> V as c grows, and V = 0 gives X = 0."""
    records, grads = problem(rng)
    found = flat(solved(records, grads, 1e12).direction)
    np.testing.assert_allclose(1e12 * found, flat(grads), rtol=1e-3, atol=1e-4)
    nothing = solved(records, {n: 0 * g for n, g in grads.items()})
    assert not flat(nothing.direction).any()


def test_every_namespace_agrees(xp):
    if xp.name == "jax":
        pytest.skip("compiled below: one by one its operations take too long")
    want = solved(*problem(np.random.default_rng(5)))
    found = solved(*problem(np.random.default_rng(5), xp.put))
    for name in DENSE:
        np.testing.assert_allclose(xp.get(found.direction[name]), want.direction[name], rtol=1e-8, atol=1e-10)


def test_a_step_under_jit(rng):
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    records, grads = problem(rng, shapes={n: DENSE[n] for n in ("one", "two")})
    given = {n: (r.a, r.g, grads[n]) for n, r in records.items()}

    def step(given, damping):
        seen = {n: kf.Record(a, g, 20.0) for n, (a, g, _) in given.items()}
        return solved(seen, {n: v[2] for n, v in given.items()}, damping).direction

    want, found = step(given, DAMPING), jax.jit(step)(jax.tree.map(jax.numpy.asarray, given), DAMPING)
    for name in want:
        np.testing.assert_allclose(found[name], want[name], rtol=1e-8, atol=1e-10)


def test_halves_copies_and_factored_gradients(rng):
    """TRIDIAGONAL-6: halves combine to the whole, copies change nothing, rows have the direction of their product."""
    records, grads = problem(rng)
    method, (state, hypers) = kf.Tridiagonal(), fitted(records)
    parts = [{n: kf.Record(r.a[:, s], r.g[:, :, s], m) for n, r in records.items()} for s, m in _halves()]
    whole = method.measure(state, records, hypers)
    joined = method.combine(*(method.measure(state, part, hypers) for part in parts))
    for one, other in zip(kf.tree.leaves(whole), kf.tree.leaves(joined), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)
    want = flat(method.solve(state, grads, hypers).direction)
    twice = solved({n: kf.concat(r, r) for n, r in records.items()}, grads)
    np.testing.assert_allclose(flat(twice.direction), want, rtol=1e-9, atol=1e-11)
    products = {n: kf.Factored(r.a, r.g[0], r.n) for n, r in records.items()}
    got = method.solve(state, products, hypers).direction
    plain = method.solve(state, {n: f.dense() for n, f in products.items()}, hypers).direction
    np.testing.assert_allclose(flat(got), flat(plain), rtol=1e-10)


def _halves():
    return (slice(0, 7), 7.0), (slice(7, 20), 13.0)


def preconditioner(**fields):
    return kf.Preconditioner(network=kf.Tridiagonal(**fields), schedules=kf.Schedules(DAMPING))


def test_a_preconditioner_takes_it_beside_others(rng, tmp_path):
    records, grads = problem(rng)
    records["table"] = kf.Record(kf.Ids(rng.integers(0, 6, (20, 2)), 6), rng.normal(size=(2, 20, 2, 2)), 20.0)
    grads["table"] = rng.normal(size=(1, 2, 6))
    with pytest.raises(ValueError, match=r"layer 'table' is an embedding; .* name a chain in `order`"):
        preconditioner().init(blocks(records), grads["one"])
    with pytest.raises(ValueError, match="leaves out layer 'table': give `methods`"):
        preconditioner(order=tuple(DENSE)).init(blocks(records), grads["one"])
    schedules = kf.Schedules(DAMPING)
    pre = kf.Preconditioner(kf.KFAC(), network=kf.Tridiagonal(order=tuple(DENSE)), schedules=schedules)
    state = pre.init(blocks(records), grads["one"])
    updates, after, info = pre.step(state, records, {n: g[0] for n, g in grads.items()})
    chain = {n: records[n] for n in DENSE}
    want = solved(chain, {n: grads[n] for n in DENSE}).direction
    for name in DENSE:
        np.testing.assert_allclose(updates[name], want[name][0], rtol=1e-9, atol=1e-12)
    alone = kf.direction(records["table"], grads["table"][0], kf.KFAC(), DAMPING)
    np.testing.assert_allclose(updates["table"], alone, rtol=1e-12)
    assert info.counts() == {kf.Code.OK: 5}
    assert set(after.layers) == {"table"}
    kf.save(tmp_path / "x", after)
    again = kf.load(tmp_path / "x", state)
    one, two = (pre.step(s, records, grads)[0] for s in (after, again))
    assert np.array_equal(flat(one), flat(two))


def test_before_the_first_refresh_the_gradient(rng):
    records, grads = problem(rng)
    method, hypers = kf.Tridiagonal(), {n: kf.Hyper(0, 0.0, DAMPING) for n in records}
    found = method.solve(method.init(blocks(records), grads["one"]), grads, hypers)
    np.testing.assert_allclose(flat(found.direction), flat(grads), rtol=1e-15)
    assert {int(code[0]) for code in found.code.values()} == {kf.Code.IDENTITY}


def test_what_is_not_finite_is_a_code(rng):
    records, grads = problem(rng)
    state, hypers = fitted(records)
    method = kf.Tridiagonal()
    bad = {**grads, "two": np.full_like(grads["two"], np.nan)}
    found = method.solve(state, bad, hypers)
    want = method.solve(state, {**grads, "two": 0 * grads["two"]}, hypers).direction
    for name in DENSE:
        np.testing.assert_array_equal(found.direction[name], 0 * want[name] if name == "two" else want[name])
        assert found.code[name][0] == (kf.Code.NONFINITE if name == "two" else kf.Code.OK)
    spoiled = {**records, "three": kf.Record(records["three"].a * np.nan, records["three"].g, 20.0)}
    after = method.update(state, method.measure(state, spoiled, hypers), hypers)
    for one, other in zip(kf.tree.leaves(after), kf.tree.leaves(state), strict=True):
        assert np.array_equal(one, other)


def test_a_failed_refresh_keeps_the_chain(rng):
    """Without damping and with too few rows factors are singular: all layers keep what they had."""
    records, grads = problem(rng)
    state, hypers = fitted(records)
    few = {n: kf.Record(r.a[:, :1], r.g[:, :, :1], 1.0) for n, r in records.items()}
    method, bare = kf.Tridiagonal(), {n: kf.Hyper(0, 0.0, 0.0) for n in records}
    failed = method.refresh(method.update(state, method.measure(state, few, bare), bare), bare)
    assert {int(layer.code[0]) for layer in failed.layers.values()} == {kf.Code.PREVIOUS}
    got, want = (method.solve(s, grads, hypers).direction for s in (failed, state))
    assert np.array_equal(flat(got), flat(want))


@pytest.mark.parametrize(
    ("given", "order", "message"),
    [
        ({"a": kf.Block(3, 4), "skip": kf.Block(3, 8), "c": kf.Block(2, 4)}, (), "'skip' takes 8 inputs where 'a'"),
        ({"a": kf.Block(3, 4), "residual1.b": kf.Block(3, 4)}, (), "layer 'residual1.b' lies in another part"),
        ({"a": kf.Block(3, 4, blocks=2)}, (), "layer 'a' is 2 blocks"),
        ({"a": kf.Block(3, 4)}, ("a", "b"), r"order is \['a', 'b'\]; need different names of \['a'\]"),
    ],
)
def test_branches_are_refused_by_name(given, order, message):
    with pytest.raises(ValueError, match=message):
        kf.Tridiagonal(order=order).init(given, np.zeros(1))


def test_maps_of_unequal_size_are_refused_by_name(rng):
    records, _ = problem(rng, shapes={"one": (3, 4), "two": (5, 4)})
    wide = kf.Record(rng.normal(size=(20, 3, 4)), rng.normal(size=(2, 20, 3, 3)), 20.0)
    with pytest.raises(ValueError, match=r"shared is 3 in layer 'one' and 1 in 'two' after it; .* as many positions"):
        fitted({"one": wide, "two": records["two"]})
    double = kf.Record(rng.normal(size=(20, 6)), rng.normal(size=(2, 20, 3)), 20.0)
    with pytest.raises(ValueError, match="layer 'two' takes 5 features where 'one' before it gives 3: a branch"):
        fitted({"one": records["one"], "two": double})
    with pytest.raises(ValueError, match="does not shift each factor"):
        kf.Tridiagonal(split=kf.exact)
