"""The quadratic model from records, the step it chooses, and how damping follows."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pytest

import kfaccore as kf
import kfaccore_numpy as kn
from kfaccore import tree
from kfaccore.step.model import Expansion, expansion
from kfaccore.step.noise import Noise
from kfaccore.xp.codes import Code


def batch(rng, masked=False):
    """Two layers of one batch: one with blocks and shared positions, one plain; the same draws."""
    mask = rng.uniform(size=(6, 3)) < 0.7 if masked else None
    first = kf.Record(rng.normal(size=(2, 6, 3, 4)), rng.normal(size=(5, 2, 6, 3, 3)), 6.0, mask)
    second = kf.Record(rng.normal(size=(6, 5)), rng.normal(size=(5, 6, 2)), 6.0)
    return {"a": first, "b": second}


def directions(rng):
    return {"a": rng.normal(size=(2, 3, 4)), "b": rng.normal(size=(1, 2, 5))}


def curvature(records, pair):
    grads = {n: x * 0 for n, x in pair[0].items()}
    return expansion(records, grads, tuple(pair)).F


def whole(records):
    """F over all layers, (24 + 10, 24 + 10), from the joined gradients of each draw and example."""
    J = [r.examples().transpose(0, 2, 1, 3, 4).reshape(30, -1) for r in records.values()]
    J = np.concatenate(J, 1)
    return J.T @ J / 6


def flat(v):
    return np.concatenate([x.ravel() for x in v.values()])


@pytest.mark.parametrize("masked", [False, True])
def test_curvature_from_records_is_the_dense_product(xp, rng, masked):
    records, v, w = batch(rng, masked), directions(rng), directions(rng)
    F = whole(records)
    want = np.array([[flat(p) @ F @ flat(q) for q in (v, w)] for p in (v, w)])
    moved = {
        n: kf.Record(xp.put(r.a), xp.put(r.g), 6.0, None if r.mask is None else xp.put(r.mask))
        for n, r in records.items()
    }
    got = curvature(moved, [{n: xp.put(x) for n, x in p.items()} for p in (v, w)])
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_a_layer_of_one_row_for_all_examples_is_a_block_of_its_own(rng):
    """Its row is added to no example's: joined, six examples would each have all of it."""
    records, v = batch(rng, False), directions(rng)
    records["c"] = kf.Record(rng.normal(size=(1, 3, 2)), rng.normal(size=(5, 1, 3, 2)), 6.0)
    v["c"] = rng.normal(size=(1, 2, 2))
    alone = v["c"].ravel() @ kf.dense(records["c"])[0] @ v["c"].ravel()
    two = {name: v[name] for name in ("a", "b")}
    want = flat(two) @ whole({name: records[name] for name in two}) @ flat(two) + alone
    assert curvature(records, [v])[0, 0] == pytest.approx(want, rel=1e-12)


def test_curvature_of_embeddings_and_images(rng):
    image, ids = kf.Patches(rng.normal(size=(6, 4, 4, 2)), kf.Window((2, 2)), bias=True), rng.integers(0, 7, (6, 3))
    for a, d_in, positions in ((image, 9, 9), (kf.Ids(ids, 7), 7, 3)):
        record, v = kf.Record(a, rng.normal(size=(2, 6, positions, 3)), 6.0), rng.normal(size=(1, 3, d_in))
        want = v.ravel() @ kf.dense(record)[0] @ v.ravel()
        assert curvature({"a": record}, [{"a": v}])[0, 0] == pytest.approx(want, rel=1e-12)


def test_slopes_of_factored_and_dense_gradients(rng):
    """Rows of the record itself, where its products are shared, and other rows."""
    a, g, v = rng.normal(size=(6, 4)), rng.normal(size=(6, 3)), {"a": rng.normal(size=(1, 3, 4))}
    record = {"a": kf.Record(a, rng.normal(size=(2, 6, 3)), 6.0)}
    want = np.sum(g.T @ a / 6 * v["a"][0])
    for grad in (g.T @ a / 6, kf.Factored(a, g, 6.0), kf.Factored(a[::-1], g[::-1], 6.0)):
        assert expansion(record, {"a": grad}, (v,)).down[0] == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(("batch", "raised"), [(8, 1.9), (200, 1.3)])
