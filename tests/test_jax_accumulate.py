"""Micro-batches and parameters under masks: accumulate, optax.MultiSteps, optax.masked and partition."""

from __future__ import annotations

import pickle
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

import kfaccore as kf
from jax_models import FAST, mlp, mlp_params, normal
from jax_needed import jax, jnp, kj, optax

X, Y = normal((12, 5), seed=2), normal((12, 3), seed=3)
NOISE = normal((2, 12, 3), seed=4)
LOSS = kf.Gaussian()
PLAN = kj.plan(mlp, mlp_params(), X)


def same(got, want, tolerance=1e-10):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def trained(tx, cuts, steps=3, measured=lambda i: True):
    """Parameters after some steps, each on all of X in the batches that `cuts` makes of it."""

    @partial(jax.jit, compiler_options=FAST, static_argnames="records")
    def call(params, state, x, y, noise, records):
        captured = kj.capture(PLAN, params, x)
        f = captured.prediction
        draws = kf.monte_carlo(LOSS, f, noise)
        grads = captured.gradients((f - y) / len(x))
        given = captured.records(draws, len(x), fisher=kf.monte_carlo) if records else None
        moves, state = tx.update(grads, state, params, records=given, fresh=None if records else False)
        return optax.apply_updates(params, moves), state

    params = mlp_params()
    state = tx.init(params)
    for i in range(steps):
        before = params
        for low, high in zip([0, *cuts], [*cuts, 12], strict=True):
            if low:
                same(params, before, 0)
            part = slice(low, high)
            params, state = call(params, state, X[part], Y[part], NOISE[:, part], records=measured(i))
    return params, state


def chain(method, clocks=None):
    clocks = clocks or kf.Clocks(1, 2)
    return optax.chain(kj.kfac(PLAN, method, clocks, kf.Schedules(0.1, 0.9)), optax.sgd(0.3, 0.9))


def test_micro_batches_equal_the_whole_batch():
    method = kf.KFAC()
    whole, state = trained(chain(method), ())
    parts, pieces = trained(kj.accumulate(chain(method), 3), (2, 4))  # of 2, 2 and 8 examples
    same(parts, whole)
    same(pieces.inner[0].codes, state[0].codes)
    assert int(pieces.inner[0].core.step) == 3
    assert all(not np.any(x) for x in jax.tree.leaves((pieces.stats, pieces.grads)))


def test_the_clock_of_statistics_counts_steps():
    method = kf.Diagonal()
    whole, _ = trained(chain(method, kf.Clocks(2, 2)), ())
    parts, _ = trained(kj.accumulate(chain(method, kf.Clocks(2, 2)), 2), (6,))
    same(parts, whole)
    plain, _ = trained(chain(method), (), measured=lambda i: i != 1)
    same(trained(kj.accumulate(chain(method), 2), (6,), measured=lambda i: i != 1)[0], plain)


def tuned(cuts):
    """Parameters after three steps that set their own rate, each example left out of what it helped to make."""
    tx = optax.chain(kj.kfac(PLAN, clocks=kf.Clocks(1, 2), step=kf.SelfTuning()), optax.scale(-1.0))

    @partial(jax.jit, compiler_options=FAST)
    def step(params, state):
        given = []
        slopes = []
        for low, high in zip([0, *cuts], [*cuts, 12], strict=True):
            part = slice(low, high)
            captured = kj.capture(PLAN, params, X[part])
            f = captured.prediction
            slope = (f - Y[part]) / len(f)
            draws = kf.monte_carlo(LOSS, f, NOISE[:, part])
            given.append(captured.records(draws, len(f), fisher=kf.monte_carlo, cotangent=slope))
            slopes.append(captured.gradients(slope * (len(f) / 12)))

        def value_fn(params):
            return jnp.mean((mlp(params, X) - Y) ** 2) * 1.5

        records = given if cuts else given[0]
        grads = jax.tree.map(lambda *parts: sum(parts), *slopes)
        moves, state = tx.update(grads, state, params, records=records, value=value_fn(params), value_fn=value_fn)
        return optax.apply_updates(params, moves), state

    params = mlp_params()
    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    return params, state


