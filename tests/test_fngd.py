"""FNGD against dense oracles in float64; identities FNGD-1 to FNGD-18."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import kfaccore as kf
import kfaccore_numpy as kn
from kfaccore import xp as kernels
from kfaccore.linalg.cg import CG, Residual
from kfaccore.methods.rows import table, units
from kfaccore.methods.rows.cgfac import Empirical, InRows
from kfaccore.methods.rows.fngd import mean_vector, position, sample, scalar_rate

SIZES = pytest.mark.parametrize("sizes", [(5, 3, 4), (12, 3, 4), (40, 3, 4), (3, 1, 4), (1, 5, 4)], ids=str)
SHARES = {"position": position, "sample": sample, "mean_vector": mean_vector, "scalar": scalar_rate}
EVERY = pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)


def close(x, y, tolerance=1e-10):
    x, y = np.asarray(x), np.asarray(y)
    return np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y)


def pair(rng, sizes):
    B, d_in, d_out = sizes
    return rng.normal(size=(B, d_in)), rng.normal(size=(B, d_out))


def U(a, g):
    """Per-example gradients as rows."""
    a, g = (x[:, None] if x.ndim == 2 else x for x in (a, g))
    return np.einsum("nso,nsi->noi", g, a).reshape(len(a), -1)


def ngd(a, g, V, damping, n=None):
    J = U(a, g)
    return np.linalg.solve(J.T @ J / (n or len(a)) + damping * np.eye(J.shape[1]), V.ravel()).reshape(V.shape)


def solved(method, a, g, grad, damping=0.1, step=0, ids=None, n=None, state=None):
    record = kf.Record(a, g, n or float(len(a)), ids=ids)
    hyper = kf.Hyper(step, 0.0, damping)
    if state is None:
        state = method.init(replace(kf.Block.of(record), samples=100), record.g)
    state = method.refresh(method.update(state, method.measure(state, record, hyper), hyper), hyper)
    return method.solve(state, grad, hyper, record)


def betas(method, a, g, damping=0.1):
    """beta of every example, from the table of slots."""
    state = solved(method, a, g, g.T @ a / len(a), damping).state
    return state.betas.value[0, : len(a)]


@SIZES
def test_gram_of_examples_from_the_rows(sizes, rng):
    """FNGD-1: K_nm = sum_st <a_ns, a_mt> <g_ns, g_mt> = <J_n, J_m>."""
    a, g = pair(rng, sizes)
    assert close(units.gram(kf.Record(a, g, 1.0))[0], U(a, g) @ U(a, g).T, 1e-12)
    T = 3
    a, g = rng.normal(size=(sizes[0], T, sizes[1])), rng.normal(size=(sizes[0], T, sizes[2]))
    for pairs in (True, False, None):
        assert close(units.gram(kf.Record(a, g, 1.0), pairs)[0], U(a, g) @ U(a, g).T, 1e-12)


def test_gram_of_convolutions_embeddings_draws_and_blocks(rng, monkeypatch):
    """FNGD-1: K = J J^T, <J_n, V> and sum_n y_n J_n of every kind of record, in chunks."""
    patches = kf.Patches(rng.normal(size=(6, 5, 4, 2)), kf.Window((3, 3), stride=2, padding=1), bias=True)
    g = rng.normal(size=(2, 6, patches.shape[2], 3))
    conv = kf.Record(patches, g, 6.0)
    words = kf.Record(kf.Ids(rng.integers(0, 5, (6, 4)), 5), rng.normal(size=(6, 4, 3)), 6.0)
    blocks = kf.Record(rng.normal(size=(2, 6, 3, 4)), rng.normal(size=(2, 2, 6, 3, 5)), 6.0)
    for chunk in (1 << 22, 40):
        monkeypatch.setattr("kfaccore.xp.chunks.HELD", chunk)
        for record in (conv, words, blocks):
            J = np.moveaxis(record.examples(), 0, 1).reshape(record.blocks, record.draws * 6, -1)
            V = rng.normal(size=(record.blocks, record.d_out, record.d_in))
            y = rng.normal(size=J.shape[:2])
            for order in (True, False) if record is not words else (None,):
                assert close(units.gram(record, order), J @ J.swapaxes(1, 2), 1e-12)
            assert close(units.inner(record, V), (J @ V.reshape(record.blocks, -1, 1))[..., 0], 1e-12)
            assert close(units.combined(record, y).reshape(record.blocks, -1), (y[:, None] @ J)[:, 0], 1e-12)


@SIZES
@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
def test_the_first_epoch_is_natural_gradient(sizes, damping, rng):
    """FNGD-2: X = (F + c I)^-1 V for B below, at and above the number of weights."""
    a, g = pair(rng, sizes)
    DW = g.T @ a / len(a)
    for given in (DW, kf.Factored(a, g, float(len(a)))):
        found = solved(kf.FNGD(), a, g, given, damping)
        assert close(np.reshape(found.direction, DW.shape), ngd(a, g, DW, damping))
        assert found.code.tolist() == [kf.Code.OK]


@pytest.mark.parametrize("sizes", [(2, 2, 3), (3, 4, 5)])
def test_the_first_epoch_is_natural_gradient_with_shared_positions(sizes, rng):
    """FNGD-2: X = (F + c I)^-1 V with J_n = sum_s g_ns a_ns^T; with expand each position is an example."""
    a, g = rng.normal(size=(4, sizes[0], sizes[1])), rng.normal(size=(4, sizes[0], sizes[2]))
    DW = np.einsum("nso,nsi->oi", g, a) / 4
    assert close(solved(kf.FNGD(), a, g, DW).direction, ngd(a, g, DW, 0.1))
    assert close(solved(kf.FNGD(), a, g, kf.Factored(a, g, 4.0)).direction[0], ngd(a, g, DW, 0.1))
    flat = a.reshape(-1, sizes[1]), g.reshape(-1, sizes[2])
    token = solved(kf.FNGD(sharing=kf.expand), a, g, DW)
    assert close(token.direction, ngd(*flat, DW, 0.1, 4))


@SIZES
def test_any_right_side_and_sampled_gradients(sizes, rng):
    """FNGD-3: X = (V - U^T (K + B c I)^-1 U V) / c, also for V outside the span of U."""
    a, g = pair(rng, sizes)
    for V in (g.T @ a / len(a), rng.normal(size=(sizes[2], sizes[1]))):
        assert close(solved(kf.FNGD(), a, g, V).direction, ngd(a, g, V, 0.1))
    sampled = rng.normal(size=g.shape)  # the gradient is not in the span of the record
    for given in (g.T @ a / len(a), kf.Factored(a, g, float(len(a)))):
        found = solved(kf.FNGD(), a, sampled, given).direction
        assert close(np.reshape(found, (sizes[2], sizes[1])), ngd(a, sampled, g.T @ a / len(a), 0.1))


def network(rng):
    net = kn.Sequential(
        (6, 6, 1),
        (kn.Conv2d(3, kf.Window((3, 3), padding=1)), kn.Tanh(), kn.Flatten(), kn.Dense(5), kn.Tanh(), kn.Dense(3)),
    )
    return net, net.init(rng, np.asarray)


def test_only_the_weight_path_is_scaled(rng):
    """FNGD-4: gradients of the weights are sum_n beta_n u_n / n; what earlier layers get is bit-identical."""
    net, params = network(rng)
    x = rng.normal(size=(8, 6, 6, 1))
    f, tape = net.forward(params, x)
    g = net.backward(params, tape, rng.normal(size=f.shape))
    before = {name: v.copy() for name, v in g.items()}
    pre = kf.Preconditioner(kf.FNGD(steps=1))
    state = pre.init(net.blocks(), x)
    grads = net.gradients(tape, g, 8.0)
    _, state, _ = pre.step(state, net.records(tape, g, 8.0), grads)
    weighted = kf.weighted(pre, state, g)
    found = net.gradients(tape, weighted, 8.0, factored=False)
    for name, record in net.records(tape, g, 8.0).items():
        betas = state.layers[name].betas
        beta = betas.value[0, :8]
        want = np.einsum("n,noi->oi", beta, record.examples()[0, 0]) / 8
        assert close(found[name], want, 1e-12)
        assert np.array_equal(g[name], before[name])
        assert weighted[name] is not g[name]


def test_later_steps_are_one_product_a_layer(rng, monkeypatch):
    """FNGD-4: a resting step asks for no records, forms each weight gradient once, and hands it on as the direction."""
    net, params = network(rng)
    loss, data = kf.SoftmaxCrossEntropy(), (rng.normal(size=(8, 6, 6, 1)), rng.integers(0, 3, 8))
    pre = kf.Preconditioner(kf.FNGD(steps=1), schedules=kf.Schedules(0.1), step=kf.Fixed(0.1))
    state = kn.initial_state(net, params, pre)
    counted = {"products": 0, "records": 0}
    for kind in (kn.Conv2d, kn.Dense):
        original = kind.gradient

        def gradient(self, *args, original=original):
            counted["products"] += 1
            found = original(self, *args)
            return found.dense()[0] if isinstance(found, kf.Factored) else found

        monkeypatch.setattr(kind, "gradient", gradient)
    original_records = kn.Sequential.records

    def records(self, *args, **kwargs):
        counted["records"] += 1
        return original_records(self, *args, **kwargs)

    monkeypatch.setattr(kn.Sequential, "records", records)
    for index in range(3):
        products = dict(counted)
        _, state, info = kn.step(net, params, data, loss, pre, state, index, rng)
        assert counted["products"] - products["products"] == 3
        assert counted["records"] == 1
        assert info.counts() == {kf.Code.OK: 3}


def test_beta_one_is_the_gradient(rng):
    """FNGD-5: beta = 1 gives (1/B) sum_n J_n = V, the gradient.

    An empty table reads as 1: a shell that starts in a later epoch does SGD."""
    net, params = network(rng)
    x = rng.normal(size=(8, 6, 6, 1))
    f, tape = net.forward(params, x)
    g = net.backward(params, tape, rng.normal(size=f.shape))
    pre = kf.Preconditioner(kf.FNGD(steps=1))
    state = replace(pre.init(net.blocks(), x), step=1)
    found = net.gradients(tape, kf.weighted(pre, state, g), 8.0, factored=False)
    for name, want in net.gradients(tape, g, 8.0, factored=False).items():
        assert close(found[name], want, 1e-14)


def test_large_damping_turns_to_the_gradient(rng):
    """FNGD-6: c X -> V and c beta -> 1 as c grows."""
    a, g = pair(rng, (5, 3, 4))
    DW = g.T @ a / 5
    assert close(solved(kf.FNGD(), a, g, DW, 1e12).direction * 1e12, DW, 1e-6)
    np.testing.assert_allclose(betas(kf.FNGD(), a, g, 1e12) * 1e12, 1, rtol=1e-6)


def test_small_damping_matches_every_example(rng):
    """FNGD-7: <J_n, X> -> 1 and X -> pinv(F) V as c vanishes."""
    a, g = pair(rng, (5, 3, 4))
    x = solved(kf.FNGD(), a, g, kf.Factored(a, g, 5.0), 1e-12).direction[0]
    np.testing.assert_allclose(U(a, g) @ x.ravel(), 1, rtol=1e-7)
    F = U(a, g).T @ U(a, g) / 5
    assert close(x.ravel(), np.linalg.pinv(F, rcond=1e-12) @ (g.T @ a / 5).ravel(), 1e-7)


def test_duplicated_examples_share_their_coefficient(rng):
    """FNGD-7: equal coefficients for equal examples, finite; direction and beta do not see the whole batch twice."""
    a, g = pair(rng, (5, 3, 4))
    twice = np.tile(a, (2, 1)), np.tile(g, (2, 1))
    one, two = betas(kf.FNGD(), a, g), betas(kf.FNGD(), *twice)
    assert close(two[:5], one)
    assert close(two[5:], one)
    DW = g.T @ a / 5
    assert close(solved(kf.FNGD(), *twice, DW).direction, solved(kf.FNGD(), a, g, DW).direction)
    tiny = solved(kf.FNGD(), *twice, kf.Factored(*twice, 10.0), 1e-9)
    assert np.isfinite(tiny.direction).all()
    assert close(tiny.direction, solved(kf.FNGD(), a, g, kf.Factored(a, g, 5.0), 1e-9).direction, 1e-5)


def test_zero_gradients_have_coefficient_one_over_damping(rng):
    """FNGD-8: g_n = 0 gives beta_n = 1 / c; all g zero give X = 0."""
    a, g = pair(rng, (5, 3, 4))
    g[2] = 0
    assert betas(kf.FNGD(), a, g)[2] == pytest.approx(1 / 0.1, rel=1e-12)
    zero = solved(kf.FNGD(), a, 0 * g, np.zeros((4, 3)))
    assert not zero.direction.any()
    np.testing.assert_allclose(betas(kf.FNGD(), a, 0 * g), 1 / 0.1, rtol=1e-12)


def test_one_example_is_a_multiple_of_its_gradient(rng):
    """FNGD-9: X = V / (|a|^2 |g|^2 + c)."""
    a, g = pair(rng, (1, 5, 4))
    want = g.T @ a / ((a**2).sum() * (g**2).sum() + 0.1)
    assert close(solved(kf.FNGD(), a, g, g.T @ a).direction, want, 1e-12)


def test_orthonormal_examples_have_equal_coefficients(rng):
    """FNGD-10: K = I gives beta_n = B / (1 + B c)."""
    a, g = np.eye(4)[:, :3][[0, 1, 2, 0]], np.eye(4)[[0, 1, 2, 3]]
    assert np.array_equal(units.gram(kf.Record(a, g, 4.0))[0], np.eye(4))
    np.testing.assert_allclose(betas(kf.FNGD(), a, g), 4 / (1 + 4 * 0.1), rtol=1e-13)


@SIZES
@pytest.mark.parametrize("damping", [1e-2, 1.0])
def test_sum_rule_and_bounds_of_coefficients(sizes, damping, rng):
    """FNGD-11: 1^T y = y^T K y + B c |y|^2 for y = beta / B; 0 < 1^T y <= 1 / c, <X, V> >= 0, |X| <= |V| / c."""
    a, g = pair(rng, sizes)
    B, K = len(a), U(a, g) @ U(a, g).T
    c = betas(kf.FNGD(), a, g, damping) / B
    DW = g.T @ a / B
    X = solved(kf.FNGD(), a, g, DW, damping).direction
    assert c.sum() == pytest.approx(c @ K @ c + B * damping * c @ c, rel=1e-10)
    assert 0 < c.sum() <= 1 / damping
    assert np.sum(X * DW) == pytest.approx(np.sum(K @ c) / B, rel=1e-9)
    assert np.sum(X * DW) >= 0
    assert np.linalg.norm(X) <= np.linalg.norm(DW) / damping


def test_coefficients_may_be_negative(rng):
    """FNGD-11: a large example that points the same way makes the beta of a small one negative."""
    a = np.array([[1.0, 0.0], [10.0, 0.5]])
    assert betas(kf.FNGD(), a, np.ones((2, 1)), 1e-3).min() < 0


def test_scaling_the_loss_scales_the_direction(rng):
    """FNGD-12: g, V times s and c times s^2 have X / s; relative damping c tr K / B^2 needs no rescaled c."""
    a, g = pair(rng, (5, 3, 4))
    DW = g.T @ a / 5
    want = solved(kf.FNGD(), a, g, DW).direction
    assert close(solved(kf.FNGD(), a, 3 * g, 3 * DW, 0.9).direction, want / 3)
    relative = kf.FNGD(relative=True)
    want = solved(relative, a, g, DW).direction
    assert close(solved(relative, a, 3 * g, 3 * DW).direction, want / 3)
    K = U(a, g) @ U(a, g).T
    assert close(want, ngd(a, g, DW, 0.1 * np.trace(K) / 25))


def test_coefficients_are_permuted_with_their_examples(rng):
    """FNGD-13: beta of a permuted batch is beta permuted."""
    a, g = pair(rng, (6, 3, 4))
    order = rng.permutation(6)
    assert close(betas(kf.FNGD(), a[order], g[order]), betas(kf.FNGD(), a, g)[order])


def test_coefficients_are_found_by_dataset_index(rng):
    """FNGD-13: five batches of a shuffled set of 23, the last ragged: every example gets the beta of its own index
    back."""
    a, g = pair(rng, (23, 3, 4))
    method = kf.FNGD(sample, steps=5)
    state = method.init(kf.Block(4, 3, samples=23), a)
    order, want = rng.permutation(23), np.zeros(23)
    for step in range(5):
        ids = order[5 * step : 5 * step + 5]
        x, y = a[ids], g[ids]
        state = solved(method, x, y, y.T @ x / len(ids), step=step, ids=ids, state=state).state
        B = len(ids)
        want[ids] = B * np.linalg.solve(U(x, y) @ U(x, y).T + B * 0.1 * np.eye(B), np.ones(B))
    assert B == 3
    again = rng.permutation(23)
    ids = again[20:]
    found = method.weighted(state, g[ids], kf.Hyper(9, 0.0, 0.1), ids)
    assert close(found, g[ids] * want[ids][:, None], 1e-12)


def epochs(method, a, g, batches, count, damping=0.1):
    """Directions of `count` epochs with frozen weights, as a shell makes them; batches(epoch) gives index arrays."""
    pre = kf.Preconditioner(method, kf.Clocks(1, 1), kf.Schedules(damping))
    state = pre.init({"fc": kf.Block(4, 3, rows=10, samples=len(a))}, a)
    found = []
    for epoch in range(count):
        for ids in batches(epoch):
            x, y = a[ids], g[ids]
            scaled = kf.weighted(pre, state, {"fc": y}, ids)["fc"]
            records = {"fc": kf.Record(x, y, float(len(ids)), ids=ids)} if pre.wants_records(state) else None
            updates, state, _ = pre.step(state, records, {"fc": scaled.T @ x / len(ids)})
            found.append((ids, updates["fc"]))
    return found, state


@pytest.mark.parametrize("stranger", [-1, 10, 100])
@pytest.mark.parametrize("net", [False, True])
def test_ids_that_do_not_exist_are_nobodys(stranger, net, xp, rng):
    """Refused where ids can be read for nothing; elsewhere no entry is touched, and the weight is NaN, a code."""
    a, g = rng.normal(size=(2, 4, 3)), rng.normal(size=(2, 4, 2))
    ids = [xp.put(np.asarray(x)) for x in ([0, 1, 2, 3], [stranger, 1, 2, 3])]
    rule = {"share": sample, "steps": 2}
    pre = kf.Preconditioner(**({"network": kf.GlobalFNGD(**rule)} if net else {"methods": kf.FNGD(**rule)}))
    state = pre.init({"fc": kf.Block(2, 3, samples=10)}, xp.put(a))

    def stepped(state, t, ids):
        record = kf.Record(xp.put(a[t]), xp.put(g[t]), 4.0, ids=ids)
        return pre.step(state, {"fc": record}, {"fc": xp.put(g[t].T @ a[t] / 4)}, fisher=kf.empirical)[1]

    state = stepped(state, 0, ids[0])
    if xp.name in ("numpy", "readonly", "torch"):
        with pytest.raises(
            ValueError, match=f"got ids from {min(stranger, 1)} to {max(stranger, 3)}; need dataset pos"
        ):
            stepped(state, 1, ids[1])
        state = stepped(state, 1, ids[0])
        with pytest.raises(ValueError, match=r"positions from 0 to 9: Block\.samples, the size of the dataset, is 10"):
            kf.weighted(pre, state, {"fc": xp.put(g[0])}, ids[1])
        return
    state = stepped(state, 1, ids[1])
    table_of = (state.network if net else state).layers["fc"].betas
    assert xp.get(table_of.count).tolist() == [[1, 2, 2, 2, 0, 0, 0, 0, 0, 0]]
    weights = xp.get(kf.weighted(pre, state, {"fc": xp.put(np.ones((4, 2)))}, ids[1])["fc"])
    assert np.isnan(weights).tolist() == [[True, True]] + 3 * [[False, False]]
    updates, _, info = pre.step(state, None, {"fc": xp.put(weights.T @ a[1])})
    assert info.counts() == {kf.Code.NONFINITE: 1}
    assert not xp.get(updates["fc"]).any()


def test_ids_are_integers(rng):
    method = kf.FNGD(share=sample)
    with pytest.raises(TypeError, match="got ids of dtype float64; need integers"):
        solved(method, *pair(rng, (4, 3, 2)), rng.normal(size=(2, 3)), ids=np.arange(4.0))


def test_replayed_order_repeats_the_first_epoch(rng):
    """FNGD-14: the same batches in the same order have the first epoch's X again."""
    a, g = pair(rng, (23, 3, 4))
    parts = np.array_split(rng.permutation(23), 4)
    for share in (position, sample):
        found, _ = epochs(kf.FNGD(share, steps=4), a, g, lambda e: parts, 3)
        for (ids, first), (_, second), (_, third) in zip(found[:4], found[4:8], found[8:], strict=True):
            assert close(first, ngd(a[ids], g[ids], g[ids].T @ a[ids] / len(ids), 0.1))
            assert close(second, first, 1e-13)
            assert np.array_equal(second, third)


