"""Leaves beside the weights: what is no array of real numbers stays where it is, or is refused by name."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from jax_needed import jax, jnp, kj, optax
from kfaccore_jax.judge import losses_of

X = jax.ShapeDtypeStruct((6, 4), float)
LABELS = jnp.zeros(6, int)
W = jnp.ones((4, 3)) / 4
STAY = {
    "integer": (jnp.int32(3), "dtype int32", lambda z, m: z * m),
    "mask": (jnp.array([True, False, True]), "dtype bool", lambda z, m: z * m),
    "no elements": (jnp.zeros((0, 3)), "no elements", lambda z, m: z + m.sum()),
}


def with_leaf(use):
    return lambda p, x: use(x @ p["w"], p["m"])


@pytest.mark.parametrize("name", STAY)
def test_what_has_no_gradient_stays_under_a_step_that_judges(name):
    leaf, reason, use = STAY[name]
    params = {"w": W, "m": leaf}
    plan = kj.plan(with_leaf(use), params, X)
    assert {row.leaf: row.reason for row in plan.table} == {"w": "", "m": reason}
    step = kj.step(plan, kf.SoftmaxCrossEntropy())
    state = step.init(params)
    after, *_ = jax.eval_shape(step._step, params, state, (X, LABELS), jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), params)
    value = lambda p: jnp.sum(p["w"]) + jnp.sum(p["m"])  # noqa: E731
    seen = losses_of({"w": W, "m": jnp.zeros_like(leaf)}, 0.0, value, params, None)
    np.testing.assert_allclose(seen[1], jnp.sum(leaf), rtol=1e-12)


def test_a_sum_over_micro_batches_leaves_integers_alone():
    params = {"w": W, "m": jnp.int32(3)}
    plan = kj.plan(with_leaf(lambda z, m: z * m), params, X)
    tx = kj.accumulate(kj.kfac(plan, kf.Identity()), 1)
    grads = {"w": W, "m": jnp.int32(0)}
    record = kf.Record(jnp.ones((6, 4)), jnp.ones((6, 3)), 0.5)
    moves, _ = tx.update(grads, tx.init(params), params, records={"w": record})
    assert int(moves["m"]) == 0
    np.testing.assert_allclose(moves["w"], W, rtol=1e-12)


def test_what_is_no_array_of_numbers_is_refused_by_name():
    apply = with_leaf(lambda z, m: z)
    with pytest.raises(TypeError, match=r"no arrays: m is a float; make numbers that train arrays, jnp.asarray\(x\)"):
        kj.plan(apply, {"w": W, "m": 1.5}, X)
    params = {"w": W, "m": jax.random.key(0)}
    plan = kj.plan(apply, params, X)
    with pytest.raises(TypeError, match=r"random keys, \['m'\], which no transformation can add to"):
        kj.kfac(plan).init(params)
    hidden = optax.masked(kj.kfac(plan), {"w": True, "m": False})
    assert set(hidden.init(params).inner_state.core.layers) == {"w"}
    with pytest.raises(ValueError, match="draws=0; need at least one"):
        kj.step(plan, kf.SoftmaxCrossEntropy(), draws=0)