def test_a_model_flatter_than_its_running_mean_is_raised_to_it_or_by_three_errors(rng, batch, raised):
    told = iter((2.0, 1.0, 1.0))

    def model(records, grads, pair):
        return Expansion(np.diag([next(told), 1.0]), np.array([1.0, 0.0]))

    x, record = {"a": np.ones((1, 1, 1))}, {"a": kf.Record(np.ones((batch, 1)), np.ones((batch, 1)), batch)}
    rule = kf.SelfTuning(model=model, cap=10.0)
    motion, steps = dataclasses.replace(rule.init({"a": np.zeros((1, 1, 1))}), damping=1e-30), []
    for _ in range(2):
        _, motion, info = rule(motion, x, x, record)
        steps.append(info["alpha"])
    assert steps == pytest.approx([0.5, 1 / raised], rel=1e-12)
    assert motion.sharp == pytest.approx(1.9, rel=1e-12)
    assert motion.predicted == pytest.approx(-1 / raised + 0.5 / raised**2, rel=1e-12)
    off = kf.SelfTuning(model=model, cap=10.0, memory=0.0)
    assert off(motion, x, x, record)[2]["alpha"] == pytest.approx(1.0, rel=1e-12)


def test_alpha_and_mu_minimise_the_quadratic_model(rng):
    """TUNING-1: alpha and mu minimise -<V, s> + s^T (F + c I) s / 2 over s = alpha x + mu u: no perturbation is
    lower."""
    records, x, previous, grads = batch(rng), directions(rng), directions(rng), directions(rng)
    rule = kf.SelfTuning(cap=np.inf)
    motion = dataclasses.replace(rule.init(previous), damping=0.3)
    updates, after, told = rule(motion, x, grads, records)
    F = whole(records) + 0.3 * np.eye(34)

    def model(alpha, mu):
        u = alpha * flat(x) + mu * flat(previous)
        return -flat(grads) @ u + 0.5 * u @ F @ u

    best = model(told["alpha"], told["mu"])
    np.testing.assert_allclose(flat(updates), told["alpha"] * flat(x) + told["mu"] * flat(previous), rtol=1e-12)
    for size in (1e-3, 1e-1):
        for _ in range(1000):
            bump = 1 + size * rng.normal(size=2)
            assert best <= model(told["alpha"] * bump[0], told["mu"] * bump[1]) + 1e-6 * abs(best)
    u = flat(updates)
    assert after.predicted == pytest.approx(-flat(grads) @ u + 0.5 * u @ (F - 0.3 * np.eye(34)) @ u, rel=1e-10)


@pytest.mark.parametrize("seen", [1.0, 0.26, 0.1, 0.0])
def test_a_batch_that_is_blind_to_the_previous_update_does_not_repeat_it_for_ever(rng, seen):
    """The batch sees a share of the curvature that the one before saw along u; less than a quarter of it
    counts as a quarter: (alpha, mu) solve the system with max(F_11, bent / 4)."""
    x, previous, grads = directions(rng), directions(rng), directions(rng)
    F = np.asarray([[3.0, 0.2 * seen**0.5], [0.2 * seen**0.5, 2.0 * seen]])
    rule = kf.SelfTuning(cap=np.inf, memory=0.0, model=lambda *_: Expansion(F, np.asarray([1.0, 0.5])))
    motion = dataclasses.replace(rule.init(previous), previous=previous, damping=1e-3, bent=2.0)
    _, after, told = rule(motion, x, grads, batch(rng))
    raised = np.asarray([[F[0, 0], F[0, 1]], [F[1, 0], max(F[1, 1], 0.5)]])
    norms = np.asarray([[flat(v) @ flat(w) for w in (x, previous)] for v in (x, previous)])
    step = np.linalg.solve(raised + 1e-3 * norms, [1.0, 0.5])
    np.testing.assert_allclose([told["alpha"], told["mu"]], step, rtol=1e-12)
    assert after.bent == pytest.approx(step @ raised @ step, rel=1e-12)
    assert after.predicted == pytest.approx(-step @ [1.0, 0.5] + 0.5 * step @ raised @ step, rel=1e-12)


