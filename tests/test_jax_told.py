"""What a rule without a judgement is told of the loss in JAX: a model of it needs the value and the own shares."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

import kfaccore as kf
import kfaccore_numpy as kn
from jax_models import FAST
from jax_needed import jax, jnp, kj, optax
from jax_twins import twin
from test_jax_self_tuning import LOSS, NET, START, batch, type2

RULE = kf.Fixed(rescale=kf.Noise())
SETTINGS = (kf.KFAC(), kf.Clocks(1, 2), kf.Schedules(0.01, 0.9))


def transformation():
    plan = kj.plan(twin(NET), START, batch(0)[0])
    return plan, optax.chain(kj.kfac(plan, *SETTINGS, step=RULE), optax.scale(-1.0))


def test_a_length_by_noise_equals_the_numpy_shell():
    """Five steps under one jit: each step's length is of its own loss and of shares left out."""
    pre = kf.Preconditioner(*SETTINGS, step=RULE)
    ours, state = dict(START), pre.init(NET.blocks(), np.zeros(1))
    plan, tx = transformation()

    @partial(jax.jit, compiler_options=FAST)
    def step(params, state, x, y):
        captured = kj.capture(plan, params, x)
        n = float(len(x))
        slope = LOSS.gradient(captured.prediction, y) / n
        draws = kf.type2(LOSS, captured.prediction)
        records = captured.records(draws, n, fisher=kf.type2, cotangent=slope)
        value = LOSS.value(captured.prediction, y) / n
        moves, state = tx.update(captured.gradients(slope), state, params, records=records, value=value)
        return optax.apply_updates(params, moves), state

    params, kept = jax.tree.map(jnp.array, START), tx.init(START)
    for i in range(5):
        _, state, _ = kn.step(NET, ours, batch(i), LOSS, pre, state, i, np.random.default_rng(0), type2)
        params, kept = step(params, kept, *batch(i))
        for name, x in ours.items():
            np.testing.assert_allclose(params[name], x, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(kept[0].core.motion["first loss"], state.motion["first loss"], rtol=1e-12)
    assert float(kept[0].core.motion["first loss"]) > 1


def test_the_whole_step_tells_the_loss():
    plan, tx = transformation()
    run = kj.step(plan, LOSS, tx)
    params = jax.tree.map(jnp.array, START)
    _, state, told = run(params, run.init(params), batch(0), jax.random.key(0))
    np.testing.assert_allclose(state[0].core.motion["first loss"], told["loss"], rtol=1e-12)


def test_a_step_without_its_loss_is_refused():
    plan, tx = transformation()
    params = jax.tree.map(jnp.array, START)
    captured = kj.capture(plan, params, jnp.asarray(batch(0)[0]))
    slope = LOSS.gradient(captured.prediction, jnp.asarray(batch(0)[1])) / 16
    records = captured.records(kf.type2(LOSS, captured.prediction), 16.0, fisher=kf.type2, cotangent=slope)
    with pytest.raises(ValueError, match=r"Noise.*needs value=, the loss of the batch"):
        tx.update(captured.gradients(slope), tx.init(params), params, records=records)


def shifted(rule, shift, nonnegative, steps=8):
    """Losses, without the shift, of steps in one jitted program."""
    plan = kj.plan(twin(NET), START, batch(0)[0])
    schedules = SETTINGS[2:] if rule is RULE else ()  # the other sets its damping
    tx = optax.chain(kj.kfac(plan, *SETTINGS[:2], *schedules, step=rule), optax.scale(-1.0))

    @partial(jax.jit, compiler_options=FAST)
    def step(params, state, x, y):
        captured = kj.capture(plan, params, x)
        n = float(len(x))
        slope = LOSS.gradient(captured.prediction, y) / n
        records = captured.records(kf.type2(LOSS, captured.prediction), n, fisher=kf.type2, cotangent=slope)

        def value_fn(params):
            return LOSS.value(plan.apply(params, x), y) / n + shift

        told = {"value": value_fn(params), "value_fn": value_fn, "nonnegative": nonnegative}
        moves, state = tx.update(captured.gradients(slope), state, params, records=records, **told)
        return optax.apply_updates(params, moves), state, told["value"]

    params, state, losses = jax.tree.map(jnp.array, START), tx.init(START), []
    for k in range(steps):
        params, state, value = step(params, state, *batch(k))
        losses.append(float(value) - shift)
    return np.array(losses)


@pytest.mark.parametrize("rule", [RULE, kf.SelfTuning()], ids=["Noise", "SelfTuning"])
def test_a_constant_changes_no_step_of_a_loss_without_an_end(rule):
    plain = shifted(rule, 0.0, False)
    assert len(set(plain)) == 8
    for shift in (-100.0, 3.0):
        np.testing.assert_allclose(shifted(rule, shift, False), plain, rtol=1e-8)
    np.testing.assert_allclose(shifted(rule, -100.0, None), plain, rtol=1e-8)  # a value below 0 shows it
