"""A step that knows the noise of its batch: what is left out of its model, how far it goes, and what it keeps."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

import kfaccore as kf
import kfaccore_numpy as kn
from kfaccore import tree
from kfaccore.linalg.shares import Inverted, shares
from kfaccore.step.known import Known
from kfaccore.step.leaving import leaving
from kfaccore.step.model import expansion
from kfaccore.step.motion import Average
from kfaccore.step.noise import Noise, Seen, promised
from kfaccore.step.own import Left, Own
from kfaccore.step.self_tuning import SelfTuning
from kfaccore.xp import chunks

B, N = 6, 9.0
LOSS = kf.SoftmaxCrossEntropy()
NET = kn.Sequential((5,), (kn.Dense(8), kn.Tanh(), kn.Dense(3)))


class Batch:
    """Two layers of one batch, their draws and the loss's own gradients."""

    def __init__(self, rng, draws=2):
        shapes = {"a": (1, 4, 3), "b": (3, 5, 2)}  # positions, d_in, d_out
        rows = {name: rng.normal(size=(B, s, i)) for name, (s, i, _) in shapes.items()}

        def make(v):
            return {n: kf.Record(rows[n], rng.normal(size=(v, 1, B, s, o)), N) for n, (s, _, o) in shapes.items()}

        self.drawn = make(draws)
        self.own = make(1)
        self.solves = {n: Inverted(spd(rng, i), spd(rng, o)) for n, (_, i, o) in shapes.items()}
        self.h = {n: r.examples()[0, 0] for n, r in self.own.items()}  # (B, o, i)
        self.grads = {n: h.sum(0)[None] / N for n, h in self.h.items()}

    def P(self, name, v):
        return self.solves[name].G[0] @ v @ self.solves[name].A[0]

    def J(self, name, v):
        """J of every draw and example times v (o, i)."""
        return np.sum(self.drawn[name].examples()[:, 0] * v, axis=(2, 3))

    def left(self, weights, factor):
        found = {n: shares(self.drawn[n], self.own[n], self.solves[n]) for n in self.drawn}
        return Left(
            sum(w * found[n][0] for n, w in weights.items()), sum(w * found[n][1] for n, w in weights.items()), factor
        )


def spd(rng, d):
    x = rng.normal(size=(d, d))
    return (x @ x.T / d + np.eye(d))[None]


@pytest.mark.parametrize(("weight", "factor"), [(1.0, B / (B - 1)), (0.3, 1.0)])
def test_the_model_is_that_of_directions_without_each_example(rng, weight, factor):
    """Against a direction made anew for every example that it is judged on: x = past + weight P grad, past without it.

    With the whole weight it is exactly the direction of the other examples' mean."""
    batch = Batch(rng)
    past = {n: rng.normal(size=g.shape) for n, g in batch.grads.items()}
    scale = 1 - weight
    x = {n: scale * past[n] + weight * batch.P(n, g[0])[None] for n, g in batch.grads.items()}
    v = {n: rng.normal(size=g.shape) for n, g in batch.grads.items()}
    found = expansion(batch.drawn, batch.grads, (x, v), left=batch.left(dict.fromkeys("ab", weight), factor))
    u = np.zeros((2, 2, B))
    slope = 0.0
    for b in range(B):
        for n in "ab":
            mean = (batch.grads[n][0] - batch.h[n][b] / N) * factor
            without = factor * scale * past[n][0] + weight * batch.P(n, mean)
            u[0, :, b] += batch.J(n, without)[:, b]
            u[1, :, b] += batch.J(n, v[n][0])[:, b]
            slope += np.sum(batch.h[n][b] * without) / N
    u = u.reshape(2, -1)
    np.testing.assert_allclose(found.F, u @ u.T / N, rtol=1e-12)
    assert found.down[0] == pytest.approx(max(slope, 0.0), rel=1e-12)
    assert found.down[1] == pytest.approx(sum(np.sum(batch.grads[n] * v[n]) for n in "ab"), rel=1e-12)
    plain = expansion(batch.drawn, batch.grads, (x, v))
    np.testing.assert_allclose(found.batch, plain.F, rtol=1e-12)
    assert found.slope == pytest.approx(plain.down[0], rel=1e-12)


