"""Signs of draws that are no samples: of rows that examples share they are right in the mean over steps alone, so every
batch and step has others; those of one batch are the same however it is computed."""

from __future__ import annotations

from functools import partial

import numpy as np

import kfaccore as kf
from jax_models import FAST
from jax_needed import jax, jnp, kj
from kfaccore_jax.signs import signed

BATCHES = jnp.asarray(np.random.default_rng(0).normal(size=(64, 6, 4)))


def scaled(p, x):
    return jnp.exp(p["s"]) * (1 + 0.0 * x[:, :1])  # every example has the derivative exp(s)


def test_the_mean_over_batches_or_steps_is_the_sum_over_examples():
    plan = kj.plan(scaled, {"s": jnp.zeros(())}, BATCHES[0])

    @partial(jax.jit, compiler_options=FAST)
    @jax.vmap
    def measured(s, x):
        captured = kj.capture(plan, {"s": s}, x)
        records = captured.records(kf.type2(kf.Gaussian(), captured.prediction), 6, fisher=kf.type2)
        return kf.dense({**records, **records.rest}["s"])[0, 0, 0] / jnp.exp(s) ** 2

    fresh = measured(jnp.zeros(64), BATCHES)
    assert len(set(np.asarray(fresh).round(2).tolist())) > 2
    np.testing.assert_allclose(fresh.mean(), 1.0, atol=0.35)
    steps = measured(jnp.linspace(0.0, 1.0, 64), jnp.broadcast_to(BATCHES[0], BATCHES.shape))
    np.testing.assert_allclose(steps.mean(), 1.0, atol=0.35)


def test_signs_go_with_the_examples_and_not_with_the_order_of_sums():
    x = {"a": BATCHES[0], "ids": jnp.arange(6) % 2, "key": jax.random.split(jax.random.key(0), 6)}
    f = jnp.full((18, 2), 1 / 3)
    draws = jnp.ones((4, 18, 2))

    @partial(jax.jit, compiler_options=FAST)
    def found(x):
        turned = jax.tree.map(lambda v: v[::-1], x)
        of = {"plain": (f, x), "other sums": (f * (1 + 1e-15), x), "next step": (f * 1.01, x), "turned": (f, turned)}
        of |= {"alike": (f, jnp.ones((6, 3)))}
        signs = {name: signed(draws, f, [x], 6)[..., 0] for name, (f, x) in of.items()}
        return signs | {"rows": signed(draws, f, [x], 6, rows=True)[..., 0]}

    of = found(x)
    np.testing.assert_array_equal(of["turned"], of["plain"][:, ::-1])
    np.testing.assert_array_equal(of["other sums"], of["plain"])
    assert not np.array_equal(of["next step"], of["plain"])
    assert np.linalg.matrix_rank(of["alike"][:, ::3]) > 1  # equal examples have signs of their own
    assert not np.array_equal(of["rows"][:, ::3], of["rows"][:, 1::3])