def test_reshuffled_batches_are_not_natural_gradient(rng):
    """FNGD-14: a coefficient depends on the rest of its batch; with one batch for the whole set it does not change."""
    a, g = pair(rng, (24, 3, 4))
    orders = [rng.permutation(24) for _ in range(2)]
    found, _ = epochs(kf.FNGD(sample, steps=4), a, g, lambda e: np.split(orders[e], 4), 2)
    ids, second = found[4]
    assert not close(second, ngd(a[ids], g[ids], g[ids].T @ a[ids] / 6, 0.1), 1e-2)
    a, g = a[:10], g[:10]
    orders = [rng.permutation(10) for _ in range(2)]
    found, _ = epochs(kf.FNGD(sample, steps=1), a, g, lambda e: [orders[e]], 2)
    assert close(found[1][1], ngd(a, g, g.T @ a / 10, 0.1))
    found, _ = epochs(kf.FNGD(position, steps=1), a, g, lambda e: [orders[e]], 2)
    assert not close(found[1][1], ngd(a, g, g.T @ a / 10, 0.1), 1e-2)


def test_mean_vector_and_scalar_are_means_of_the_first_epoch(rng):
    """FNGD-14: beta of a slot, or of all, is its mean over the first epoch's steps."""
    a, g = pair(rng, (23, 3, 4))
    parts = np.array_split(np.arange(23), 4)  # 6, 6, 6, 5
    each = [betas(kf.FNGD(), a[p], g[p]) for p in parts]
    found, _ = epochs(kf.FNGD(mean_vector, steps=4), a, g, lambda e: parts, 2)
    mean = np.append(np.mean([b[:5] for b in each], 0), np.mean([b[5] for b in each[:3]]))
    assert close(found[4][1], (g[parts[0]] * mean[:, None]).T @ a[parts[0]] / 6, 1e-12)
    found, _ = epochs(kf.FNGD(scalar_rate, steps=4), a, g, lambda e: parts, 2)
    assert close(found[7][1], np.concatenate(each).mean() * g[parts[3]].T @ a[parts[3]] / 5, 1e-12)


