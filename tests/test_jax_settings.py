"""Settings of JAX that people switch on."""

from __future__ import annotations

import importlib
from collections import Counter
from contextlib import nullcontext
from functools import partial

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


def products(jaxpr, within=False):
    """(whether it is in a loop, precision) of all products, those of inner jaxprs too."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield within, eqn.params["precision"]
        for value in eqn.params.values():
            body = getattr(value, "jaxpr", value)
            if hasattr(body, "eqns"):
                yield from products(body, within or eqn.primitive.name == "while")


def test_inverses_are_as_exact_as_their_numbers():
    """JAX multiplies float32 arrays in TF32 on a GPU and bfloat16 on a TPU, or as the process has it: an inverse made
    so is none from condition 1e6 on. Products of the step are as the process has them, or as `Precision` says."""

    def run(params, state, x):
        captured = kj.capture(plan, params, x)
        records = captured.records(captured.prediction[None], 6.0, fisher=kf.monte_carlo)
        return tx.update(params, state, records=records, fresh=True)

    home = jax if hasattr(jax, "enable_x64") else importlib.import_module("jax.experimental")  # before jax 0.8
    found = []
    with home.enable_x64(False), jax.default_matmul_precision("bfloat16"):
        params, x = (jnp.asarray(v, jnp.float32) for v in (normal((4, 3)), X[:, 0]))
        plan = kj.plan(lambda p, x: x @ p, params, x)
        tx = kj.kfac(plan)
        state = tx.init(params)
        for said in (nullcontext(), kf.Precision().in_force()):
            with said:
                found.append(Counter(products(jax.make_jaxpr(partial(run, x=x))(params, state).jaxpr)))
    exact, fast = ((how,) * 2 for how in (jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT))
    assert [how for loop, how in found[0] if loop] == [exact]
    assert found[0][False, fast] - found[1][False, fast] == 2  # G^-1 V A^-1
