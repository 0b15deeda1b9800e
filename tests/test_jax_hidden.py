"""Leaves that the rule does not see: hidden by a wrapper, or without a gradient in some steps. The oracle is a model
that has them as constants."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

import kfaccore as kf
from jax_models import FAST, normal
from jax_needed import jax, jnp, kj, optax
from kfaccore_jax.state import counts_of

START = dict(zip("wbsv", normal((4, 5), (5,), (5,), (5, 3)), strict=True))
X, Y = normal((8, 4), seed=2), jnp.arange(8) % 3
LOSS = kf.SoftmaxCrossEntropy()


def model(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) * jnp.exp(p["s"]) @ p["v"]


WHOLE = kj.plan(model, START, X)


def constant(off):
    """(plan, params) of the model with the leaves `off` as constants."""
    params = {name: x for name, x in START.items() if name not in off}
    kept = {name: START[name] for name in off}
    return kj.plan(lambda p, x: model({**p, **kept}, x), params, X), params


def trained(tx, plan, params, none=(), told=False, k=1, steps=2):
    """Parameters after some steps, each of k micro-batches."""

    @partial(jax.jit, compiler_options=FAST)
    def call(params, state, x, y, noise):
        n = len(x)
        captured = kj.capture(plan, params, x)
        slope = kf.empirical(LOSS, captured.prediction, y)[0] / n
        draws = kf.monte_carlo(LOSS, captured.prediction, noise)
        records = captured.records(draws, n, fisher=kf.monte_carlo, cotangent=slope)
        grads = {**captured.gradients(slope), **dict.fromkeys(none)}

        def value(params):
            return LOSS.value(plan.apply(params, x), y) / n

        given = {"records": records, "value": value(params), "value_fn": value} | ({"whole": params} if told else {})
        moves, state = tx.update(grads, state, params, **given)
        return {name: x if moves[name] is None else x + moves[name] for name, x in params.items()}, state

    state = tx.init(params)
    for i in range(steps):
        for j in range(k):
            params, state = call(params, state, X[j::k], Y[j::k], noise_of(i, j, len(X[j::k])))
    return params, state


def noise_of(i, j, n):
    return jax.random.uniform(jax.random.key(10 * i + j), (1, n), jnp.float64)


def same(got, want):
    for name, x in want.items():
        np.testing.assert_allclose(got[name], x, rtol=1e-12, atol=1e-13, err_msg=name)


def tuning(plan):
    return optax.chain(kj.kfac(plan, step=kf.SelfTuning()), optax.scale(-1.0))


def frozen(tx, off):
    labels = {name: "off" if name in off else "on" for name in START}
    return optax.partition({"on": tx, "off": optax.set_to_zero()}, labels)


@pytest.mark.parametrize("off", ["v", "s", "b", "wb"])
def test_a_rule_that_judges_where_leaves_are_hidden(off):
    want, _ = trained(tuning(constant(off)[0]), *constant(off))
    got, _ = trained(frozen(tuning(WHOLE), off), WHOLE, START, told=True)
    same(got, {**START, **want})


def test_a_rule_that_judges_is_not_given_a_part_of_the_parameters():
    with pytest.raises(ValueError, match=r"without \['b', 'v'\].*whole=params"):
        trained(frozen(tuning(WHOLE), "bv"), WHOLE, START, steps=1)
    mask = {name: name != "v" for name in START}
    with pytest.raises(ValueError, match=r"without \['v'\].*whole=params"):
        trained(optax.masked(tuning(WHOLE), mask), WHOLE, START, steps=1)


def test_one_function_knows_all_parameters():
    without, part = constant("v")
    runs = []
    for plan, tx, params in ((without, tuning(without), part), (WHOLE, frozen(tuning(WHOLE), "v"), START)):
        step = kj.step(plan, LOSS, tx)
        params = jax.tree.map(jnp.copy, params)
        runs.append(step(params, step.init(params), (X, Y), jax.random.key(3)))
    same(runs[1][0], {**runs[0][0], "v": START["v"]})
    for name, x in runs[0][2].items():
        np.testing.assert_allclose(runs[1][2][name], x, rtol=1e-12)


def test_codes_of_two_groups_add_up():
    labels = {name: "one" if name in "wb" else "two" for name in START}
    tx = optax.partition({"one": kj.kfac(WHOLE), "two": kj.kfac(WHOLE, kf.EKFAC())}, labels)
    step = kj.step(WHOLE, LOSS, optax.chain(tx, optax.scale(-0.1)))
    params = jax.tree.map(jnp.copy, START)
    *_, metrics = step(params, step.init(params), (X, Y), jax.random.key(3))
    assert {name: int(x) for name, x in metrics.items() if name != "loss" and x} == {"code/OK": 3}
    with pytest.raises(ValueError, match="this has 0"):
        counts_of(optax.sgd(0.1).init(START))


@pytest.mark.parametrize("off", ["v", "s", "wb"])
@pytest.mark.parametrize("rule", ["fixed", "tuning", "micro-batches"])
def test_leaves_without_a_gradient_are_constants(rule, off):
    def made(plan):
        alone = kj.kfac(plan, uncovered=kf.Diagonal(), clocks=kf.Clocks(1, 2))
        return {"fixed": alone, "tuning": tuning(plan), "micro-batches": kj.accumulate(alone, 2)}[rule]

    k = 2 if rule == "micro-batches" else 1
    plan, params = constant(off)
    want, _ = trained(made(plan), plan, params, k=k)
    got, _ = trained(made(WHOLE), WHOLE, START, none=off, k=k)
    same(got, {**START, **want})


def test_gradients_that_cannot_be_left_out_are_named():
    with pytest.raises(ValueError, match=r"graft needs a gradient .* none of \['v'\]"):
        trained(kj.kfac(WHOLE, graft=optax.adamw(0.01)), WHOLE, START, none="v", steps=1)
    with pytest.raises(ValueError, match=r"rest needs a gradient .* none of \['s'\]"):
        trained(kj.kfac(WHOLE, rest=optax.scale_by_adam()), WHOLE, START, none="s", steps=1)
    for half in "bw":
        for tx in (kj.kfac(WHOLE), kj.accumulate(kj.kfac(WHOLE), 1)):
            with pytest.raises(ValueError, match=f"layer w got no gradient of {half}"):
                trained(tx, WHOLE, START, none=half, steps=1)


WRAPPERS = {
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "masked": lambda tx: optax.masked(tx, dict.fromkeys(START, True)),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, lambda step, **_: step >= 0),
    "named_chain": lambda tx: optax.named_chain(("k", tx)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_micro_batches_of_one_kfac_in_a_wrapper(wrapper):
    tx = optax.chain(kj.kfac(WHOLE), optax.sgd(0.1))
    want, _ = trained(kj.accumulate(tx, 2), WHOLE, START, k=2)
    got, _ = trained(kj.accumulate(WRAPPERS[wrapper](tx), 2), WHOLE, START, k=2)
    same(got, want)


@pytest.mark.parametrize("off", ["b", "w", "v", "s"])
def test_micro_batches_where_leaves_are_hidden(off):
    plan, params = constant(off)
    want, _ = trained(kj.accumulate(kj.kfac(plan, uncovered=kf.Diagonal()), 2), plan, params, k=2)
    hiding = frozen(kj.kfac(WHOLE, uncovered=kf.Diagonal()), off)
    got, _ = trained(kj.accumulate(hiding, 2), WHOLE, START, k=2)
    same(got, {**START, **want})


def test_two_kfacs_are_not_accumulated_as_one():
    tx = optax.chain(kj.kfac(WHOLE), kj.kfac(WHOLE))
    with pytest.raises(ValueError, match="this one has 2"):
        kj.accumulate(tx, 2)