def counting(monkeypatch):
    calls = []
    original = kernels.spd_inverse
    monkeypatch.setattr(kernels, "spd_inverse", lambda x: calls.append(x.shape) or original(x))
    return calls


@EVERY
def test_no_solve_after_the_first_epoch(share, rng, monkeypatch):
    """FNGD-15: 4 steps solve 4 systems, whatever the number of epochs; every second epoch computing, 12 in 5."""
    a, g = pair(rng, (20, 3, 4))
    parts = np.split(np.arange(20), 4)
    calls = counting(monkeypatch)
    epochs(kf.FNGD(share, steps=4), a, g, lambda e: parts, 5)
    assert len(calls) == 4
    calls.clear()
    epochs(kf.FNGD(share, steps=4, every=2), a, g, lambda e: parts, 5)
    assert len(calls) == 12  # epochs 0, 2 and 4


@pytest.mark.parametrize("method", [kf.FNGD(steps=4, every=1), kf.FNGD(steps=0)], ids=["every epoch", "no epochs"])
def test_computed_at_every_step_is_natural_gradient(method, rng):
    """FNGD-15: every=1, or no epochs, is (F + c I)^-1 V at each step."""
    a, g = pair(rng, (20, 3, 4))
    orders = [np.split(rng.permutation(20), 4) for _ in range(3)]
    for ids, x in epochs(method, a, g, lambda e: orders[e], 3)[0]:
        assert close(x, ngd(a[ids], g[ids], g[ids].T @ a[ids] / 5, 0.1))