def test_what_was_seen_of_an_update_goes_with_it(rng):
    """Taken back: nothing is remembered. A batch that is not finite: the update and what was seen of it stay."""
    rule = kf.SelfTuning()
    motion = dataclasses.replace(rule.init(directions(rng)), damping=0.3)
    x = directions(rng)
    _, first, _ = rule(motion, x, directions(rng), batch(rng))
    assert first.bent > 0
    assert rule.judge(first, 1.0, 1.0, 0.9)[1].bent == first.bent
    assert rule.judge(first, 1.0, 1.0, 2.0)[1].bent == 0
    _, bad, told = rule(first, {n: v * np.nan for n, v in x.items()}, directions(rng), batch(rng))
    assert told["code"] == Code.NONFINITE
    assert rule.judge(bad, 1.0, np.nan, np.nan)[1].bent == first.bent


def test_on_a_quadratic_the_ratio_is_one_and_damping_never_grows(rng):
    """TUNING-2: on a quadratic the change predicted without damping is the change, ratio 1, so damping never grows.

    Linear regression with type-2 draws: the model is the loss."""
    net, x, y = kn.Sequential((5,), (kn.Dense(3),)), rng.normal(size=(40, 5)), rng.normal(size=(40, 3))
    params, loss = net.init(rng, np.asarray), kf.Gaussian()
    pre = kf.Preconditioner(kf.KFAC(), step=kf.SelfTuning())
    state, dampings = pre.init(net.blocks(), params["dense0"]), []
    for _ in range(12):
        f, tape = net.forward(params, x)
        before = float(loss.value(f, y)) / 40
        records = net.records(tape, net.backward(params, tape, kf.type2(loss, f)), 40.0)
        grads = net.gradients(tape, net.backward(params, tape, loss.gradient(f, y)), 40.0)
        updates, state, _ = pre.step(state, records, grads)
        params["dense0"] -= updates["dense0"]
        after = float(loss.value(net.forward(params, x)[0], y)) / 40
        if abs(state.motion.predicted) > 1e-9:
            assert (after - before) / state.motion.predicted == pytest.approx(1.0, rel=1e-5)
        share, state = pre.judge(state, before, lambda share: None, lambda: after)  # noqa: B023
        assert share == 1
        dampings.append(state.motion.damping)
    assert all(later <= earlier for earlier, later in pairwise(dampings))
    assert dampings[-1] < dampings[0]


@pytest.mark.parametrize("after", [float("nan"), float("inf"), 1.4])
def test_a_bad_step_is_taken_back(rng, after):
    rule = kf.SelfTuning()
    motion = dataclasses.replace(rule.init(directions(rng)), damping=0.01, predicted=-0.1, steps=9, restart=False)
    share, now = rule.judge(motion, 1.0, 1.0, after)
    assert share == 0
    assert now.code == (kf.Code.OK if np.isfinite(after) else kf.Code.NONFINITE)
    assert (now.damping, now.rejected, now.restart) == (0.04, 1, True)
    assert not any(x.any() for x in now.previous.values())
    share, now = rule.judge(motion, 1.0, 1.0, 1.2)
    assert share == 1
    assert (now.damping, now.rejected, now.restart) == (0.01, 0, False)


@pytest.mark.parametrize(("after", "factor"), [(0.92, 0.95**5), (0.95, 1.0), (0.99, 0.95**-5)])
def test_damping_follows_the_reduction_ratio(rng, after, factor):
    rule = kf.SelfTuning()
    motion = dataclasses.replace(rule.init(directions(rng)), damping=0.01, predicted=-0.1, steps=10)
    assert rule.judge(motion, 1.0, 1.0, after)[1].damping == pytest.approx(0.01 * factor)


