"""Predictions whose first axis is not the batch: positions joined to it are followed, anything else is refused."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from jax_models import normal
from jax_needed import jax, jnp, kj, optax

X = normal((6, 5, 4), seed=2)
PARAMS = {"w": normal((4, 5)), "v": normal((5, 3), seed=1), "log_t": jnp.zeros(())}
LOSS = kf.SoftmaxCrossEntropy()


def deep(p, x):
    """(batch, positions, 3), each position with those before it; a leaf without a layer."""
    return jnp.cumsum(jnp.tanh(x @ p["w"]), 1) @ p["v"] * jnp.exp(p["log_t"])


def flat(p, x):
    return deep(p, x).reshape(-1, 3)


@pytest.mark.parametrize("fisher", [kf.monte_carlo, kf.empirical])
def test_positions_joined_to_the_batch_are_rows_of_their_examples(fisher):
    found = []
    for apply in (deep, flat):
        captured = kj.capture(kj.plan(apply, PARAMS, X), PARAMS, X)
        f = captured.prediction
        rest = jnp.full((1, *f.shape[:-1]), 0.3) if fisher is kf.monte_carlo else jnp.zeros(f.shape[:-1], int)
        records = captured.records(fisher(LOSS, f, rest), 30.0, fisher=fisher)
        assert records["w"].g.shape == (1, 1, 6, 5, 5)
        found.append({name: record.g for name, record in {**records, **records.rest}.items()})
    for name, g in found[0].items():
        np.testing.assert_allclose(found[1][name], g, rtol=1e-11, atol=1e-13)


def test_columns_of_joined_positions_have_a_sign_a_row():
    captured = kj.capture(kj.plan(flat, PARAMS, X), PARAMS, X)
    columns = kf.type2(LOSS, captured.prediction)
    records = captured.records(columns, 30.0, fisher=kf.type2)
    signs = records["v"].g.reshape(3, 30, 3) / columns
    np.testing.assert_allclose(jnp.abs(signs), 1.0, rtol=1e-12)
    np.testing.assert_allclose(signs, signs[..., :1] * jnp.ones(3), rtol=1e-12)
    by_example = signs[..., 0].reshape(3, 6, 5)
    assert not bool(jnp.any(jnp.all(by_example == by_example[..., :1], 2).all(0)))
    want = jax.vmap(jax.grad(lambda p, d: jnp.vdot(flat(p, X), d)), (None, 0))(PARAMS, columns * signs)
    np.testing.assert_allclose(records["w"].examples().sum((1, 2)), want["w"].mT, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(records.rest["log_t"].g.reshape(3), want["log_t"], rtol=1e-10, atol=1e-12)
    with pytest.warns(UserWarning, match="say fisher=kfaccore.type2"):
        captured.records(columns, 30.0)


REFUSED = {
    "positions first": (lambda p, x: deep(p, x).swapaxes(0, 1), r"shape \(5, 6, 3\) for 6 examples and \(5, 12, 3\)"),
    "as many positions": (lambda p, x: (x[:, :1] @ x.mT[..., :1] + deep(p, x)).swapaxes(0, 1), "examples on its first"),
    "the mean": (lambda p, x: deep(p, x).mean(), r"no mean over the batch"),
    "compared with each other": (lambda p, x: deep(p, x)[:, 0] @ deep(p, x)[:, 0].T, r"embeddings, and pull draws"),
    "joined behind": (lambda p, x: deep(p, x).swapaxes(0, 1).reshape(-1, 3), "whose rows they are cannot be seen"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_predictions_are_refused(name):
    apply, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        kj.plan(apply, PARAMS, X)


def test_a_step_hands_out_what_the_model_gives_beside_its_prediction():
    def apply(p, x, mean):
        h = deep(p, x)
        return h, 0.9 * mean + 0.1 * h.mean()

    plan = kj.plan(apply, PARAMS, X, 0.5, has_aux=True)
    step = kj.step(plan, LOSS, optax.chain(kj.kfac(plan), optax.sgd(0.1)))
    params = jax.tree.map(jnp.copy, PARAMS)
    batch = X, 0.5, jnp.zeros((6, 5), int)
    params, _, metrics = step(params, step.init(params), batch, jax.random.key(0))
    np.testing.assert_allclose(metrics["aux"], apply(PARAMS, X, 0.5)[1], rtol=1e-12)


def test_draws_of_another_shape_are_refused():
    captured = kj.capture(kj.plan(deep, PARAMS, X), PARAMS, X)
    with pytest.raises(ValueError, match=r"need \(draws, \*shape\)"):
        captured.records(captured.prediction, 30.0)