def test_a_refreshed_epoch_forgets_the_one_before(rng):
    """FNGD-15: means of a computing epoch are of its own steps alone."""
    a, g = pair(rng, (20, 3, 4))
    parts = np.split(np.arange(20), 4)
    _, state = epochs(kf.FNGD(mean_vector, steps=4, every=2), a, g, lambda e: parts, 3)
    assert state.layers["fc"].betas.count[0, :5].tolist() == [4] * 5
    assert close(state.layers["fc"].betas.value[0, :5], np.mean([betas(kf.FNGD(), a[p], g[p]) for p in parts], 0))


def test_a_table_of_means():
    """What was never added is the mean of all that was; blocks that are not ok stay as they are."""
    index, ok = np.array([2, 0, 2]), np.array([True, False])
    start = table.empty(2, 4, np.zeros(1))
    first = table.added(start, index, np.array([[1.0, 2.0, 6.0], [np.nan] * 3]), ok, False)
    assert first.value.tolist() == [[2.0, 3.0, 3.5, 3.0], [1.0] * 4]
    assert first.count.tolist() == [[1, 0, 2, 0], [0] * 4]
    second = table.added(first, np.array([3]), np.array([[7.0], [4.0]]), ~ok | ok, False)
    assert table.read(second, np.arange(4)).tolist() == [[2.0, 4.0, 3.5, 7.0], [4.0] * 4]
    assert table.added(second, np.array([3]), np.array([[5.0], [6.0]]), ok, True).value.tolist() == [
        [5.0] * 4,
        [4.0] * 4,
    ]


def continues(pre, stop, path, rng):
    """Whether a run saved at `stop` ends in the bits of one that was not."""
    net = kn.Sequential((5,), (kn.Dense(6), kn.Tanh(), kn.Dense(3)))
    data, loss = (rng.normal(size=(20, 5)), rng.integers(0, 3, 20)), kf.SoftmaxCrossEntropy()

    def run(params, state, start, steps):
        for progress in kn.fit(net, params, data, loss, pre, batch=5, steps=steps, state=state, start=start):
            state = progress.state
        return params, state

    params = net.init(np.random.default_rng(0), np.asarray)
    first, state = run(dict(params), None, 0, stop)
    kf.save(path, {"params": first, "state": state})
    tree = kf.load(path, like={"params": first, "state": kn.initial_state(net, first, pre, 20)})
    ends = run(dict(params), None, 0, 12), run(tree["params"], tree["state"], stop, 12)
    return all(np.array_equal(*pair) for pair in zip(*(kf.tree.leaves(end) for end in ends), strict=True))


@EVERY
@pytest.mark.parametrize("stop", [2, 9])
def test_saved_and_continued_bit_for_bit(share, stop, tmp_path, rng):
    """FNGD-16: a run saved and loaded ends in the same bits, in the middle of the first epoch and of the third."""
    pre = kf.Preconditioner(kf.FNGD(share, steps=4), schedules=kf.Schedules(0.3), step=kf.Fixed(0.1, 0.5))
    assert continues(pre, stop, tmp_path / "x.safetensors", rng)


