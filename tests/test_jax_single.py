"""The last batch of an epoch may have one example, or so few that the model is written otherwise."""

from __future__ import annotations

import pytest

import kfaccore as kf
from jax_checks import close
from jax_models import normal
from jax_needed import jax, jnp, kj


def attended(p, x):
    q, k, v = x @ p["q"], x @ p["k"], x @ p["v"]
    return ((jax.nn.softmax(q @ k.swapaxes(1, 2)) @ v) @ p["o"]).mean(1)


def with_token(p, x):
    token = jnp.broadcast_to(p["c"], (len(x), 1, 4))
    h = jnp.tanh(jnp.concatenate([token, x @ p["q"]], 1) @ p["k"])
    return h.mean(1) @ p["v"] + p["o"][0] * jnp.exp(p["c"][0, 0])


def tied(p, x):
    token = jnp.broadcast_to(p["c"], (len(x), 1, 4))
    return (
        (jnp.tanh(jnp.concatenate([token, x], 1) @ p["q"]) @ p["q"].T + p["k"][:3][None, :1]).mean(1) @ p["v"] @ p["o"]
    )


@pytest.mark.parametrize("apply", [attended, with_token, tied])
def test_a_last_batch_of_one_example(apply):
    """jnp writes other equations for an axis of one element; records are those of the example alone."""
    x = normal((7, 3, 4), seed=1)
    params = dict(zip("qkvoc", normal(*[(4, 4)] * 4, (1, 1, 4)), strict=True))
    plan = kj.plan(apply, params, x)
    captured = kj.capture(plan, params, x[6:])
    close(captured.prediction, apply(params, x[6:]))
    draws = normal((2, 1, 4), seed=3)
    mask = jnp.ones((1, 3), bool) if apply is attended else None
    records = captured.records(draws, 1.0, fisher=kf.monte_carlo, cotangent=draws[0], mask=mask)
    want = jax.vmap(lambda d: jax.grad(lambda p: jnp.vdot(apply(p, x[6:]), d))(params))(draws)
    close(captured.gradients(draws[0]), jax.tree.map(lambda g: g[0], want))
    for layer in plan.layers:
        record = records[layer.name]
        J = record.examples()  # draws, blocks, batch, d_out, d_in
        assert J.shape[2] == (2 if layer.turned else 1)
        found = J[0].transpose(1, 0, 2, 3) if layer.turned else J[:, :, 0]
        close(found, jax.vmap(lambda g, name=layer.name: plan.matrices(g)[name])(want))
    close(
        {name: r.g[:, 0, 0, 0, 0] for name, r in records.rest.items()},
        {n: want[n].reshape(2, -1)[:, 0] for n in records.rest},
    )
    for name, record in records.own.items():
        close(record.examples()[0, :, 0], plan.matrices(jax.tree.map(lambda g: g[0], want))[name])


def test_a_batch_of_one_whose_examples_meet_says_what_to_do():
    def apply(p, x):
        h = with_token(p, x)
        return h - h.mean(0)

    x = normal((7, 3, 4), seed=1)
    params = dict(zip("qkvoc", normal(*[(4, 4)] * 4, (1, 1, 4)), strict=True))
    plan = kj.plan(apply, params, x)
    with pytest.raises(ValueError, match="leave such a batch out, or give it 2 examples"):
        kj.capture(plan, params, x[:1])


def test_a_smaller_batch_of_products_in_another_order():
    """Of three factors einsum multiplies first what is smaller."""

    def apply(p, x):
        return jnp.einsum("bi,ij,jk->bk", jnp.tanh(x @ p["v"]), p["w"], jnp.arange(8.0).reshape(4, 2))

    x = normal((12, 4), seed=1)
    params = {"v": normal((4, 4), seed=2), "w": normal((4, 4))}
    plan = kj.plan(apply, params, x, strict=True)
    captured = kj.capture(plan, params, x[:2])
    assert captured.prediction.shape == (2, 2)
    records = captured.records(jnp.ones((1, 2, 2)), 2.0, fisher=kf.monte_carlo)
    want = plan.matrices(jax.grad(lambda p: jnp.sum(apply(p, x[:2])))(params))
    for name, record in records.items():
        close(record.examples().sum((0, 2))[0], want[name][0])
    assert records["v"].batch == 2
    with pytest.raises(ValueError, match="at 12 examples it has other layers than at 2, as an einsum"):
        kj.capture(kj.plan(apply, params, x[:2]), params, x)
