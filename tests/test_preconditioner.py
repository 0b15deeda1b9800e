"""Clocks, schedules, steps, rescaling, frozen layers, memory and donation."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from kfaccore import tree
from kfaccore.precondition import schedule


def layers(rng, names="ab"):
    records, grads = {}, {}
    for name in names:
        a, g = rng.normal(size=(6, 4)), rng.normal(size=(6, 3))
        records[name], grads[name] = kf.Record(a, g, 6.0), g.T @ a / 6
    return records, grads, {name: kf.Block(3, 4) for name in names}


def test_clocks(rng):
    pre = kf.Preconditioner(kf.KFAC(), clocks=kf.Clocks(2, 3))
    records, grads, blocks = layers(rng)
    state, seen = pre.init(blocks, grads["a"]), []
    for _ in range(7):
        wanted = pre.wants_records(state)
        _, state, info = pre.step(state, records if wanted else None, grads)
        assert wanted == info.updated
        seen.append((info.updated, info.refreshed))
    assert [u for u, _ in seen] == [True, False, True, False, True, False, True]
    assert [r for _, r in seen] == [True, False, False, True, False, False, True]
    assert state.step == 7


def test_one_step_is_direction(rng):
    records, grads, blocks = layers(rng)
    pre = kf.Preconditioner(kf.KFAC(), schedules=kf.Schedules(damping=0.02))
    updates, _, info = pre.step(pre.init(blocks, grads["a"]), records, grads)
    for name in "ab":
        np.testing.assert_allclose(updates[name], kf.direction(records[name], grads[name], damping=0.02), rtol=1e-12)
    assert info.counts() == {kf.Code.OK: 2}


def test_decay_multiplies_the_old_average(rng):
    pre = kf.Preconditioner(kf.KFAC(), schedules=kf.Schedules(decay=0.9))
    first, grads, blocks = layers(rng)
    second, _, _ = layers(rng)
    state = pre.init(blocks, grads["a"])
    for records in (first, second):
        state = pre.step(state, records, grads)[1]
    A = [r["a"].a[0, :, 0].T @ r["a"].a[0, :, 0] / 6 for r in (first, second)]
    np.testing.assert_allclose(state.layers["a"].A[0], 0.09 * A[0] + 0.1 * A[1], rtol=1e-12)
    np.testing.assert_allclose(state.layers["a"].weight, [0.19], rtol=1e-12)


def test_schedules_and_damping_by_layer(rng):
    records, grads, blocks = layers(rng)
    dampings = {"a": schedule.exponential(1.0, 0.5), "b": 0.3}
    pre = kf.Preconditioner(kf.KFAC(inverse=kf.eigh), schedules=kf.Schedules(dampings))
    state = pre.init(blocks, grads["a"])
    for step in range(3):
        updates, state, _ = pre.step(state, records, grads)
        for name, damping in (("a", 0.5**step), ("b", 0.3)):
            want = kf.direction(records[name], grads[name], damping=damping)
            np.testing.assert_allclose(updates[name], want, rtol=1e-9, atol=1e-12)
    partial = kf.Preconditioner(kf.KFAC(), schedules=kf.Schedules({"a": 1.0}), donate=True)
    state = partial.step(partial.init(blocks, grads["a"]), records, {"a": grads["a"]})[1]
    kept = state.layers["a"].A.copy()
    with pytest.raises(ValueError, match="no entry for layer 'b'"):
        partial.step(state, records, grads)
    assert np.array_equal(state.layers["a"].A, kept)


def test_schedule_values():
    assert [schedule.linear(1.0, 0.0, 4)(s) for s in (0, 2, 9)] == [1.0, 0.5, 0.0]
    assert schedule.cosine(1.0, 0.0, 4)(2) == pytest.approx(0.5)
    assert [schedule.piecewise((3.0, 2.0, 1.0), (2, 5))(s) for s in (1, 2, 4, 5)] == [3.0, 2.0, 2.0, 1.0]
    assert schedule.exponential(1.0, 0.1, 0.05)(9) == 0.05
    assert schedule.constant(2.0)(7) == 2.0
    with pytest.raises(ValueError, match="one value more"):
        schedule.piecewise((1.0,), (3,))


def test_frozen_layers_are_not_touched(rng):
    records, grads, blocks = layers(rng)
    pre = kf.Preconditioner(kf.KFAC())
    state = pre.init(blocks, grads["a"])
    updates, after, _ = pre.step(state, records, {"a": grads["a"]})
    assert set(updates) == {"a"}
    for old, new in zip(tree.leaves(state.layers["b"]), tree.leaves(after.layers["b"]), strict=True):
        assert np.array_equal(old, new)


def test_a_method_for_each_layer(rng):
    records, grads, blocks = layers(rng)
    pre = kf.Preconditioner({"a": kf.Identity(), "b": kf.EKFAC()})
    updates, _, _ = pre.step(pre.init(blocks, grads["a"]), records, grads)
    assert np.array_equal(updates["a"], grads["a"])
    with pytest.raises(ValueError, match=r"no entry for layer 'b'; give it one, Identity\(\)"):
        kf.Preconditioner({"a": kf.KFAC()}).init(blocks, grads["a"])


def test_micro_batches_equal_the_whole(rng):
    a, g = rng.normal(size=(6, 4)), rng.normal(size=(6, 3))
    parts = [kf.Record(a[:2], g[:2], 2.0), kf.Record(a[2:], g[2:], 4.0)]
    pre = kf.Preconditioner(kf.KFAC())
    state = pre.init({"a": kf.Block(3, 4)}, a)
    found = [pre.step(state, {"a": r}, {"a": g.T @ a})[0]["a"] for r in (parts, kf.Record(a, g, 6.0))]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-12)


def test_momentum_comes_after(rng):
    records, grads, blocks = layers(rng)
    plain, heavy = kf.Preconditioner(kf.KFAC()), kf.Preconditioner(kf.KFAC(), step=kf.Fixed(0.1, 0.9))
    s, t = (p.init(blocks, grads["a"]) for p in (plain, heavy))
    buffer = 0
    for _ in range(3):
        x, s, _ = plain.step(s, records, grads)
        y, t, _ = heavy.step(t, records, grads)
        buffer = 0.9 * buffer + x["a"]
        np.testing.assert_allclose(y["a"], 0.1 * buffer, rtol=1e-12)


@pytest.mark.parametrize("factored", [False, True])
def test_kl_clip(rng, factored):
    records, grads, blocks = layers(rng)
    given = {n: kf.Factored(r.a, r.g[0], 6.0) for n, r in records.items()} if factored else grads
    plain = kf.Preconditioner(kf.KFAC())
    x, _, _ = plain.step(plain.init(blocks, grads["a"]), records, grads)
    total = sum((x[n] * grads[n]).sum() for n in "ab")
    for kappa, lr in ((1e-3, 1.0), (1e-3, 0.5), (1e9, 1.0)):
        pre = kf.Preconditioner(kf.KFAC(), step=kf.Fixed(lr, 0.0, kf.KLClip(kappa)))
        y, _, info = pre.step(pre.init(blocks, grads["a"]), records, given)
        nu = min(1.0, np.sqrt(kappa / (lr**2 * total)))
        np.testing.assert_allclose(np.reshape(y["a"], (3, 4)), lr * nu * x["a"], rtol=1e-11)
        assert info.step["scale"] == pytest.approx(nu)


def test_norm_constraint(rng):
    records, grads, blocks = layers(rng)
    pre = kf.Preconditioner(kf.KFAC(), step=kf.Fixed(2.0, 0.0, kf.NormConstraint(0.01)))
    y, _, _ = pre.step(pre.init(blocks, grads["a"]), records, grads)
    assert np.sqrt(sum((v**2).sum() for v in y.values())) == pytest.approx(0.01)


def test_memory_is_what_init_allocates(rng):
    blocks = {"a": kf.Block(3, 4, 2), "e": kf.Block(3, 50, diagonal_in=True)}
    for method in (kf.KFAC(), kf.EKFAC(), kf.Diagonal()):
        pre = kf.Preconditioner(method)
        state = pre.init(blocks, np.zeros(1, np.float32))
        want = {name: sum(x.nbytes for x in tree.leaves(s)) for name, s in state.layers.items()}
        assert pre.memory(blocks) == want


def test_donation_reuses_the_state_and_changes_no_result(rng):
    found = []
    for donate in (False, True):
        fresh = np.random.default_rng(1)
        records, grads, blocks = layers(fresh)
        pre = kf.Preconditioner(kf.KFAC(), donate=donate)
        state = pre.init(blocks, grads["a"])
        for _ in range(3):
            old = state
            updates, state, _ = pre.step(state, records, grads)
        assert np.shares_memory(old.layers["a"].A, state.layers["a"].A) == donate
        found.append(updates["a"])
    assert np.array_equal(*found)


def test_every_namespace(xp, rng):
    records, grads, blocks = layers(rng)
    found = []
    for put in (np.array, xp.put):
        pre = kf.Preconditioner(kf.EKFAC(), step=kf.Fixed(0.1, 0.9, kf.KLClip()), clocks=kf.Clocks(1, 2))
        state = pre.init(blocks, put(grads["a"]))
        moved = {n: kf.Record(put(r.a), put(r.g), 6.0) for n, r in records.items()}
        for _ in range(4):
            updates, state, info = pre.step(state, moved, {n: put(v) for n, v in grads.items()})
        found.append(updates["a"])
        assert info.counts() == {kf.Code.OK: 2}
    np.testing.assert_allclose(xp.get(found[1]), found[0], rtol=1e-10)


def test_float64_on_request(rng):
    """Float32 records and gradients, averages and inverses in float64, updates in float32."""
    a, g = rng.normal(size=(50, 4)).astype(np.float32), rng.normal(size=(50, 3)).astype(np.float32)
    grad = (g.T @ a / 50).astype(np.float32)
    pre = kf.Preconditioner(kf.KFAC(), schedules=kf.Schedules(damping=1e-3))
    wide, narrow = (pre.init({"a": kf.Block(3, 4)}, np.zeros(1, dtype)) for dtype in (np.float64, np.float32))
    for _ in range(3):
        updates, wide, _ = pre.step(
            wide, {"a": [kf.Record(a[:20], g[:20], 20.0), kf.Record(a[20:], g[20:], 30.0)]}, {"a": grad}
        )
        narrow = pre.step(narrow, {"a": kf.Record(a, g, 50.0)}, {"a": grad})[1]
    assert updates["a"].dtype == np.float32
    assert {leaf.dtype for leaf in tree.leaves(wide.layers["a"].inverse)} == {np.dtype(np.float64)}
    assert {leaf.dtype for leaf in tree.leaves(narrow.layers["a"].inverse)} == {np.dtype(np.float32)}
    share = 1 - 0.95**3
    np.testing.assert_allclose(wide.layers["a"].weight, [share], rtol=1e-14)
    exact = a.astype(np.float64).T @ a.astype(np.float64) / 50
    np.testing.assert_allclose(wide.layers["a"].A[0], share * exact, rtol=1e-5, atol=1e-7)


def test_rules_average_gradients_but_those_solved_with_the_batch():
    """FNGD's direction is made of the rows of the batch: its gradient must be theirs."""
    pre = kf.Preconditioner({"rows": kf.FNGD(), "plain": kf.KFAC()}, step=kf.SelfTuning())
    grads = {name: np.ones((2, 3)) for name in ("rows", "plain")}
    assert pre.assigned.free(grads, grads).keys() == {"plain"}