@SIZES
def test_equals_cgfac_and_the_dense_block(sizes, rng):
    """FNGD-17: FNGD = CG on F + c I, converged = its closed form = Exact."""
    a, g = pair(rng, sizes)
    record, V = kf.Record(a, g, float(len(a))), g.T @ a / len(a)
    want = kf.direction(record, V, kf.Exact(), 0.1)
    for method in (kf.FNGD(), kf.CGFAC(Empirical(), CG(Residual(1e-15), 400), 64), kf.CGFAC(Empirical(), InRows(), 64)):
        assert close(solved(method, a, g, V).direction, want, 1e-11)


def test_a_folded_bias_adds_its_gram(rng):
    """FNGD-18: alone, a bias has K = g g^T and coefficients of its own; folded in, K gains g g^T."""
    a, g = pair(rng, (6, 3, 4))
    folded = np.c_[a, np.ones(6)]
    K = units.gram(kf.Record(a, g, 6.0))[0]
    assert close(units.gram(kf.Record(folded, g, 6.0))[0], K + g @ g.T, 1e-12)
    ones = np.ones((6, 1))
    assert close(units.gram(kf.Record(ones, g, 6.0))[0], g @ g.T, 1e-12)
    for rows in (folded, ones):
        DW = g.T @ rows / 6
        assert close(solved(kf.FNGD(), rows, g, DW).direction, ngd(rows, g, DW, 0.1))


def test_padding_does_not_count(rng):
    """Masked positions are zero rows; n is what says how many there are."""
    a, g = rng.normal(size=(4, 3, 5)), rng.normal(size=(4, 3, 2))
    mask = np.ones((4, 3), bool)
    mask[1, 1:] = mask[3, 2:] = False
    V = rng.normal(size=(2, 5))
    record = kf.Record(a, g, float(mask.sum()), mask)
    token = kf.FNGD(sharing=kf.expand)
    want = ngd(a[mask], g[mask], V, 0.1, mask.sum())
    hyper = kf.Hyper(0, 0.0, 0.1)
    assert close(token.solve(kf.settle(token, record), V, hyper, record).direction, want)


def test_tokens_are_weighted_one_by_one(rng):
    a, g = rng.normal(size=(4, 3, 5)), rng.normal(size=(4, 3, 2))
    method = kf.FNGD(position, steps=1, sharing=kf.expand)
    DW = np.einsum("nso,nsi->oi", g, a) / 4
    state = solved(method, a, g, DW).state
    scaled = method.weighted(state, g, kf.Hyper(1, 0.0, 0.1))
    assert close(np.einsum("nso,nsi->oi", scaled, a) / 4, ngd(a.reshape(12, 5), g.reshape(12, 2), DW, 0.1, 4))


def test_micro_batches_are_one_batch(rng):
    a, g = pair(rng, (9, 3, 4))
    pre = kf.Preconditioner(kf.FNGD(), schedules=kf.Schedules(0.1))
    state = pre.init({"fc": kf.Block(4, 3)}, a)
    parts = [kf.Record(a[s], g[s], float(len(a[s]))) for s in (slice(0, 4), slice(4, 9))]
    DW = g.T @ a / 9
    assert close(pre.step(state, {"fc": parts}, {"fc": DW})[0]["fc"], ngd(a, g, DW, 0.1))


def test_under_a_rule_that_needs_records_every_step_computes(rng):
    """A self-tuning step needs the true gradient and sampled draws: nothing is shared, and true labels are refused."""
    net = kn.Sequential((5,), (kn.Dense(6), kn.Tanh(), kn.Dense(3)))
    params, data = net.init(rng, np.asarray), (rng.normal(size=(20, 5)), rng.integers(0, 3, 20))
    pre, loss = kf.Preconditioner(kf.FNGD(steps=2), step=kf.SelfTuning()), kf.SoftmaxCrossEntropy()
    state = kn.initial_state(net, params, pre)
    with pytest.raises(ValueError, match="true labels"):
        kn.step(net, params, data, loss, pre, state, 0, rng)
    for index in range(5):
        assert pre.wants_records(state)
        _, state, info = kn.step(net, params, data, loss, pre, state, index, rng, kn.sampled)
        assert info.counts() == {kf.Code.OK: 2}


def test_under_jit(rng):
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    a, g = pair(rng, (6, 3, 4))
    V = rng.normal(size=(4, 3))

    def run(a, g, V):
        record, method = kf.Record(a, g, 6.0), kf.FNGD()
        return method.solve(kf.settle(method, record), V, kf.Hyper(0, 0.0, 0.1), record).direction

    got = jax.jit(run)(*(jax.numpy.asarray(x) for x in (a, g, V)))
    assert close(np.asarray(got), ngd(a, g, V, 0.1))
    _, records, grads = layers(rng)
    method = kf.GlobalFNGD(steps=2)

    def together(rows, grads, step):
        seen, hypers = {n: kf.Record(*x, 7.0) for n, x in rows.items()}, dict.fromkeys(rows, kf.Hyper(step, 0.0, 0.1))
        state = method.init({name: kf.Block.of(r) for name, r in seen.items()}, grads["first"])
        state = method.update(state, method.measure(state, seen, hypers), hypers)
        return method.solve(method.refresh(state, hypers), grads, hypers, seen).direction

    rows = {name: (r.a[0], r.g[0, 0]) for name, r in records.items()}
    got = jax.jit(together)(*jax.tree.map(jax.numpy.asarray, (rows, grads, 0)))
    assert close(flat(got), whole_ngd(records, grads, 0.1))


def layers(rng, B=7):
    sizes = {"first": (3, 4), "second": (5, 2)}
    pairs = {name: (rng.normal(size=(B, i)), rng.normal(size=(B, o))) for name, (i, o) in sizes.items()}
    records = {name: kf.Record(a, g, float(B)) for name, (a, g) in pairs.items()}
    return pairs, records, {name: g.T @ a / B for name, (a, g) in pairs.items()}


def whole(damping=0.1, clocks=None, step=None, **fields):
    clocks, step = clocks or kf.Clocks(1, 1), step or kf.Fixed()
    return kf.Preconditioner(network=kf.GlobalFNGD(**fields), clocks=clocks, schedules=kf.Schedules(damping), step=step)


def flat(tree):
    return np.concatenate([np.ravel(x) for x in tree.values()])


def whole_ngd(records, grads, damping):
    """(F + diag(damping))^-1 of the gradients, F of all layers; damping is a number or one a layer."""
    n = next(iter(records.values())).n
    J = np.concatenate([np.moveaxis(r.examples()[0], 0, 1).reshape(r.batch, -1) for r in records.values()], 1)
    each = [np.full(g.size, damping[name] if isinstance(damping, dict) else damping) for name, g in grads.items()]
    return np.linalg.solve(J.T @ J / n + np.diag(np.concatenate(each)), flat(grads))


