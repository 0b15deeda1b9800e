"""`Schedules(l2=, weight_decay=)` in JAX: those of the shell and those written by hand around it are one step."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

import kfaccore as kf
from jax_models import FAST, normal
from jax_needed import jax, jnp, kj, optax

P = dict(zip("wbv", normal((4, 5), (5,), (5, 3)), strict=True))
X, Y = normal((8, 4), seed=2), jnp.arange(8) % 3
LOSS = kf.SoftmaxCrossEntropy()


def net(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]


PLAN = kj.plan(net, P, X)


def trained(schedules, l2=0.0, decay=0.0, steps=3, factored=False, wrap=lambda tx: tx, step=kf.Fixed()):  # noqa: B008
    """Parameters after some steps at rate .3; l2 and decay are added by hand."""
    tx = wrap(optax.chain(kj.kfac(PLAN, kf.KFAC(), schedules=schedules, step=step), optax.scale(-0.3)))

    @partial(jax.jit, compiler_options=FAST)
    def call(params, state):
        captured = kj.capture(PLAN, params, X)
        slope = LOSS.gradient(captured.prediction, Y) / len(X)
        records = captured.records(kf.type2(LOSS, captured.prediction), len(X), fisher=kf.type2, cotangent=slope)
        grads = jax.tree.map(lambda g, p: g + l2 * p, captured.gradients(slope), params)

        def value(params):
            return LOSS.value(net(params, X), Y) / len(X)

        more = {"factored": captured.factored(slope)} if factored else {}
        more |= {"value": value(params), "value_fn": value} if step != kf.Fixed() else {}
        moves, state = tx.update(grads, state, params, records=records, **more)
        return jax.tree.map(lambda p, m: p + m - 0.3 * decay * p, params, moves), state

    params = P
    state = tx.init(params)
    for _ in range(steps):
        params, state = call(params, state)
    return params


def same(got, want, tolerance=1e-11):
    for name in P:
        np.testing.assert_allclose(got[name], want[name], rtol=tolerance, atol=1e-13)


@pytest.mark.parametrize("factored", [False, True])
def test_l2_is_in_gradient_and_damping(factored):
    got = trained(kf.Schedules(0.1, l2=0.2), factored=factored)
    same(got, trained(kf.Schedules(0.3), l2=0.2))


def test_a_schedule_of_l2_sees_the_step():
    got = trained(kf.Schedules(0.1, l2=lambda step: 0.2 + 0.0 * step))
    same(got, trained(kf.Schedules(0.3), l2=0.2))


def test_weight_decay_stands_beside_the_direction():
    same(trained(kf.Schedules(0.1, weight_decay=0.2)), trained(kf.Schedules(0.1), decay=0.2))


def test_micro_batches_add_them_once():
    schedules = kf.Schedules(0.1, l2=0.2, weight_decay=0.1)
    got = trained(schedules, steps=4, wrap=lambda tx: kj.accumulate(tx, 2))
    same(got, trained(kf.Schedules(0.3), l2=0.2, decay=0.1, steps=2))


def test_a_rule_that_judges_is_told_of_the_penalty():
    """A loss that is all penalty: nothing else can fall, and the step that it takes is Newton's."""
    flat = kj.plan(lambda p, x: 0.0 * (x @ p["w"]), {"w": P["w"]}, X)
    schedules = kf.Schedules(l2=0.5)
    tx = optax.chain(kj.kfac(flat, kf.KFAC(), schedules=schedules, step=kf.SelfTuning()), optax.scale(-1.0))
    params = {"w": P["w"]}
    state = tx.init(params)
    sizes = []
    for _ in range(6):
        captured = kj.capture(flat, params, X)
        f = captured.prediction
        records = captured.records(kf.type2(kf.Gaussian(), f), len(X), fisher=kf.type2, cotangent=0 * f)
        grads = captured.gradients(0 * f)
        moves, state = tx.update(grads, state, params, records=records, value=0.0, value_fn=lambda p: 0.0)
        params = optax.apply_updates(params, moves)
        sizes.append(float(jnp.linalg.norm(params["w"])))
    assert sizes[-1] < 0.1 * float(jnp.linalg.norm(P["w"]))


def test_parameters_are_asked_for():
    tx = kj.kfac(PLAN, kf.KFAC(), schedules=kf.Schedules(weight_decay=0.1))
    state = tx.init(P)
    with pytest.raises(ValueError, match="need the parameters: update"):
        tx.update(P, state, records=None, fresh=False)


def test_beside_graft_they_are_the_optimizers():
    with pytest.raises(ValueError, match="graft's optimizer: set them there"):
        kj.kfac(PLAN, kf.KFAC(), schedules=kf.Schedules(l2=0.1), graft=optax.adamw(1e-3))


def grafted(graft, decay=lambda step: 0.0, matrices_alone=False, steps=3):
    """Parameters after some steps; decay(step) is taken off by hand."""
    tx = optax.chain(kj.kfac(PLAN, kf.KFAC(), graft=graft), optax.scale(-1.0))

    @partial(jax.jit, compiler_options=FAST)
    def call(params, state, decay):
        captured = kj.capture(PLAN, params, X)
        slope = LOSS.gradient(captured.prediction, Y) / len(X)
        records = captured.records(kf.type2(LOSS, captured.prediction), len(X), fisher=kf.type2)
        moves, state = tx.update(captured.gradients(slope), state, params, records=records)

        def moved(p, m):
            return p + m - (0.0 if matrices_alone and p.ndim == 1 else decay) * p

        return jax.tree.map(moved, params, moves), state

    params = P
    state = tx.init(params)
    for step in range(steps):
        params, state = call(params, state, decay(step))
    return params


def of_matrices(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


@pytest.mark.parametrize("masked", [False, True])
def test_decay_beside_a_grafted_step_stays_beside_it(masked):
    mask = of_matrices if masked else None
    got = grafted(optax.adamw(0.01, weight_decay=0.5, mask=mask))
    same(got, grafted(optax.adam(0.01), lambda _: 0.005, masked))


def test_and_where_its_rate_begins_with_zero():
    rate = optax.linear_schedule(0.0, 0.02, 4)
    got = grafted(optax.adamw(rate, weight_decay=0.5))
    same(got, grafted(optax.adam(rate), lambda step: 0.5 * float(rate(step))), 1e-8)  # optax has rates of float32


def test_a_length_that_goes_by_the_parameters_is_left_whole():
    """LAMB's step is in proportion to its parameters, and to its gradient's direction: nothing of it shrinks them."""
    graft = optax.lamb(0.01)
    state = graft.init(P)
    captured = kj.capture(PLAN, P, X)
    grads = captured.gradients(LOSS.gradient(captured.prediction, Y) / len(X))
    want, _ = graft.update(grads, state, P)
    moved = grafted(graft, steps=1)
    for layer, leaves in {"w": ("w", "b"), "v": ("v",)}.items():
        length = sum(float((want[name] ** 2).sum()) for name in leaves) ** 0.5
        way = sum(float(((moved[name] - P[name]) ** 2).sum()) for name in leaves) ** 0.5
        assert way == pytest.approx(length, rel=1e-10), layer
