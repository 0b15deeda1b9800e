"""The self-tuning step inside one jitted step: against the NumPy shell, with steps taken back, chained and donated."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest

import kfaccore as kf
import kfaccore_numpy as kn
from jax_models import FAST
from jax_needed import jax, jnp, kj, optax
from jax_twins import twin
from kfaccore import tree
from kfaccore.step.plane import minimum

NET = kn.Sequential((4,), (kn.Dense(6), kn.Tanh(), kn.Dense(3)))
LOSS, CLOCKS = kf.SoftmaxCrossEntropy(), kf.Clocks(2, 5)
START = NET.init(np.random.default_rng(2), np.asarray)
ROWS = {  # method, rule, damping to begin with (0: the rule's own), l2
    "penalised": (kf.KFAC(), kf.SelfTuning(), 0.0, 0.05),
    "damped badly": (kf.KFAC(), kf.SelfTuning(tolerance=0.0, cap=10.0, floor=0.05), 1e-7, 0.0),
    "cheap": (kf.Diagonal(), kf.SelfTuning(every=2), 1e-6, 0.0),
}


def batch(i):
    rng = np.random.default_rng([3, i])
    x = rng.normal(size=(16, 4))
    return x, np.abs(x[:, :3]).argmax(1)


def type2(network, params, tape, given, g, rng):
    return network.backward(params, tape, kf.type2(given.loss, given.f))


def core(name):
    method, rule, _, l2 = ROWS[name]
    return kf.Preconditioner(method, CLOCKS, kf.Schedules(decay=0.9, l2=l2), step=rule)


def begun(state, name):
    """The core's state with the row's damping in force."""
    motion, damping = state.motion, ROWS[name][2]
    damping = damping if isinstance(motion.damping, float) else jnp.asarray(damping, motion.damping.dtype)
    return replace(state, motion=replace(motion, damping=damping))


def fresh(name):
    """The NumPy shell's first state."""
    return begun(core(name).init(NET.blocks(), np.zeros(1)), name)


def numpy_steps(name, params, state, steps):
    """State of the NumPy shell after each of `steps`; params change in place."""
    pre = core(name)
    for i in steps:
        _, state, _ = kn.step(NET, params, batch(i), LOSS, pre, state, i, np.random.default_rng(0), type2)
        yield state


def stepping(tx, plan, traces):
    """A step through optax; `factor` on the loss before it makes the rule take it back."""
    apply = twin(NET)

    def loss(p, x, y):
        return LOSS.value(apply(p, x), y) / len(x)

    def step(params, state, x, y, factor=1.0, fresh=None, draws="type2"):
        traces.append(draws)
        captured = kj.capture(plan, params, x)
        f, n = captured.prediction, len(x)
        slope = LOSS.gradient(f, y) / n
        found = n * slope[None] if draws in ("true", "told") else kf.type2(LOSS, f)
        grads = captured.gradients(slope)
        extra = {"factored": captured.factored(slope)} if draws == "factored" else {}
        extra |= {"value": factor * loss(params, x, y), "value_fn": lambda p: loss(p, x, y)}
        fisher = {"told": kf.empirical, "true": None}.get(draws, kf.type2)
        records = captured.records(found, float(n), fisher=fisher, cotangent=slope)
        moves, state = tx.update(grads, state, params, records=records, fresh=fresh, **extra)
        return optax.apply_updates(params, moves), state

    return step


@cache
def compiled(name):
    """(transformation, its jitted step that donates, traces)."""
    method, rule, _, l2 = ROWS[name]
    plan = kj.plan(twin(NET), START, batch(0)[0])
    kfac = kj.kfac(plan, method, CLOCKS, kf.Schedules(decay=0.9, l2=l2), rule)
    tx, traces = optax.chain(kfac, optax.scale(-1.0)), []
    step = stepping(tx, plan, traces)
    static = {"static_argnames": ("fresh", "draws"), "donate_argnums": (0, 1)}
    return tx, jax.jit(step, compiler_options=FAST, **static), traces, step


def started(name):
    """(params, chain state) to be donated."""
    params = jax.tree.map(jnp.array, START)
    kfac, rest = compiled(name)[0].init(params)
    return params, (kfac._replace(core=begun(kfac.core, name)), rest)


def given(i):
    return tuple(map(jnp.asarray, batch(i)))