def kinds(rng):
    """Records of one batch: rows, a convolution, tokens, an embedding, two blocks; and any gradients."""
    patches = kf.Patches(rng.normal(size=(6, 4, 4, 2)), kf.Window((3, 3), padding=1), bias=True)
    records = {
        "fc": kf.Record(rng.normal(size=(6, 4)), rng.normal(size=(6, 3)), 6.0),
        "conv": kf.Record(patches, rng.normal(size=(6, 16, 2)), 6.0),
        "tokens": kf.Record(rng.normal(size=(6, 3, 2)), rng.normal(size=(6, 3, 2)), 6.0),
        "words": kf.Record(kf.Ids(rng.integers(0, 5, (6, 3)), 5), rng.normal(size=(6, 3, 2)), 6.0),
        "heads": kf.Record(rng.normal(size=(2, 6, 1, 2)), rng.normal(size=(1, 2, 6, 1, 3)), 6.0),
    }
    return records, {name: rng.normal(size=(r.blocks, r.d_out, r.d_in)) for name, r in records.items()}


@pytest.mark.parametrize(
    "damping", [0.1, {"fc": 0.1, "conv": 0.5, "tokens": 0.02, "words": 1.0, "heads": 0.1}], ids=str
)
def test_global_is_the_whole_networks_fisher(damping, rng):
    """Through a Preconditioner, for any gradients; the batch may come in micro-batches."""
    records, grads = kinds(rng)
    pre = whole(damping)
    state = pre.init({name: kf.Block.of(r) for name, r in records.items()}, grads["fc"])
    updates, _, info = pre.step(state, records, grads)
    assert close(flat(updates), whole_ngd(records, grads, damping))
    assert info.counts() == {kf.Code.OK: 6}
    pairs, records, grads = layers(rng)
    pre, parts = whole(), (slice(0, 3), slice(3, 7))
    halves = {n: [kf.Record(a[s], g[s], float(len(a[s]))) for s in parts] for n, (a, g) in pairs.items()}
    given = {"first": grads["first"], "second": kf.Factored(*pairs["second"], 7.0)}
    state = pre.init({name: kf.Block.of(r) for name, r in records.items()}, grads["first"])
    found = pre.step(state, halves, given)[0]
    assert close(flat(found), whole_ngd(records, grads, 0.1))
    assert {name: x.ndim for name, x in found.items()} == {"first": 2, "second": 3}


@pytest.mark.parametrize("damping", [1e-6, {"first": 0.1, "second": 0.7}], ids=str)
def test_global_from_rows(damping, rng, monkeypatch):
    """Gradients that are the records' own rows need no difference; others, or of unlike n, are solved all the same."""
    pairs, records, grads = layers(rng, 4)
    pre = whole(damping)
    state = pre.init({name: kf.Block.of(r) for name, r in records.items()}, grads["first"])
    other = {name: (a, rng.normal(size=g.shape)) for name, (a, g) in pairs.items()}
    half = {"first": kf.Factored(*pairs["first"], 4.0), "second": kf.Factored(*pairs["second"], 8.0)}
    tolerance = 1e-10 if isinstance(damping, dict) else 1e-6
    for given in ({n: kf.Factored(*p, 4.0) for n, p in other.items()}, half):
        dense = {name: x.dense() for name, x in given.items()}
        assert close(flat(pre.step(state, records, given)[0]), whole_ngd(records, dense, damping), tolerance)
    monkeypatch.setattr(kf.GlobalFNGD, "_general", None)
    found = pre.step(state, records, {name: kf.Factored(*p, 4.0) for name, p in pairs.items()})[0]
    assert close(flat(found), whole_ngd(records, grads, damping), tolerance)
    found = pre.step(state, records, {name: kf.Factored(*p, 8.0) for name, p in pairs.items()})[0]
    assert close(2 * flat(found), whole_ngd(records, grads, damping), tolerance)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_global_rows_that_are_not_finite(bad, rng):
    pairs, records, grads = layers(rng)
    pre = whole(steps=5)
    _, state, _ = pre.step(pre.init({n: kf.Block.of(r) for n, r in records.items()}, grads["first"]), records, grads)
    a, g = pairs["second"]
    pairs = {**pairs, "second": (a, np.where(np.arange(7)[:, None] == 3, bad, g))}
    records = {name: kf.Record(*p, 7.0) for name, p in pairs.items()}
    updates, after, info = pre.step(state, records, {name: kf.Factored(*p, 7.0) for name, p in pairs.items()})
    assert not flat(updates).any()
    assert info.counts() == {kf.Code.NONFINITE: 2}
    trees = (kf.tree.leaves(x.network) for x in (state, after))
    assert all(np.array_equal(one, two) for one, two in zip(*trees, strict=True))


@pytest.mark.parametrize("damping", [0.1, {"first": 0.1, "second": 0.7}], ids=str)
@EVERY
def test_global_coefficients_are_shared(share, damping, rng, monkeypatch):
    """Later epochs take neither records nor solves: x_l = sum_n beta_n J_n / (n r_l) of the first epoch's beta."""
    pairs, records, grads = layers(rng, 12)
    pre = whole(damping, steps=3, share=share)
    state = pre.init({name: replace(kf.Block.of(r), samples=12) for name, r in records.items()}, grads["first"])
    calls, firsts, parts = counting(monkeypatch), [], np.split(rng.permutation(12), 3)
    r = {name: damping[name] / 0.7 if isinstance(damping, dict) else 1.0 for name in pairs}
    top, betas = max(r.values()) * (0.7 if isinstance(damping, dict) else damping), []
    for step in range(9):
        ids = parts[step % 3]
        assert pre.wants_records(state) == (step < 3)
        own = {name: (a[ids], g[ids]) for name, (a, g) in pairs.items()}
        scaled = kf.weighted(pre, state, {name: g for name, (_, g) in own.items()}, ids)
        given = {name: scaled[name].T @ a / 4 for name, (a, _) in own.items()}
        seen = {name: kf.Record(a, g, 4.0, ids=ids) for name, (a, g) in own.items()} if step < 3 else None
        updates, state, info = pre.step(state, seen, given)
        assert info.counts() == {kf.Code.OK: 2}
        if step < 3:
            K = sum(U(*own[name]) @ U(*own[name]).T / r[name] for name in own)
            betas.append(4 * np.linalg.solve(K + 4 * top * np.eye(4), np.ones(4)))
            firsts.append(updates)
            continue
        beta = {mean_vector: np.mean(betas, 0), scalar_rate: np.mean(betas)}.get(share, betas[step % 3])
        for name, (a, g) in own.items():
            assert close(updates[name], (g * np.reshape(beta, (-1, 1))).T @ a / 4 / r[name])
        if share in (position, sample):
            assert close(flat(updates), flat(firsts[step % 3]))
    assert len(calls) == 3


