"""Optimizers beside K-FAC that ask for more than a gradient, and those that remember where they began."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from jax_models import normal
from jax_needed import jax, jnp, kj, optax

X = normal((6, 4), seed=1)


def made():
    params = {"w": normal((4, 3)), "b": jnp.zeros(3), "odd": jnp.ones(2)}
    return params, kj.plan(lambda p, x: (x @ p["w"] + p["b"]) * jnp.sum(p["odd"] ** 2), params, X)


def test_graft_and_rest_are_told_the_loss():
    """Polyak's step is the loss over the squared norm of the gradient, of all leaves or of those that are left."""
    params, plan = made()
    polyak = optax.polyak_sgd()
    tx = kj.kfac(plan, graft=polyak)
    rest = kj.kfac(plan, rest=optax.scale_by_polyak(max_learning_rate=10.0))

    def grads(p):
        return jax.grad(lambda p: jnp.mean((plan.apply(p, X)) ** 2))(p)

    @jax.jit
    def run(params):
        captured = kj.capture(plan, params, X)
        records = captured.records(kf.type2(kf.Gaussian(), captured.prediction), len(X), fisher=kf.type2)
        g = grads(params)
        told = {"records": records, "value": 0.25}
        moves, _ = tx.update(g, tx.init(params), params, **told)
        beside, _ = rest.update(g, rest.init(params), params, **told)
        return g, moves, beside["odd"]

    g, moves, odd = run(params)
    want, _ = polyak.update(g, polyak.init(params), params, value=0.25)
    np.testing.assert_allclose(moves["odd"], -want["odd"], rtol=1e-10)
    size, length = (np.sqrt(np.sum(np.square(x["w"])) + np.sum(np.square(x["b"]))) for x in (moves, want))
    np.testing.assert_allclose(size, length, rtol=1e-10)
    np.testing.assert_allclose(odd, 0.25 / np.sum(np.square(g["odd"])) * g["odd"], rtol=1e-10)


def test_what_the_loop_does_not_tell_is_named():
    params, plan = made()
    tx = kj.kfac(plan, graft=optax.polyak_sgd(), clocks=kf.Clocks(2, 2))
    with pytest.raises(TypeError, match="'value'") as caught:
        tx.update(params, tx.init(params), params, records=None, fresh=False)
    assert caught.value.__notes__ == [
        "graft and rest are told what the update of kfac(plan) is, here []: update(..., value=loss)"
    ]


@pytest.mark.parametrize("make", [optax.contrib.prodigy, lambda: optax.lbfgs(0.1, linesearch=None)], ids=["a", "b"])
def test_a_state_that_holds_an_array_twice_or_the_parameters_is_given_away(make):
    params, plan = made()
    step = kj.step(plan, kf.Gaussian(), optax.chain(kj.kfac(plan), make()))
    state = step.init(params)
    leaves = [x for x in jax.tree.leaves((params, state)) if isinstance(x, jax.Array)]
    assert len({id(x) for x in leaves}) == len(leaves)
    kept = jax.tree.map(np.asarray, step.tx.init(params))
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(kept), strict=True):
        np.testing.assert_array_equal(x, y)
    step(params, state, (X, jnp.zeros((6, 3))), jax.random.key(0))