def settled(rng, method=None):
    """(batch, known, motion with that gradient averaged once)."""
    batch = Batch(rng)
    method = method or kf.KFAC()
    solving = {n: (method, kf.settle(method, r), kf.Hyper(0, 0.9, 0.1)) for n, r in batch.drawn.items()}
    rule = SelfTuning()
    zeros = {n: np.zeros_like(g) for n, g in batch.grads.items()}
    _, motion = rule.gradients(rule.init(zeros), batch.grads)
    return batch, Known(2.0, Own(batch.own, solving)), replace(motion, damping=0.1)


def test_the_newest_gradient_has_its_weight_in_the_mean(rng):
    """All of it at first, with B / (B - 1) on what remains; then .2 / (1 - .8^k)."""
    batch, known, motion = settled(rng)
    first = leaving(Noise(), motion, batch.drawn, known, B)
    assert first.weight == pytest.approx(1.0)
    assert first.left.factor == pytest.approx(B / (B - 1))
    s = sum(
        shares(batch.drawn[n], batch.own[n], Inverted(*solving[0].inverses(solving[1], solving[2])))[0]
        for n, solving in known.own.solving.items()
    )
    np.testing.assert_allclose(first.left.s, s, rtol=1e-12)
    means, later = SelfTuning().gradients(motion, batch.grads)
    then = leaving(Noise(), later, batch.drawn, known, B)
    assert then.weight == pytest.approx(0.2 / 0.36)
    assert then.left.factor == 1.0
    np.testing.assert_allclose(then.left.s, s * 0.2 / 0.36, rtol=1e-12)
    np.testing.assert_allclose(means["a"], batch.grads["a"], rtol=1e-12)


def test_the_batch_of_the_step_before_holds_no_noise(rng):
    batch, known, motion = settled(rng)
    assert leaving(Noise(), replace(motion, last=2.0 * (1 + 9e-6)), batch.drawn, known, B).left is None
    assert leaving(Noise(), replace(motion, last=2.0 * (1 + 2e-5)), batch.drawn, known, B).left is not None
    assert leaving(Noise(own=False), motion, batch.drawn, known, B).whole == 2


def test_where_noise_is_next_to_nothing_it_is_measured_at_every_tenth_step(rng):
    batch, known, motion = settled(rng)
    clear = replace(motion, seen=Seen(1.0, 1.0 / B + 0.05 / B))
    assert clear.seen.rho(B) > 0.9
    asked = [k for k in range(1, 31) if leaving(Noise(), replace(clear, steps=k), batch.drawn, known, B).left]
    assert asked == [10, 20, 30]
    dim = replace(motion, seen=Seen(1.0, 2.0))
    assert dim.seen.rho(B) < 0.9
    assert all(leaving(Noise(), replace(dim, steps=k), batch.drawn, known, B).left for k in range(1, 9))


def test_rho_and_the_critical_batch_are_those_of_the_gradients(rng):
    """tr(P Sigma) / (G . P G), both unbiased: for a batch of n = B examples, from their gradients one by one."""
    h = rng.normal(size=(40, 7)) + 0.5
    P = spd(rng, 7)[0]
    mean = h.mean(0)
    slope = mean @ P @ mean
    own = sum(x @ P @ x for x in h) / 40**2
    sigma = np.trace(P @ np.cov(h.T))
    true = slope - sigma / 40
    assert kf.critical_batch(slope, own, 40) == pytest.approx(sigma / true, rel=1e-10)
    seen = Seen().moved(0.8, true, own)
    assert seen.critical(40) == pytest.approx(sigma / true, rel=1e-10)
    assert seen.rho(40) == pytest.approx(true / (true + sigma / 40), rel=1e-10)
    assert kf.critical_batch(1.0, 1.0, 40) == math.inf
    assert Seen(-1.0, 1.0).rho(40) == 0.0
    assert Seen().rho(40) == 1.0
    assert (Seen(-1.0, 1.0).repeats(40), Seen().repeats(40), Seen(1.0, 1.0).repeats(1)) == (1.0, math.inf, math.inf)