def test_global_in_the_numpy_shell(rng, monkeypatch):
    """First the whole network's natural gradient; then ordinary weight gradients of weighted output gradients."""
    net, params = network(rng)
    loss, (x, y) = kf.SoftmaxCrossEntropy(), (rng.normal(size=(8, 6, 6, 1)), rng.integers(0, 3, 8))
    pre = whole(steps=1, step=kf.Fixed(0.1))
    state, calls, products = kn.initial_state(net, params, pre), counting(monkeypatch), []
    for kind in (kn.Conv2d, kn.Dense):
        original = kind.gradient
        count = lambda self, *args, original=original: products.append(args[-1]) or original(self, *args)  # noqa: E731
        monkeypatch.setattr(kind, "gradient", count)
    for index in range(3):
        old = dict(params)
        f, tape = net.forward(params, x)
        g = net.backward(params, tape, loss.gradient(f, y))
        records, grads = net.records(tape, g, 8.0), net.gradients(tape, g, 8.0, factored=False)
        before = len(products)
        _, state, info = kn.step(net, params, (x, y), loss, pre, state, index, rng)
        assert products[before:] == [not index] * 3  # rows not multiplied out only where they are to be solved for
        assert len(calls) == 1
        assert info.counts() == {kf.Code.OK: 3}
        moved = flat({name: (old[name] - params[name]) / 0.1 for name in grads})
        if not index:
            assert close(moved, whole_ngd(records, grads, 0.1))
            J = np.concatenate([r.examples()[0, 0].reshape(8, -1) for r in records.values()], 1)
            beta = 8 * np.linalg.solve(J @ J.T + 0.8 * np.eye(8), np.ones(8))
        else:
            want = {name: np.einsum("n,noi->oi", beta, r.examples()[0, 0]) / 8 for name, r in records.items()}
            assert close(moved, flat(want))


@pytest.mark.parametrize("stop", [2, 9])
def test_global_saved_and_continued_bit_for_bit(stop, tmp_path, rng):
    pre = whole(0.3, steps=4, share=sample, step=kf.Fixed(0.1, 0.5))
    assert continues(pre, stop, tmp_path / "x.safetensors", rng)


@pytest.mark.parametrize("method", ["layer by layer", "global"])
def test_what_is_not_finite_is_a_code_and_leaves_the_table(method, rng):
    pairs, records, grads = layers(rng)
    pre = whole(steps=5) if method == "global" else kf.Preconditioner(kf.FNGD(steps=5), kf.Clocks(1, 1))
    of = (lambda state: state.network) if method == "global" else (lambda state: state.layers)
    fresh = pre.init({name: kf.Block.of(r) for name, r in records.items()}, grads["first"])
    a, g = pairs["second"]
    bad = {**records, "second": kf.Record(a, np.where(np.arange(2) == 0, np.nan, g), 7.0)}
    _, state, info = pre.step(fresh, records, grads)
    assert info.counts() == {kf.Code.OK: 2}
    after, rest = {}, [name for name in grads if method == "global" or name == "second"]
    for start in (fresh, state):
        updates, after, info = pre.step(start, bad, grads)
        assert {name for name, code in info.codes.items() if code[0] == kf.Code.NONFINITE} == set(rest)
        for name in rest:  # before the first record the gradient, zero after it
            assert np.array_equal(updates[name], grads[name] if start is fresh else 0 * grads[name])
        if method == "global":
            pairs_of = zip(kf.tree.leaves(of(start)), kf.tree.leaves(of(after)), strict=True)
            assert all(np.array_equal(one, two) for one, two in pairs_of)
        else:
            assert np.array_equal(of(after)["second"].betas.count, of(start)["second"].betas.count)
    updates, after, info = pre.step(state, records, {**grads, "second": np.full((2, 5), np.nan)})
    assert all(not updates[name].any() and info.codes[name][0] == kf.Code.NONFINITE for name in rest)


def test_global_before_the_first_record(rng):
    """A shell that starts in a later epoch does SGD; its records are taken no notice of."""
    pairs, records, grads = layers(rng)
    pre = whole(steps=1)
    state = replace(pre.init({name: kf.Block.of(r) for name, r in records.items()}, grads["first"]), step=1)
    g = {name: g for name, (_, g) in pairs.items()}
    assert all(np.array_equal(x, g[name]) for name, x in kf.weighted(pre, state, g).items())
    assert not pre.wants_records(state)
    for given in (None, records):
        updates, after, info = pre.step(state, given, grads)
        assert np.array_equal(flat(updates), flat(grads))
        assert info.counts() == {kf.Code.IDENTITY: 2}
        assert after.network.layers["first"].weight.tolist() == [0]


def test_global_clocks_and_rules(rng):
    """Records at every computing step whatever the clock; under a rule that needs records no step rests."""
    _, records, grads = layers(rng)
    blocks = {name: kf.Block.of(r) for name, r in records.items()}
    pre = whole(steps=3, clocks=kf.Clocks(4, 4))
    state = pre.init(blocks, grads["first"])
    for step in range(6):
        assert pre.wants_records(state) == (step < 3)
        if step == 1:
            with pytest.raises(ValueError, match=r"layers .* have gradients but no records, which GlobalFNGD"):
                pre.step(state, None, grads)
        updates, state, _ = pre.step(state, records if step < 3 else None, grads)
        assert close(flat(updates), whole_ngd(records, grads, 0.1) if step < 3 else flat(grads))
    assert state.network.layers["first"].betas.count[0, :7].tolist() == [3] * 7
    pre = whole(steps=1, step=kf.SelfTuning())
    state = replace(pre.init(blocks, grads["first"]), step=3)
    assert pre.wants_records(state)
    assert kf.weighted(pre, state, grads) is grads


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "looped"])
def test_solved_with_the_rows_of_every_batch_whatever_the_clocks(stacked, rng):
    """Between two updates of the clock, too: the gradient itself is another direction. Rests need none."""
    method = kf.FNGD(steps=5, every=0)
    pre = kf.Preconditioner(method, kf.Clocks(3, 4), kf.Schedules(0.1, 0.9), stacked=stacked)
    state = pre.init({name: kf.Block(4, 3) for name in ("one", "two")}, np.zeros(1))
    for step in range(7):
        pairs = {name: pair(rng, (6, 3, 4)) for name in ("one", "two")}
        records = {name: kf.Record(a, g, 6.0) for name, (a, g) in pairs.items()}
        grads = {name: g.T @ a / 6 for name, (a, g) in pairs.items()}
        assert pre.wants_records(state) == (step < 5)
        if step < 5:
            with pytest.raises(
                ValueError, match=r"\['one', 'two'\] have gradients but no records, and FNGD solves with"
            ):
                pre.step(state, None, grads)
        found, state, info = pre.step(state, records, grads)
        for name, (a, g) in pairs.items():
            assert close(found[name], ngd(a, g, grads[name], 0.1) if step < 5 else grads[name])
        assert info.counts() == {kf.Code.OK: 2}
    assert state.layers["one"].betas.count[0, :6].tolist() == [5] * 6


class Part(kf.GlobalFNGD):
    def covers(self, blocks):
        return ["first"]