def test_first_step_zero_gradient_and_cap(rng):
    records, x, grads = batch(rng), directions(rng), directions(rng)
    zeros = tree.map(np.zeros_like, x)
    rule = kf.SelfTuning(cap=np.inf)
    motion = dataclasses.replace(rule.init(zeros), damping=0.3)
    _, _, told = rule(motion, x, grads, records)
    want = flat(grads) @ flat(x) / (flat(x) @ (whole(records) + 0.3 * np.eye(34)) @ flat(x))
    assert told["mu"] == 0.0
    assert told["alpha"] == pytest.approx(want, rel=1e-6)
    updates, _, told = rule(motion, zeros, zeros, records)
    assert (told["alpha"], told["mu"]) == (0.0, 0.0)
    assert not flat(updates).any()
    tiny = {n: 1e-3 * v for n, v in x.items()}
    _, _, told = kf.SelfTuning()(motion, tiny, {n: 1e3 * np.sign(v) for n, v in x.items()}, records)
    assert abs(told["alpha"]) == pytest.approx(1.0)


def test_first_damping_is_a_share_of_the_mean_eigenvalue(rng):
    record = kf.Record(rng.normal(size=(9, 4)), rng.normal(size=(9, 3)), 9.0)
    state = kf.settle(kf.KFAC(), record)
    mean = np.trace(state.A[0]) * np.trace(state.G[0]) / 12
    rule = kf.SelfTuning()
    assert rule.begin(rule.init({}), {"a": record}).damping == pytest.approx(0.1 * mean, rel=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["ids", "patches"])
def test_the_first_damping_never_asks_for_rows(rng, monkeypatch, kind, masked):
    """An embedding of any vocabulary, a convolution of any image: the same damping as of their rows."""
    mask = np.array([[True, False, True, True]] * 6) if masked else None
    a = kf.Ids(rng.integers(0, 7, (6, 4)), 7)
    if kind == "patches":
        a = kf.Patches(rng.normal(size=(6, 3, 3, 2)), kf.Window((2, 2)), bias=True)
    record = kf.Record(a, rng.normal(size=(2, 6, 4, 3)), 6.0, mask)
    rule = kf.SelfTuning()
    want = rule.begin(rule.init({}), {"a": dataclasses.replace(record, a=record.rows())}).damping
    monkeypatch.setattr(kf.Record, "rows", None)
    assert rule.begin(rule.init({}), {"a": record}).damping == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("damping", [1e-6, 1e-4, 1e-2, 1.0, 1e2])
@pytest.mark.parametrize("name", ["digits-autoencoder", "digits-classifier", "digits-cnn", "curves-autoencoder"])
def test_never_non_finite_from_any_first_damping(name, damping):
    pytest.importorskip("sklearn")
    task, steps = kn.TASKS[name], 3 if name == "curves-autoencoder" else 20
    data, _ = task.load()
    params = task.network.init(np.random.default_rng(0))
    pre = kf.Preconditioner(kf.KFAC(), step=kf.SelfTuning())
    state = kn.initial_state(task.network, params, pre)
    state = dataclasses.replace(state, motion=dataclasses.replace(state.motion, damping=damping))
    for p in kn.fit(task.network, params, data, task.loss, pre, batch=64, steps=steps, state=state):
        assert np.isfinite(p.loss)
    assert all(np.isfinite(w).all() for w in params.values())


def test_parallel_directions_and_non_finite_curvature_have_codes(rng):
    records, x, grads, rule = batch(rng), directions(rng), directions(rng), kf.SelfTuning(cap=np.inf)
    motion = dataclasses.replace(rule.init({n: -2 * v for n, v in x.items()}), damping=0.3)
    _, _, told = rule(motion, x, grads, records)
    want = flat(grads) @ flat(x) / (flat(x) @ (whole(records) + 0.3 * np.eye(34)) @ flat(x))
    assert (told["code"], told["mu"]) == (kf.Code.JITTERED, 0.0)
    assert told["alpha"] == pytest.approx(want, rel=1e-9)
    grads["a"][0, 0, 0] = np.nan
    updates, motion, told = rule(motion, x, grads, records)
    assert (told["code"], told["alpha"], motion.code) == (kf.Code.NONFINITE, 0.0, kf.Code.NONFINITE)
    assert not flat(updates).any()