def same(got, want, rtol=1e-8, atol=1e-9):
    for (path, a), (_, b) in zip(tree.items(got), tree.items(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=path)


@pytest.mark.parametrize("name", ROWS)
def test_jit_equals_the_numpy_shell(name):
    """25 steps on moving batches, with those taken back; one trace for all."""
    _, step, traces, _ = compiled(name)
    pair, params, rejected = started(name), dict(START), 0
    traces.clear()
    for i, state in enumerate(numpy_steps(name, params, fresh(name), range(25))):
        pair = step(*pair, *given(i), 1.0)
        same(pair[0], params)
        same(pair[1][0].core.motion, state.motion, 1e-6)
        rejected = state.motion.rejected
    assert (rejected, len(traces)) == ({"penalised": 0, "damped badly": 6, "cheap": 0}[name], 1)


def test_one_file_for_numpy_and_jax(tmp_path):
    """8 steps in NumPy, 8 in JAX and 8 in NumPy are 24 in NumPy."""
    name, whole, params, path = "damped badly", dict(START), dict(START), tmp_path / "state"
    *_, want = numpy_steps(name, whole, fresh(name), range(24))
    *_, state = numpy_steps(name, params, fresh(name), range(8))
    kf.save(path, {"params": params, "state": state})
    params, (kfac, rest) = started(name)
    found = kf.load(path, like={"params": params, "state": kfac.core})
    pair = found["params"], (kfac._replace(core=found["state"]), rest)
    for i in range(8, 16):
        pair = compiled(name)[1](*pair, *given(i), 1.0)
    kf.save(path, {"params": pair[0], "state": pair[1][0].core})
    found = kf.load(path, like={"params": dict(START), "state": fresh(name)})
    *_, state = numpy_steps(name, found["params"], found["state"], range(16, 24))
    same(found["params"], whole)
    same(state.motion, want.motion, 1e-7)
    assert type(state.motion.restart) is bool
    assert type(state.motion.damping) is float


def test_eager_equals_jit():
    _, step, _, eager = compiled("cheap")
    pairs = [f(*started("cheap"), *given(0), 1.0) for f in (step, eager)]
    same(*pairs)
    assert pairs[1][1][0].core.motion.steps == 1


def test_the_flag_refreshes_off_the_clock():
    """In steps 0 to 2, on the clock at 5, and at 7 because 6 was taken back; the clock inside jit or given."""
    _, step, _, _ = compiled("penalised")
    one, two, kept = started("penalised"), started("penalised"), np.zeros(1)
    for i in range(9):
        more = *given(i), 0.0 if i == 6 else 1.0
        one, two = step(*one, *more), step(*two, *more, **({"fresh": False} if i % 5 else {}))
        same(one, two)
        inverse = np.array(one[1][0].core.layers["dense0"].inverse.A)
        assert i == 1 or (inverse != kept).any() == (i in (0, 2, 5, 7))
        kept = inverse


@pytest.mark.parametrize(("factor", "code"), [(0.0, kf.Code.OK), (np.nan, kf.Code.OK), (1.0, kf.Code.NONFINITE)])
def test_a_step_taken_back_leaves_the_old_bits(factor, code):
    """The loss before is zero or not a number, or the one after is not finite: an input overflows."""
    _, step, _, _ = compiled("cheap")
    pair = step(*started("cheap"), *given(0), 1.0)
    params, motion = jax.tree.map(np.array, (pair[0], pair[1][0].core.motion))
    x, y = given(1)
    after, (state, _) = step(*pair, x if code == kf.Code.OK else x.at[0, 0].set(jnp.nan), y, factor)
    same(after, params, 0.0, 0.0)
    now = state.core.motion
    bad = np.isnan(factor) or code == kf.Code.NONFINITE  # then the batch says nothing about the damping
    assert (now.rejected, now.code, now.restart, now.steps) == (1, code, True, 2)
    assert now.damping == motion.damping * (1 if bad else 4)
    assert code == kf.Code.NONFINITE or not any(x.any() for x in now.previous.values())


def test_true_labels_are_refused_where_they_are_told_and_never_guessed():
    """Draws that happen to be the loss's own gradients, as a fitted model's are, make an ordinary step."""
    _, step, _, eager = compiled("cheap")
    for one in (eager, step):
        with pytest.raises(ValueError, match=r"empirical.*monte_carlo or type2, or use LineSearch"):
            one(*started("cheap"), *given(0), 1.0, draws="told")
    pair = started("penalised")
    step = compiled("penalised")[1]
    for i in range(2):
        pair = step(*pair, *given(i), 1.0, draws="true")
    motion = pair[1][0].core.motion
    assert (motion.code, motion.steps) == (kf.Code.OK, 2)
    assert motion.damping > 0
    assert (pair[0]["dense0"] != START["dense0"]).any()


def test_factored_gradients_give_the_same_step():
    _, step, _, _ = compiled("cheap")
    one, two = started("cheap"), started("cheap")
    for i in range(2):
        few = tuple(v[:2] for v in given(i))  # fewer rows than the layers are wide
        one, two = step(*one, *few, 1.0), step(*two, *few, 1.0, draws="factored")
    same(one, two)


def test_in_float32_without_64_bits():
    """The rule's numbers are float32 too: 12 steps stay by those of NumPy."""
    params = dict(START)
    *_, state = numpy_steps("cheap", params, fresh("cheap"), range(12))
    small = partial(jax.tree.map, lambda x: jnp.asarray(np.asarray(x), jnp.float32))
    home = jax if hasattr(jax, "enable_x64") else importlib.import_module("jax.experimental")  # before jax 0.8
    with home.enable_x64(False):
        tx, _, _, step = compiled("cheap")
        ours = small(START)
        kfac, rest = tx.init(ours)
        pair = ours, (kfac._replace(core=begun(kfac.core, "cheap")), rest)
        step = jax.jit(step, compiler_options=FAST)
        for i in range(12):
            x, y = batch(i)
            pair = step(*pair, jnp.asarray(x, jnp.float32), jnp.asarray(y), 1.0)
        same(pair[0], params, 1e-3, 1e-4)
        motion = pair[1][0].core.motion
        same(motion, state.motion, 1e-2, 1e-4)
        assert {x.dtype for x in (motion.damping, motion.predicted, motion.ratio)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("kind", [jnp.float32, jnp.float64])
def test_the_small_system_on_tracers(kind):
    """Against the host's float64 solution; directions parallel to rounding are told by the dtype's own threshold."""
    rng = np.random.default_rng(5)
    solve = jax.jit(minimum)
    for _ in range(50):
        B = rng.normal(size=(2, 30)) * 10.0 ** rng.uniform(-4, 4, (2, 1))
        Q, down = B @ B.T, B @ rng.normal(size=30)
        alpha, mu, code = solve(jnp.asarray(Q, kind), jnp.asarray(down, kind))
        want = np.linalg.solve(Q, down)
        np.testing.assert_allclose([alpha, mu], want, rtol=1e-3 if kind == jnp.float32 else 1e-10)
        assert code == kf.Code.OK
        near = B[0] * 3 + 1e-3 * np.linalg.norm(B[0]) * rng.normal(size=30)
        Q = np.array([B[0], near]) @ np.array([B[0], near]).T
        alpha, mu, code = solve(jnp.asarray(Q, kind), jnp.asarray(down[[0, 0]] * [1, 3], kind))
        assert code == (kf.Code.JITTERED if kind == jnp.float32 else kf.Code.OK)
    for Q, down, code in (
        (np.zeros((2, 2)), [0.0, 0.0], kf.Code.OK),
        (np.ones((2, 2)), [1.0, 1.0], kf.Code.JITTERED),
        (np.full((2, 2), np.nan), [1.0, 1.0], kf.Code.NONFINITE),
        (np.eye(2), [np.inf, 1.0], kf.Code.NONFINITE),
    ):
        got = solve(jnp.asarray(Q, kind), jnp.asarray(down, kind))
        assert got == (1.0 if code == kf.Code.JITTERED else 0.0, 0.0, code)
        assert minimum(np.asarray(Q), np.asarray(down)) == got


def test_what_the_step_cannot_do_is_said():
    plan = kj.plan(twin(NET), START, batch(0)[0])
    with pytest.raises(ValueError, match=r"step is LineSearch.*does not run inside jit; kfac\(\) takes Fixed"):
        kj.kfac(plan, step=kf.LineSearch())
    tx = kj.kfac(plan, kf.Diagonal(), step=kf.SelfTuning())
    state, record = tx.init(START), {"dense0": kf.Record(jnp.zeros((2, 5)), jnp.zeros((2, 6)), 2.0)}
    with pytest.raises(ValueError, match=r"got no records, which SelfTuning\(.*needs at every step"):
        tx.update(START, state, START, records=None, fresh=False)
    asked = {"value": 1.0, "value_fn": lambda p: 1.0}
    for wrong in ({"value": None}, {"value_fn": None}, {"damping": 0.1}):
        with pytest.raises(
            ValueError, match=r"needs params, value=loss and value_fn=function of params, and no damping"
        ):
            tx.update(START, state, START, records=record, **{**asked, **wrong})
    with pytest.raises(ValueError, match="needs params"):
        tx.update(START, state, records=record, **asked)
    with pytest.raises(ValueError, match=r"layers \['dense2'\] have gradients but no records, which SelfTuning"):
        tx.update(START, state, START, records=record, **asked)