@pytest.mark.parametrize("kind", ["global", "layer by layer"])
def test_beside_a_method_that_never_rests(kind, rng):
    """Records of layers that rest need not be given, and are not looked at where they are."""
    pairs, records, grads = layers(rng)
    chosen = {"methods": {"first": kf.FNGD(steps=1), "second": kf.KFAC()}}
    chosen = {"methods": kf.KFAC(), "network": Part(steps=1)} if kind == "global" else chosen
    pre = kf.Preconditioner(**chosen, clocks=kf.Clocks(1, 1), schedules=kf.Schedules(0.1, 0.0))
    state = pre.init({name: kf.Block.of(r) for name, r in records.items()}, grads["first"])
    first, state, _ = pre.step(state, records, grads)
    assert close(first["first"], ngd(*pairs["first"], grads["first"], 0.1))
    scaled = kf.weighted(pre, state, {name: g for name, (_, g) in pairs.items()})
    assert np.array_equal(scaled["second"], pairs["second"][1])
    given = {**grads, "first": scaled["first"].T @ pairs["first"][0] / 7}
    spoiled = kf.Record(np.nan * pairs["first"][0], pairs["first"][1], 7.0)
    assert pre.wants_records(state)
    for seen in ({"second": records["second"]}, {**records, "first": spoiled}, records):
        updates, _, info = pre.step(state, seen, given)
        assert close(updates["first"], first["first"])
        assert close(updates["second"], first["second"])
        assert info.counts() == {kf.Code.OK: 2}


def test_the_table_is_filled_between_the_first_refresh_and_the_first_rest(rng):
    _, records, grads = layers(rng)
    hypers = [{name: kf.Hyper(step, 0.0, 0.1) for name in grads} for step in range(2)]
    method = kf.GlobalFNGD(steps=1)
    fresh = method.init({name: kf.Block.of(r) for name, r in records.items()}, grads["first"])
    seen = method.update(fresh, method.measure(fresh, records, hypers[0]), hypers[0])
    found = method.solve(seen, grads, hypers[0], records)
    assert np.array_equal(flat(found.direction), flat(grads))
    assert all(code.tolist() == [kf.Code.IDENTITY] for code in found.code.values())
    assert not found.state.layers["first"].betas.count.any()
    ready = method.refresh(seen, hypers[0])
    assert method.solve(ready, grads, hypers[0], records).state.layers["first"].betas.count.sum() == 7
    found = method.solve(ready, grads, hypers[1], records)
    assert close(flat(found.direction), whole_ngd(records, grads, 0.1))
    assert not found.state.layers["first"].betas.count.any()


def test_global_float32(rng):
    """The state keeps its dtype, updates the gradient's, and small damping does not cost all digits."""
    pairs, records, grads = layers(rng, 4)
    pairs = {name: [np.float32(x) for x in both] for name, both in pairs.items()}
    records = {name: kf.Record(a, g, 4.0) for name, (a, g) in pairs.items()}
    wide = {name: kf.Record(a.astype(float), g.astype(float), 4.0) for name, (a, g) in pairs.items()}
    grads = {name: (g.astype(float)).T @ a / 4 for name, (a, g) in pairs.items()}
    for like in (np.zeros(1, np.float32), np.zeros(1)):
        pre = whole(1e-5, steps=1)
        state = pre.init({name: kf.Block.of(r) for name, r in records.items()}, like)
        rounded = {name: g.astype(np.float32) for name, g in grads.items()}
        own, turned = (
            {n: kf.Factored(a[s], g[s], 4.0) for n, (a, g) in pairs.items()} for s in ([0, 1, 2, 3], [3, 2, 1, 0])
        )
        for given, tolerance in ((own, 1e-6), (turned, 1e-6), (rounded, 0.1)):
            updates, after, _ = pre.step(state, records, given)
            assert {x.dtype for x in updates.values()} == {np.dtype(np.float32)}
            assert after.network.layers["first"].betas.value.dtype == like.dtype
            assert close(flat(updates), whole_ngd(wide, grads, 1e-5), tolerance)


def test_global_in_every_namespace(xp):
    found = []
    for put in (np.asarray, xp.put):
        pairs, _, grads = layers(np.random.default_rng(5))
        records = {name: kf.Record(put(a), put(g), 7.0) for name, (a, g) in pairs.items()}
        grads = {name: put(x) for name, x in grads.items()}
        pre = whole(steps=1)
        state = pre.init({name: kf.Block.of(r) for name, r in records.items()}, grads["first"])
        updates, state, _ = pre.step(state, records, grads)
        g = kf.weighted(pre, state, {name: put(g) for name, (_, g) in pairs.items()})
        found.append({**updates, **{f"{name} g": x for name, x in g.items()}})
    for name, want in found[0].items():
        np.testing.assert_allclose(xp.get(found[1][name]), want, rtol=1e-10, atol=1e-12)


def test_refusals(rng):
    a, g = pair(rng, (5, 3, 4))
    with pytest.raises(ValueError, match=r"Block\.samples"):
        kf.FNGD(sample).init(kf.Block(4, 3), a)
    with pytest.raises(ValueError, match="no ids"):
        solved(kf.FNGD(sample), a, g, g.T @ a)
    with pytest.raises(ValueError, match="4 slots"):
        solved(kf.FNGD(slots=4), a, g, g.T @ a)
    with pytest.raises(ValueError, match="positions differ"):
        kf.GlobalFNGD(sharing=kf.expand)
    _, records, grads = layers(rng)
    records["second"] = kf.Record(*(rng.normal(size=(6, d)) for d in (5, 2)), 6.0)
    pre = whole()
    with pytest.raises(ValueError, match="batch is 7 in layer 'first' and 6 in 'second'"):
        pre.step(pre.init({name: kf.Block.of(r) for name, r in records.items()}, a), records, grads)
    with pytest.raises(ValueError, match="2 blocks"):
        kf.FNGD(steps=1).weighted(kf.FNGD(steps=1).init(kf.Block(4, 3, 2), a), g, kf.Hyper(1, 0.0, 0.1))


@pytest.mark.parametrize("damping", [1e-4, 1e-6, 1e-8, 1e-11, 1e-12])
@pytest.mark.parametrize("network", [False, True], ids=["layer", "network"])
def test_a_gradient_of_repeated_examples_that_is_multiplied_out(rng, network, damping):
    """K of examples that depend on each other has nothing but the damping along them, and V nothing there."""
    index = rng.integers(0, 5, size=12)
    a, g = (x[index] for x in pair(rng, (5, 9, 8)))
    V = g.T @ a / 12
    left, s, right = np.linalg.svd(U(a, g) / 12**0.5, full_matrices=False)
    k = len(np.unique(index))  # V = J^T 1 / B through singular vectors: nothing cancels
    want = right[:k].T @ (s[:k] / (s[:k] ** 2 + damping) * left[:, :k].sum(0) / 12**0.5)
    if network:
        record, hypers = kf.Record(a, g, 12.0), {"x": kf.Hyper(0, 0.0, damping)}
        state = kf.GlobalFNGD().init({"x": kf.Block.of(record)}, V)
        state = kf.GlobalFNGD().update(state, kf.GlobalFNGD().measure(state, {"x": record}, hypers), hypers)
        state = kf.GlobalFNGD().refresh(state, hypers)
        found = kf.GlobalFNGD().solve(state, {"x": V}, hypers, {"x": record}).direction["x"]
    else:
        found = solved(kf.FNGD(), a, g, V, damping).direction
    # rounding V costs eps of the largest curvature over the damping
    assert close(np.ravel(found), want, 30 * np.finfo(float).eps * s[0] ** 2 / damping)