def test_true_labels_are_refused_and_the_state_stays_usable(rng):
    a, g, h = rng.normal(size=(6, 4)), rng.normal(size=(6, 3)), rng.normal(size=(6, 3))
    pre = kf.Preconditioner(kf.KFAC(), step=kf.SelfTuning())
    state = pre.init({"a": kf.Block(3, 4)}, a)
    for grad in (kf.Factored(a, g, 6.0), g.T @ a / 6):
        with pytest.raises(ValueError, match=r"empirical.*monte_carlo or type2, or use LineSearch"):
            pre.step(state, {"a": kf.Record(a, g, 6.0)}, {"a": grad}, fisher=kf.empirical)
    for sampled in (h, g):  # labels drawn from a fitted model may all be the true ones
        _, _, info = pre.step(state, {"a": kf.Record(a, sampled, 6.0)}, {"a": grad}, fisher=kf.monte_carlo)
        assert info.step["code"] == kf.Code.OK


def test_floor_raises_damping_that_makes_the_direction_noise(rng):
    records, x, grads = batch(rng), directions(rng), directions(rng)
    for floor, factor in ((0.0, 1.0), (1e9, 1 / 0.8)):
        rule = kf.SelfTuning(floor=floor)
        motion = dataclasses.replace(rule.init(tree.map(np.zeros_like, x)), damping=0.3)
        assert rule(motion, x, grads, records)[1].damping == pytest.approx(0.3 * factor)


def test_penalty_enters_curvature_and_prediction(rng):
    """l2 joins the damping of every block, and the model: on a quadratic the ratio stays 1."""
    net, x, y = kn.Sequential((5,), (kn.Dense(3),)), rng.normal(size=(40, 5)), rng.normal(size=(40, 3))
    params, loss, l2 = net.init(rng, np.asarray), kf.Gaussian(), 0.7
    pre = kf.Preconditioner(kf.KFAC(), schedules=kf.Schedules(l2=l2), step=kf.SelfTuning(noise=Noise(own=False)))
    state, W = kn.initial_state(net, params, pre), params["dense0"]

    def value():
        return float(loss.value(net.forward(params, x)[0], y)) / 40 + 0.5 * l2 * np.sum(params["dense0"] ** 2)

    def type2(network, params, tape, batch, g, rng):
        return network.backward(params, tape, kf.type2(batch.loss, batch.f))

    before = value()
    got, state, info = kn.step(net, params, (x, y), loss, pre, state, 0, rng, type2)
    assert got == pytest.approx(before, rel=1e-12)
    assert (value() - before) / state.motion.predicted == pytest.approx(1.0, rel=1e-9)
    f, tape = net.forward({"dense0": W}, x)
    records = net.records(tape, net.backward({"dense0": W}, tape, kf.type2(loss, f)), 40.0)
    method = kf.KFAC()
    fitted = kf.settle(method, records["dense0"], damping=info.step["damping"] + l2)
    grad = (f - y).T @ tape.saved["dense0"] / 40 + l2 * W
    want = W - info.step["alpha"] * method.solve(fitted, grad, kf.Hyper(0, 0.0, 0.0)).direction
    np.testing.assert_allclose(params["dense0"], want, rtol=1e-9)


def test_weight_decay_is_decoupled(rng):
    net, x, y = kn.Sequential((5,), (kn.Dense(3),)), rng.normal(size=(40, 5)), rng.normal(size=(40, 3))
    start, found = net.init(rng, np.asarray), {}
    for decay in (0.0, 0.3):
        params = dict(start)
        pre = kf.Preconditioner(kf.KFAC(), schedules=kf.Schedules(weight_decay=decay), step=kf.Fixed(0.5))
        state = kn.initial_state(net, params, pre)
        kn.step(net, params, (x, y), kf.Gaussian(), pre, state, 0, np.random.default_rng(0))
        found[decay] = params["dense0"]
    np.testing.assert_allclose(found[0.3], found[0.0] - 0.5 * 0.3 * start["dense0"], rtol=1e-12)
    for optimiser in (kn.SGD(0.1, 0.0, weight_decay=0.3), kn.Adam(0.1, weight_decay=0.3)):
        params, zero = {"w": np.ones((2, 2))}, {"w": np.zeros((2, 2))}
        optimiser.step(params, zero, optimiser.init(params), 0)
        np.testing.assert_allclose(params["w"], 1 - 0.1 * 0.3)