@pytest.mark.parametrize(("rho", "same", "most"), [(0.2, False, 1.25), (0.0, False, 1.0), (0.2, True, math.inf)])
def test_the_previous_update_is_repeated_as_often_as_is_no_noise(rng, rho, same, most):
    """|mu| <= 1 / (1 - rho), with the best alpha there; the batch that made the update may ask for all of it."""
    batch, known, motion = settled(rng)
    seen = Seen(1.0, 1 / B + 1 / rho - 1) if rho else Seen(-1.0, 1.0)
    assert seen.rho(B) == pytest.approx(rho)
    tiny = {n: 1e-3 * rng.normal(size=x.shape) for n, x in motion.previous.items()}
    motion = replace(motion, previous=tiny, seen=seen, steps=1, last=2.0 if same else 0.0)
    rule = SelfTuning(memory=0.0, noise=Noise(reach=math.inf), cap=math.inf)
    found = []

    def model(*given, **left):
        found.append(expansion(*given, **left))
        return found[0]

    x = {n: batch.P(n, g[0])[None] for n, g in batch.grads.items()}
    _, after, _ = replace(rule, model=model)(motion, x, batch.grads, batch.drawn, 0.0, known)
    norms = np.array([[sum(np.sum(a[n] * b[n]) for n in x) for b in (x, tiny)] for a in (x, tiny)])
    Q = found[0].F + 0.1 * norms
    down = found[0].down
    free = np.linalg.solve(Q, down)
    assert abs(free[1]) > 2
    mu = np.clip(free[1], -most, most)
    alpha = (down[0] - mu * Q[0, 1]) / Q[0, 0]
    assert after.mu / after.alpha == pytest.approx(mu / alpha, rel=1e-9)


def test_noise_is_that_of_the_layers_whose_own_shares_are_known(rng):
    """Where other layers have none, as before a BatchNorm that trains: rho is of the slope of the same layers."""
    batch, known, motion = settled(rng)
    some = replace(known, own=replace(known.own, records={"a": batch.own["a"]}))
    left = leaving(Noise(), motion, batch.drawn, some, B).left
    x = {n: batch.P(n, g[0])[None] for n, g in batch.grads.items()}
    found = expansion(batch.drawn, batch.grads, (x, x), left=left)
    assert left.layers == {"a"}
    assert found.slope == pytest.approx(np.sum(x["a"] * batch.grads["a"]), rel=1e-12)
    method, state, hyper = known.own.solving["a"]
    Ai, Gi = method.inverses(state, hyper)
    own = sum(np.sum(h * (Gi[0] @ h @ Ai[0])) for h in batch.h["a"]) / N**2
    assert found.own == pytest.approx(own, rel=1e-12)
    every = sum(np.sum(x[n] * batch.grads[n]) for n in "ab")
    assert found.down[0] == pytest.approx(max((every - own) * B / (B - 1), 0.02 * every), rel=1e-12)


def test_reach_bounds_alpha_and_mu_together(rng):
    F = np.array([[4.0, 1.0], [1.0, 9.0]])
    step = np.array([0.5, -3.0])
    short = Noise(reach=0.02).shortened(step, F, 5.0)
    assert short @ F @ short == pytest.approx(0.1, rel=1e-12)
    np.testing.assert_allclose(short / step, short[0] / step[0], rtol=1e-12)
    np.testing.assert_array_equal(Noise(reach=1e3).shortened(step, F, 5.0), step)
    np.testing.assert_array_equal(Noise().shortened(step, F, 0.0), step)


@pytest.mark.parametrize("c", [0.0, 3.0, 7.9])
def test_no_step_promises_more_than_the_loss(c):
    """Of p t - c t^2 / 2 up to t = 1 the part that takes the whole loss off, and no more."""
    down, F = np.array([4.0, 0.0]), np.diag([c, 1.0])
    step = promised(np.array([1.0, 0.0]), F, down, 0.01)
    assert step @ down - 0.5 * step @ F @ step == pytest.approx(0.01, rel=1e-5)
    assert step @ down - 0.5 * step @ F @ step < 0.01
    assert promised(np.array([1.0, 0.0]), F, down, 4.1)[0] == 1.0
    assert promised(np.array([1.0, 0.0]), F, down, -1.0)[0] == 1.0
    assert promised(np.array([1.0, 0.0]), F, down, None)[0] == 1.0


