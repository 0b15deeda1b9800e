"""Settings of JAX that people switch on."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from jax_models import normal
from jax_needed import jax, jnp, kj, optax

X = normal((6, 5, 4), seed=2)
SOFT = kf.SoftmaxCrossEntropy(weights=(1.0, 2.0, 1.0), smoothing=0.1, ignore=2)
CASES = [(SOFT, jnp.zeros((6, 5), int)), (kf.Gaussian(), jnp.ones((6, 5, 3))), (kf.Bernoulli(), jnp.ones((6, 5, 3)))]


def apply(p, x):
    return jnp.tanh(x @ p["w"]) @ p["v"] * jnp.exp(p["s"])


@pytest.mark.parametrize(("loss", "target"), CASES, ids=lambda x: type(x).__name__)
def test_steps_where_ranks_are_not_promoted(loss, target):
    """The same with jax_numpy_rank_promotion="raise", micro-batches and other draws too."""
    found = []
    for setting in ("allow", "raise"):
        with jax.numpy_rank_promotion(setting):
            params = {"w": normal((4, 5)), "v": normal((5, 3), seed=1), "s": jnp.zeros(())}
            plan = kj.plan(apply, params, X)
            captured = kj.capture(plan, params, X)
            columns = kf.type2(loss, captured.prediction, target)
            rows = captured.records(columns, 6.0, fisher=kf.type2, mask=jnp.ones((6, 5), bool))
            tx = kj.accumulate(optax.chain(kj.kfac(plan), optax.sgd(0.1)), 1)
            step = kj.step(plan, loss, tx)
            found.append((step(params, step.init(params), (X, target), jax.random.key(0)), rows))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(a, b)
