"""Streams of JAX functions: per-example gradients from jax.grad, one example at a time."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf

jax = pytest.importorskip("jax")
kj = pytest.importorskip("kfaccore_jax")
import jax.numpy as jnp  # noqa: E402

jax.config.update("jax_enable_x64", True)


def apply(params, x):
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"]


def test_streams_of_a_function():
    rng = np.random.default_rng(0)
    params = {"w1": rng.normal(size=(4, 5)), "b1": rng.normal(size=5), "w2": rng.normal(size=(5, 3))}
    params = {name: jnp.asarray(w) for name, w in params.items()}
    x, y = jnp.asarray(rng.normal(size=(6, 4))), jnp.asarray(rng.integers(0, 3, 6))
    plan = kj.plan(apply, params, x)
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    loss = kf.SoftmaxCrossEntropy()
    split = jax.jit(jax.vmap(jax.vmap(plan.matrices)))

    def check(stream, function):
        """function(f (C,), y) -> (draws,)"""
        one = lambda p, x, y: function(apply(p, x[None])[0], y)  # noqa: E731
        trees = jax.vmap(jax.jacrev(one), (None, 0, 0))(params, x, y)  # leaves (examples, draws, *shape)
        matrices = split(trees)
        every = list(stream)
        assert [batch["w2"].n for batch in every] == [3, 3]
        for name in plan.blocks:
            pairs = [(np.asarray(batch[name].g), np.asarray(batch[name].a)) for batch in every]
            got = np.concatenate([np.einsum("vbnso,bnsi->nvoi", g, a) for g, a in pairs])
            np.testing.assert_allclose(got, np.asarray(matrices[name])[:, :, 0], rtol=1e-9, atol=1e-12)

    value = lambda f, y: jax.nn.logsumexp(f) - f[y]  # noqa: E731
    check(kj.stream(plan, params, loss, batches, kf.empirical), lambda f, y: value(f, y)[None])
    check(kj.outputs(plan, params, batches, select=lambda f: f[:, 1:]), lambda f, y: f[1:])
    measure = lambda f, y: -jax.vmap(value)(f, y)  # noqa: E731
    check(kj.measured(plan, params, measure, batches), lambda f, y: -value(f, y)[None])
    drawn = kj.stream(plan, params, loss, batches, draws=2)
    for first, again in zip(drawn, drawn, strict=True):
        assert first["w1"].draws == 2
        assert np.array_equal(first["w1"].g, again["w1"].g)
    with pytest.raises(ValueError, match=r"measure gave shape \(\)"):
        list(kj.measured(plan, params, lambda f, y: f.sum(), batches))
    with pytest.raises(ValueError, match="need one of kfaccore's"):
        kj.stream(plan, params, loss, batches, len)


def test_the_example_tunes_its_precision():
    from kfaccore_jax.examples import evidence

    gain, gradient = evidence.main(200)
    assert gain > 0
    assert abs(gradient) < 1e-3