@pytest.mark.parametrize("wrong", [{"l2": -1.0}, {"weight_decay": float("nan")}])
def test_penalties_must_be_finite_and_positive(wrong):
    with pytest.raises(ValueError, match=r"need a finite number >= 0"):
        kf.Schedules(**wrong)


def test_line_search_halves_until_the_loss_falls(rng):
    """f(w) = w^2 / 2 from 1 with a direction 10 times too long: 1/8 of it is the first that does not raise f."""
    a, pre = np.ones((1, 1)), kf.Preconditioner(kf.Identity(), step=kf.LineSearch())
    state = pre.init({"a": kf.Block(1, 1)}, a)
    updates, state, info = pre.step(state, {"a": kf.Record(a, a, 1.0)}, {"a": 10 * a})
    w, tried = {"share": 1.0}, []

    def loss():
        tried.append(w["share"])
        return float("nan") if w["share"] == 0.5 else 0.5 * (1 - w["share"] * updates["a"].item()) ** 2

    share, state = pre.judge(state, 0.5, lambda share: w.update(share=share), loss)
    assert (share, w["share"], tried) == (0.125, 0.125, [1.0, 0.5, 0.25, 0.125])
    assert (info.step["alpha"], state.motion.rate) == (1.0, 0.25)
    share, given_up = pre.judge(state, 0.5, lambda share: w.update(share=share), lambda: float("nan"))
    assert (share, w["share"], given_up.motion.rejected) == (0.0, 0.0, 1)
    assert given_up.motion.code == kf.Code.UNCONVERGED
    assert pre.judge(state, float("nan"), lambda share: None, lambda: float("nan"))[1].motion.code == kf.Code.NONFINITE


def test_a_step_taken_back_leaves_the_old_bits(rng):
    net, x, y = kn.Sequential((5,), (kn.Dense(3),)), rng.normal(size=(40, 5)), rng.normal(size=(40, 3))
    params = net.init(rng)
    before = params["dense0"].copy()
    pre = kf.Preconditioner(kf.KFAC(), step=kf.SelfTuning(tolerance=-1.0))
    state = kn.initial_state(net, params, pre)
    _, state, _ = kn.step(net, params, (x, y), kf.Gaussian(), pre, state, 0, rng)
    assert state.motion.rejected == 1
    assert (params["dense0"] == before).all()


def test_iterate_average_is_a_plain_mean_until_its_window_is_full():
    average, mean = kf.IterateAverage(decay=0.5), {}
    for k, (value, want) in enumerate([(1.0, 1.0), (3.0, 2.0), (6.0, 4.0), (0.0, 2.0)], start=1):
        mean = average(mean, {"w": np.array(value)}, k)
        assert mean["w"] == want


def test_micro_batches_records_missing_and_frozen_layers(rng):
    a, g = rng.normal(size=(6, 4)), rng.normal(size=(6, 3))
    pre = kf.Preconditioner(kf.KFAC(), step=kf.SelfTuning())
    state, grad = pre.init({"a": kf.Block(3, 4), "b": kf.Block(3, 4)}, a), rng.normal(size=(3, 4))
    whole = pre.step(state, {"a": kf.Record(a, g, 6.0)}, {"a": grad})
    parts = [kf.Record(a[:2], g[:2], 2.0), kf.Record(a[2:], g[2:], 4.0)]
    split = pre.step(state, {"a": parts}, {"a": grad})
    np.testing.assert_allclose(split[0]["a"], whole[0]["a"], rtol=1e-10)
    assert set(whole[0]) == {"a"}
    assert pre.step(state, {"a": parts}, {})[0] == {}
    with pytest.raises(ValueError, match=r"layers \['b'\] have gradients but no records"):
        pre.step(state, {"a": parts}, {"a": grad, "b": grad})