def test_of_the_loss_as_much_is_believed_as_is_real_but_a_quarter(rng):
    noise = Noise()
    assert [noise.believed(2.0, rho) for rho in (0.0, 0.25, 0.5, 1.0)] == [0.5, 0.5, 1.0, 2.0]
    assert noise.believed(None, 0.5) is None
    batch, known, motion = settled(rng)
    x = {
        n: method.solve(state, batch.grads[n], hyper).direction
        for n, (method, state, hyper) in known.own.solving.items()
    }
    rule = SelfTuning(memory=0.0, noise=Noise(reach=math.inf))
    for own, real in ((20.0, False), (0.2, True)):
        before = replace(motion, seen=Seen(1.0, own), steps=3, damping=1e-9)
        _, _, found = rule(before, x, batch.grads, batch.drawn, 0.0, replace(known, loss=1e-6, nonnegative=True))
        assert (found["rho"] > 0.25) == real
        assert found["predicted"] == pytest.approx(-max(0.25, found["rho"]) * 1e-6, rel=1e-5)


def trained(pre, steps, batch, bad=lambda k: False, seed=0):
    """(losses, state, infos) of the small network on one linear task."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(200, 5))
    y = (x[:, :3] + 0.5 * rng.normal(size=(200, 3))).argmax(1)
    params = NET.init(rng, np.asarray)
    state, losses, infos = kn.initial_state(NET, params, pre), [], []
    for k in range(steps):
        rows = np.random.default_rng([seed, k]).integers(0, 200, batch)
        given = x[rows] * (np.nan if bad(k) else 1.0)
        loss, state, info = kn.step(NET, params, (given, y[rows]), LOSS, pre, state, k, np.random.default_rng([k, 1]))
        losses.append(loss)
        infos.append(info.step)
    f, _ = NET.forward(params, x)
    return float(LOSS.value(f, y)) / 200, losses, state, infos


def test_every_second_batch_may_be_bad():
    """Damping, averages and the last update are those of the good ones, and training goes on."""
    pre = kf.Preconditioner(kf.KFAC(), step=kf.SelfTuning())
    with np.errstate(all="ignore"):
        loss, losses, state, infos = trained(pre, 40, 32, bad=lambda k: k % 2 == 0)
    assert np.isnan(losses[::2]).all()
    assert loss < 0.6 * losses[1]
    assert all(np.isfinite(x).all() for x in tree.leaves(state))
    dampings = [info["damping"] for info in infos]
    assert dampings[2::2] == dampings[3::2]  # what a bad batch leaves is what it found
    assert {info["code"] for info in infos[1::2]} == {kf.Code.OK}


def test_a_change_below_the_rounding_of_the_loss_is_no_information():
    rule = kf.SelfTuning()
    motion = replace(rule.init({"a": np.zeros((1, 1, 1), np.float32)}), damping=0.01, predicted=-1e-8, steps=10)
    assert rule.judge(motion, 1.0, 1.0, 1.0)[1].damping == 0.01
    assert rule.judge(replace(motion, predicted=-1e-5), 1.0, 1.0, 1.0)[1].damping > 0.01


def test_small_batches_tell_their_noise_and_promise_no_more_than_there_is():
    pre = kf.Preconditioner(kf.KFAC(), step=kf.SelfTuning())
    loss, losses, state, infos = trained(pre, 30, 8)
    assert loss < 0.7 * losses[0]
    assert all(-info["predicted"] <= value for info, value in zip(infos, losses, strict=True))
    assert all(0 <= info["rho"] < 0.9 for info in infos[5:])
    told = next(info for info in infos if info["rho"] > 0)
    assert told["critical_batch"] == pytest.approx(8 * (1 / told["rho"] - 1), rel=1e-9)
    assert {info["with_own"] for info in infos} == {0}
    assert state.motion.first == losses[0]


@pytest.mark.parametrize("method", [kf.KPSVD(), kf.CGFAC(), kf.SKFAC()], ids=["kpsvd", "cgfac", "skfac"])
def test_methods_that_do_not_say_how_they_solve_keep_their_own_shares(method):
    """The fall-back: judged with them, as without any being given, and counted."""
    pre = kf.Preconditioner(method, step=kf.SelfTuning())
    off = kf.Preconditioner(method, step=kf.SelfTuning(noise=Noise(own=False)))
    found, want = trained(pre, 4, 16), trained(off, 4, 16)
    assert found[1] == want[1]
    assert {info["with_own"] for info in found[3]} == {2}
    assert all(math.isfinite(loss) for loss in found[1])


def test_micro_batches_and_frozen_layers(rng):
    a, g, h = rng.normal(size=(6, 4)), rng.normal(size=(6, 3)), rng.normal(size=(6, 3))
    pre = kf.Preconditioner(kf.KFAC(), step=kf.SelfTuning())
    state = pre.init({"a": kf.Block(3, 4), "b": kf.Block(3, 4)}, a)
    grads = {"a": h.T @ a / 6, "b": h.T @ a / 6}
    both = {"a": kf.Record(a, g, 6.0), "b": kf.Record(a, g, 6.0)}
    own = {"a": kf.Record(a, h, 6.0), "b": kf.Record(a, h, 6.0)}
    whole = pre.step(state, both, grads, loss=3.0, own=own)

    def cut(rows):
        return [kf.Record(a[:2], rows[:2], 2.0), kf.Record(a[2:], rows[2:], 4.0)]

    split = pre.step(state, dict.fromkeys("ab", cut(g)), grads, loss=3.0, own=dict.fromkeys("ab", cut(h)))
    np.testing.assert_allclose(split[0]["a"], whole[0]["a"], rtol=1e-10)
    _, frozen, info = pre.step(whole[1], {"a": both["a"]}, {"a": grads["a"]}, loss=3.0, own={"a": own["a"]})
    assert frozen.motion.average.weight == {"a": pytest.approx(0.36), "b": pytest.approx(0.2)}
    np.testing.assert_array_equal(frozen.motion.average.sums["b"], whole[1].motion.average.sums["b"])
    _, _, info = pre.step(frozen, both, grads, loss=3.0, own={"a": own["a"]})
    assert info.step["with_own"] == 1
    with pytest.raises(ValueError, match=r"own of layer 'a' has g of shape \(1, 1, 5, 1, 3\); need \(1, 1, 6, 1, 3\)"):
        pre.step(state, both, grads, own={"a": kf.Record(a[:5], h[:5], 6.0)})


def test_shares_in_chunks_are_shares_at_once(rng, monkeypatch):
    batch = Batch(rng)
    want = {n: shares(batch.drawn[n], batch.own[n], batch.solves[n]) for n in "ab"}
    monkeypatch.setattr(chunks, "HELD", 40)
    for n in "ab":
        s, q = shares(batch.drawn[n], batch.own[n], batch.solves[n])
        np.testing.assert_allclose(s, want[n][0], rtol=1e-13)
        assert q == pytest.approx(want[n][1], rel=1e-13)


def test_averages_leave_out_what_is_not_finite():
    average, means = Average.of({"a": np.zeros((1, 1, 2))}).moved({"a": np.array([[1.0, 2.0]])}, 0.8)
    np.testing.assert_allclose(means["a"], [[1.0, 2.0]], rtol=1e-12)
    after, means = average.moved({"a": np.array([[np.nan, 0.0]])}, 0.8)
    assert np.isnan(means["a"]).any()
    assert after.weight == average.weight
    np.testing.assert_array_equal(after.sums["a"], average.sums["a"])


ERAS = ("/average", "/first", "/last", "/seen"), ("/bent",), ("missed/",), ("motion/unit",), ("motion/heights",)


@pytest.mark.parametrize("eras", [ERAS[k:] for k in range(5)], ids=["first", "second", "third", "fourth", "fifth"])
def test_files_of_before_load(eras):
    """What they do not know starts at zero, whichever version wrote them. A file that has some of it and not the rest
    is damaged."""
    pre = kf.Preconditioner(kf.KFAC(), step=kf.SelfTuning())
    _, _, state, _ = trained(pre, 3, 16)
    leaves = kf.flatten(state)
    new = {name for name in leaves if any(part in name for era in eras for part in era)}
    found = kf.flatten(kf.io.unflatten({name: x for name, x in leaves.items() if name not in new}, state))
    for name, x in leaves.items():
        np.testing.assert_array_equal(found[name], np.zeros_like(x) if name in new else x)
    with pytest.raises(ValueError, match="missing"):
        kf.io.unflatten({name: x for name, x in leaves.items() if not name.endswith("first")}, state)


def test_grafting_has_the_lengths_it_is_told(rng):
    batch = Batch(rng)
    pre = kf.Preconditioner(kf.KFAC(), step=kf.Fixed(rescale=kf.Graft()))
    state = pre.init({"a": kf.Block(3, 4), "b": kf.Block(2, 5)}, batch.grads["a"])
    updates, _, _ = pre.step(state, batch.drawn, batch.grads, lengths={"a": 0.25, "b": 3.0})
    plain, _, _ = kf.Preconditioner(kf.KFAC()).step(
        kf.Preconditioner(kf.KFAC()).init({"a": kf.Block(3, 4), "b": kf.Block(2, 5)}, batch.grads["a"]),
        batch.drawn,
        batch.grads,
    )
    for name, size in (("a", 0.25), ("b", 3.0)):
        want = plain[name] * size / np.linalg.norm(plain[name])
        np.testing.assert_allclose(updates[name], want, rtol=1e-12)
    zeros = {n: np.zeros_like(g) for n, g in batch.grads.items()}
    updates, _, _ = pre.step(state, batch.drawn, zeros, lengths={"a": 0.25, "b": 3.0})
    assert not any(x.any() for x in updates.values())
    with pytest.raises(ValueError, match=r"Graft got no lengths for layers \['b'\]: pass pre.step"):
        pre.step(state, batch.drawn, batch.grads, lengths={"a": 1.0})
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"Graft got lengths \{'a': .*need norms, numbers of at least 0"):
            pre.step(state, batch.drawn, batch.grads, lengths={"a": wrong, "b": 1.0})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "Graft got no lengths for layers"),
        ({"lengths": {"a": 1.0, "b": 1.0, "c": 1.0}}, r"lengths has layers \['c'\] that init never saw"),
        ({"lengths": {"a": 1.0, "b": 1.0}, "own": {"d": None}}, r"own has layers \['d'\] that init never saw"),
    ],
    ids=["none", "unknown", "own"],
)
def test_a_step_that_is_refused_has_moved_nothing(rng, given, said):
    """With donate=True averages are moved where they lie: what is wrong is said before."""
    batch = Batch(rng)
    pre = kf.Preconditioner(kf.KFAC(), step=kf.Fixed(rescale=kf.Graft()), donate=True)
    state = pre.init({"a": kf.Block(3, 4), "b": kf.Block(2, 5)}, batch.grads["a"])
    _, state, _ = pre.step(state, batch.drawn, batch.grads, lengths={"a": 0.25, "b": 3.0})
    before = {name: x.copy() for name, x in kf.flatten(state).items()}
    with pytest.raises(ValueError, match=said):
        pre.step(state, batch.drawn, batch.grads, **given)
    for name, x in kf.flatten(state).items():
        np.testing.assert_array_equal(x, before[name])


def test_the_length_of_noise_is_the_minimum_of_the_model_without_own_shares(rng):
    batch = Batch(rng)
    pre = kf.Preconditioner(kf.KFAC(), schedules=kf.Schedules(damping=0.1), step=kf.Fixed(rescale=Noise(reach=1e9)))
    assert pre.rule.needs_records
    assert not kf.Fixed().needs_records
    state = pre.init({"a": kf.Block(3, 4), "b": kf.Block(2, 5)}, batch.grads["a"])
    updates, after, info = pre.step(state, batch.drawn, batch.grads, loss=50.0, own=batch.own)
    x = {n: kf.direction(batch.drawn[n], batch.grads[n], damping=0.1) for n in "ab"}
    method = kf.KFAC()
    solves = {
        n: Inverted(*method.inverses(kf.settle(method, r, damping=0.1), kf.Hyper(0, 0.9, 0.1)))
        for n, r in batch.drawn.items()
    }
    batch.solves = solves
    found = expansion(batch.drawn, batch.grads, (x, x), left=batch.left(dict.fromkeys("ab", 1.0), B / (B - 1)))
    want = found.down[0] / (found.F[0, 0] + 0.1 * sum(np.sum(v * v) for v in x.values()))
    assert info.step["scale"] == pytest.approx(min(want, 1.0), rel=1e-9)
    assert after.motion["first loss"] == 50.0
    for n in "ab":
        np.testing.assert_allclose(updates[n], info.step["scale"] * x[n], rtol=1e-9)
    assert {"rho", "critical_batch", "with_own"} <= info.step.keys()


@pytest.mark.parametrize(
    "wrong", [{"average": 1.0}, {"average": -0.1}, {"reach": 0.0}, {"every": 0}, {"promise": 0.0}, {"promise": 1.5}]
)
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"Noise.{next(iter(wrong))} is"):
        Noise(**wrong)