def test_micro_batches_of_a_self_tuning_step_equal_the_whole_batch():
    """Own shares, damping, rate and momentum: all that the state remembers."""
    whole, state = tuned(())
    parts, pieces = tuned((2, 6))
    same(parts, whole)
    same(pieces, state)


def test_micro_batches_that_do_not_belong_together_are_refused():
    tx = kj.kfac(PLAN)
    captured = kj.capture(PLAN, mlp_params(), X)
    draws = jnp.ones((1, 12, 3))
    told = captured.records(draws, 12, fisher=kf.monte_carlo)
    start = mlp_params(), tx.init(mlp_params())
    with pytest.raises(ValueError, match="micro-batches of different draws"):
        tx.update(*start, records=[told, captured.records(draws, 12, fisher=kf.type2)])
    with pytest.raises(ValueError, match="micro-batches of different layers"):
        tx.update(*start, records=[told, {"1.0": told["1.0"]}])
    with pytest.raises(TypeError, match="records is a sequence; need one"):
        tx.update(*start, records=[])


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: kj.accumulate(tx, 1)], ids=["kfac", "accumulate"])
def test_micro_batches_that_a_scan_puts_together_are_named(wrap, k):
    """With as many positions as outputs, of one micro-batch, each array could be one of another kind."""
    params = {"w": normal((4, 4))}
    x = normal((k, 6 // k, 4, 4), seed=2)
    plan = kj.plan(lambda p, x: x @ p["w"], params, x[0])
    tx = wrap(kj.kfac(plan))

    def one(x):
        captured = kj.capture(plan, params, x)
        return captured.records(captured.prediction[None], len(x), fisher=kf.monte_carlo)

    records = jax.eval_shape(lambda x: jax.lax.map(one, x), x)
    state = tx.init(params)
    wanted = rf"layer 'w' has g of shape \({k}, 1, 1, {6 // k}, 4, 4\), micro-batches first"
    with pytest.raises(ValueError, match=wanted):
        jax.eval_shape(lambda records: tx.update(params, state, params, records=records), records)


def test_what_cannot_be_added_up_is_refused():
    with pytest.raises(ValueError, match=r"with one kfac\(plan\) in it; this one has 0"):
        kj.accumulate(optax.sgd(0.1), 2)
    with pytest.raises(ValueError, match=r"SelfTuning.* needs the rows of the whole batch"):
        kj.accumulate(kj.kfac(PLAN, step=kf.SelfTuning()), 2)
    with pytest.raises(ValueError, match=r"SKFAC.* keeps rows of one process"):
        kj.accumulate(kj.kfac(PLAN, kf.SKFAC()), 2).init(mlp_params())
    for wrapped in (kj.kfac(PLAN), optax.chain(kj.kfac(PLAN), optax.sgd(0.1))):
        with pytest.raises(ValueError, match=r"take kfaccore_jax.accumulate\(kfac\(plan\), k\)"):
            optax.MultiSteps(wrapped, 2).init(mlp_params())
    tx = kj.accumulate(kj.kfac(PLAN), 2)
    captured = kj.capture(PLAN, mlp_params(), X)
    records = dict(captured.records(jnp.ones((1, 12, 3)), 12))
    del records["1.0"]
    with pytest.raises(ValueError, match=r"no records of \['1.0'\]"):
        tx.update(mlp_params(), tx.init(mlp_params()), records=records)


@pytest.mark.parametrize("hidden", ["weight", "bias"])
@pytest.mark.parametrize("outer", ["masked", "partition"])
def test_half_a_layer_is_preconditioned_by_itself(hidden, outer):
    """What a mask leaves of a layer has the block of that part alone: the oracle is a plan without the other leaf."""
    (w, b), second = mlp_params()
    keep = [(hidden == "bias", hidden == "weight"), (True, True)]
    tx = kj.kfac(PLAN, kf.KFAC(), schedules=kf.Schedules(0.1, 0.9))

    apart = {"leaf": b if hidden == "weight" else w, "second": second}
    alone = kj.plan(
        lambda p, x: mlp([(w, p["leaf"]) if hidden == "weight" else (p["leaf"], b), p["second"]], x), apart, X
    )

    def step(tx, plan, params):
        captured = kj.capture(plan, params, X)
        records = captured.records(kf.type2(LOSS, captured.prediction), 12)
        grads = captured.gradients(captured.prediction / 12)
        return tx.update(grads, tx.init(params), params, records=records)[0]

    if outer == "masked":
        wrapped = optax.masked(tx, keep)
    else:
        labels = jax.tree.map(lambda on: "kfac" if on else "rest", keep)
        wrapped = optax.partition({"kfac": tx, "rest": optax.set_to_zero()}, labels)
    moves = jax.jit(partial(step, wrapped, PLAN))(mlp_params())
    want = jax.jit(partial(step, kj.kfac(alone, kf.KFAC(), schedules=kf.Schedules(0.1, 0.9)), alone))(apart)
    same(moves[0][1 if hidden == "weight" else 0], want["leaf"], 1e-12)
    same(moves[1], want["second"], 1e-12)


def test_leaves_that_the_plan_does_not_know_are_named_at_init():
    tx = kj.kfac(PLAN)
    with pytest.raises(ValueError, match=r"init got leaves \['net.0.0', .* that the plan has not"):
        tx.init({"net": mlp_params()})
    (w, b), second = mlp_params()
    with pytest.raises(ValueError, match=r"0.0 \(4, 5\), planned as \(5, 4\)"):
        tx.init([(w.T, b), second])


@pytest.mark.parametrize(("dtype", "k", "n", "size"), [(jnp.bfloat16, 300, 6.0, 2**-7), (jnp.float16, 8, 2.0**14, 1.5)])
def test_gradients_of_half_precision_are_added_wide(dtype, k, n, size):
    """n times a gradient neither stops to grow nor overflows: k equal micro-batches are one."""
    params = {"w": jnp.ones((4, 5), dtype)}
    plan = kj.plan(lambda p, x: (x.astype(dtype) @ p["w"]).astype(jnp.float32), params, X[:6, :4])
    captured = kj.capture(plan, params, X[:6, :4])
    records = captured.records(jnp.ones((1, 6, 5), jnp.float32), n, fisher=kf.monte_carlo)
    grads = {"w": jnp.full((4, 5), size, dtype)}
    one = kj.kfac(plan, clocks=kf.Clocks(1, 1000))
    tx = kj.accumulate(one, k)

    @partial(jax.jit, compiler_options=FAST)
    def whole(state):
        return jax.lax.scan(lambda s, _: tx.update(grads, s, params, records=records)[::-1], state, None, length=k)

    _, moves = whole(tx.init(params))
    want = one.update(grads, one.init(params), params, records=records)[0]["w"].astype(float)
    np.testing.assert_allclose(moves["w"][-1].astype(float), want, rtol=jnp.finfo(dtype).eps)
    assert moves["w"].dtype == dtype


LOADED = """
import pickle, sys, jax
state = pickle.load(open(sys.argv[1], "rb"))
print(sum(float(abs(x).sum()) for x in jax.tree.leaves(jax.jit(lambda s: s)(state))))
"""


@pytest.mark.parametrize("method", [kf.KFAC(), kf.EKFAC()], ids=lambda method: type(method).__name__)
def test_a_state_is_loaded_where_none_was_made(method, tmp_path):
    """A pickle in a new process, which imports this package by loading it."""
    tx = kj.accumulate(optax.chain(kj.kfac(PLAN, method), optax.sgd(0.1)), 2)
    state = tx.init(mlp_params())
    path = tmp_path / "state.pickle"
    path.write_bytes(pickle.dumps(state))
    run = subprocess.run([sys.executable, "-c", LOADED, str(path)], capture_output=True, text=True, check=True)
    want = sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(state))
    np.testing.assert_allclose(float(run.stdout), want, rtol=1e-6)


def test_micro_batches_of_a_method_that_measures_nothing():
    captured = kj.capture(PLAN, mlp_params(), X)
    records = captured.records(jnp.ones((1, 12, 3)), 12.0, fisher=kf.monte_carlo)
    grads = captured.gradients(jnp.ones((12, 3)))
    tx = kj.accumulate(kj.kfac(PLAN, kf.Identity()), 1)
    same(tx.update(grads, tx.init(mlp_params()), records=records)[0], grads)
