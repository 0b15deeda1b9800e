"""Settings of JAX that people switch on."""

from __future__ import annotations

import pytest

import kfaccore as kf
from jax_models import normal
from jax_needed import jax, jnp, kj, optax

X = normal((6, 5, 4), seed=2)
SOFT = kf.SoftmaxCrossEntropy(weights=(1.0, 2.0, 1.0), smoothing=0.1, ignore=2)
CASES = [(SOFT, jnp.zeros((6, 5), int)), (kf.Gaussian(), jnp.ones((6, 5, 3))), (kf.Bernoulli(), jnp.ones((6, 5, 3)))]


def apply(p, x):
    return jnp.tanh(x @ p["w"]) @ p["v"] * jnp.exp(p["s"])


SETTINGS = [(jax.numpy_rank_promotion, "allow", "raise"), (jax.numpy_dtype_promotion, "standard", "strict")]


@pytest.mark.parametrize(("promoted", "by_default", "strictly"), SETTINGS, ids=["ranks", "dtypes"])
@pytest.mark.parametrize(("loss", "target"), CASES, ids=lambda x: type(x).__name__)
def test_steps_where_nothing_is_promoted(loss, target, promoted, by_default, strictly):
    """These settings raise while a program is traced: micro-batches and other draws too."""
    params = {"w": normal((4, 5)), "v": normal((5, 3), seed=1), "s": jnp.zeros(())}
    plan = kj.plan(apply, params, X)
    step = kj.step(plan, loss, kj.accumulate(optax.chain(kj.kfac(plan), optax.sgd(0.1)), 1))

    def run(params, x, target, key):
        captured = kj.capture(plan, params, x)
        columns = kf.type2(loss, captured.prediction, target)
        rows = captured.records(columns, 6.0, fisher=kf.type2, mask=jnp.ones((6, 5), bool))
        return step(params, step.init(params), (x, target), key), rows

    found = []
    for setting in (by_default, strictly):
        with promoted(setting):
            found.append(jax.eval_shape(run, params, X, target, jax.random.key(0)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found[0]) == jax.tree.map(lambda x: (x.shape, x.dtype), found[1])
