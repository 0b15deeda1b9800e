"""Rows that other examples' outputs depend on are told from those that are one example's own, before a run."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

import kfaccore as kf
from jax_models import FAST, mlp, mlp_params, normal
from jax_needed import jax, jnp, kj, lax, optax
from jax_shared import MODELS
from kfaccore_jax.signs import signed

X = normal((6, 5), seed=2)


def norm(y, axes, stop=False):
    centre = y.mean(axes, keepdims=True)
    scale = ((y - centre) ** 2).mean(axes, keepdims=True) + 0.1
    if stop:
        centre = lax.stop_gradient(centre)
        scale = lax.stop_gradient(scale)
    return (y - centre) / jnp.sqrt(scale)


def between(function):
    """Two layers with something of the hidden units between them."""
    return lambda p, x: function(jnp.tanh(x @ p[0][0] + p[0][1])) @ p[1][0] + p[1][1]


def looped(h):
    """Each turn sees the batch's mean of the turn before."""

    def turn(carry, _):
        return h + carry.mean(0), carry

    return lax.scan(turn, jnp.zeros_like(h), None, length=3)[1][-1]


def chosen(h):
    return lax.cond(h[0, 0] > 2.0, lambda h: h, lambda h: h - h.mean(0), h)


def each(function):
    """Example by example under vmap, which gives the batch a name."""
    return jax.vmap(function, axis_name="batch")


def remembered(h):
    return h - lax.dynamic_update_slice(jnp.zeros((40, h.shape[1])), h, (0, 0)).sum(0) / len(h)


def over_channels(h):
    spec = ("NCW", "OIW", "NCW")
    mean = lax.conv_general_dilated(h.T[:, :, None], jnp.ones((1, len(h), 1)) / len(h), (1,), "VALID", None, None, spec)
    return h - mean[:, 0, 0]


def own_kernels(h):
    """A convolution an example: groups of channels under vmap."""
    image = h.reshape(len(h), 1, 1, -1)
    kernel = jnp.ones((1, 1, 2)) * h[:, :1, None, None]
    convolved = jax.vmap(lambda x, k: lax.conv_general_dilated(x, k, (1,), "SAME"))(image, kernel)
    return convolved.reshape(h.shape)


def written_to_itself(h):
    """Under vmap a scatter whose operand, places and updates are all each example's."""
    place = jnp.arange(len(h)) % 2
    return jax.vmap(lambda row, i: row.at[i].multiply(row[3]))(h, place)


def from_first_state(cell, after=lambda h: h):
    """A vector that is learned, a row an example of it, goes into a scan."""

    def apply(p, x):
        seen = x @ p[0][0]
        start = jnp.broadcast_to(p[0][1], seen.shape)
        h = lax.scan(lambda h, _: (jnp.tanh(seen + cell(h)), None), start, None, length=2)[0]
        return after(h) @ p[1][0] + p[1][1]

    return apply


@jax.custom_jvp
def centred_by_rule(h):
    return h - h.mean(0)


centred_by_rule.defjvp(lambda h, moves: jax.jvp(lambda h: h - h.mean(0), h, moves))


PLAIN = {
    "batch norm": between(partial(norm, axes=(0,))),
    "under checkpoint and jit": between(jax.jit(jax.checkpoint(partial(norm, axes=(0,))))),
    "moments that carry no gradient": between(partial(norm, axes=(0,), stop=True)),
    "layer norm": between(partial(norm, axes=(1,))),
    "largest of the batch": between(lambda h: h / h.max(0)),
    "contrast": between(lambda h: h + jax.nn.softmax(h @ h.T) @ h),
    "a sum written as a product": between(lambda h: h - jnp.ones((1, len(h))) @ h / len(h)),
    "a mean of the result": lambda p, x: mlp(p, x) - mlp(p, x).mean(0),
    "a mean through a scan": between(looped),
    "a mean in one branch": between(chosen),
    "a named mean": between(each(lambda h: h - lax.pmean(h, "batch"))),
    "a memory": between(remembered),
    "a sum over channels": between(over_channels),
    "a sum by its own function": between(lambda h: h - lax.reduce(h, 0.0, lambda a, b: a + 1.0 * b, (0,)) / len(h)),
    "of each example, by name": between(each(lambda h: h - lax.pmean(h.mean(), ()))),
    "a convolution an example": between(own_kernels),
    "places of each example": between(written_to_itself),
    "products of each example": between(
        lambda h: jnp.einsum("bi,bij->bj", h, jnp.cumsum(h[:, :, None] * h[:, None], 1))
    ),
    "solved for each example": between(
        lambda h: jnp.linalg.solve(jnp.eye(4) + h[:, :, None] * h[:, None], h[..., None])[..., 0]
    ),
    "a first state before a batch norm": from_first_state(lambda h: 0.5 * h, partial(norm, axes=(0,))),
    "a first state and the batch's mean": from_first_state(lambda h: h - h.mean(0)),
    "a first state alone": from_first_state(lambda h: 0.5 * h),
    "a row of its own under a rule": lambda p, x: mlp(p, x) - centred_by_rule(jnp.broadcast_to(p[1][1], (len(x), 3))),
    "nothing": mlp,
}
KNOWN = [name for name in MODELS if "batch_norm" in name]


def mixing(plan, params, x):
    """{layer: whether a draw of one example alone reaches the row of another}."""

    @jax.jit
    def reached(params, x):
        captured = kj.capture(plan, params, x)
        alone = jnp.zeros((len(x), *captured.prediction.shape))
        alone = alone.at[jnp.arange(len(x)), jnp.arange(len(x))].set(normal(captured.prediction.shape[1:], seed=8))
        records = captured.records(alone, len(x), fisher=kf.monte_carlo)
        return {layer.name: jnp.abs(records[layer.name].g).sum((1, 3, 4)) for layer in plan.layers if not layer.common}

    return {name: bool(np.any(rows * (1 - np.eye(len(x))))) for name, rows in reached(params, x).items()}


@pytest.mark.parametrize("name", [*PLAIN, *KNOWN])
def test_what_is_marked_is_what_a_draw_of_one_example_reaches(name):
    if name in PLAIN:
        apply, params, x = PLAIN[name], mlp_params(), X
    else:
        needs, make = MODELS[name]
        for module in needs:
            pytest.importorskip(module)
        apply, params, x = make()
    plan = kj.plan(apply, params, x)
    assert {layer.name: layer.mixed for layer in plan.layers if not layer.common} == mixing(plan, params, x)
    marked = {row.leaf for row in plan.table if "mix examples" in row.note}
    assert marked == {part.leaf for layer in plan.layers if layer.mixed for part in layer.parts}


def test_statistics_handed_out_beside_the_prediction_mix_nothing():
    def apply(p, x):
        h = jnp.tanh(x @ p[0][0] + p[0][1])
        return h @ p[1][0] + p[1][1], h.mean(0)

    plan = kj.plan(apply, mlp_params(), X, has_aux=True)
    assert not any(layer.mixed for layer in plan.layers)


def test_rows_that_mix_examples_have_signed_draws_and_no_shares_of_their_own():
    params = mlp_params()
    plan = kj.plan(PLAIN["batch norm"], params, X)
    captured = kj.capture(plan, params, X)
    columns = kf.type2(kf.Gaussian(), captured.prediction)
    slope = captured.prediction / 6
    records = captured.records(columns, 6, fisher=kf.type2, cotangent=slope)
    assert set(records.own) == {"1.0"}
    signs = captured.output_gradients(signed(columns, captured.prediction, [X], 6))
    plain = captured.output_gradients(columns)
    first, second = ({layer.name: layer.calls[0] for layer in plan.layers}[name] for name in ("0.0", "1.0"))
    np.testing.assert_allclose(records["0.0"].g[:, 0, :, 0], signs[first], rtol=1e-12)
    np.testing.assert_allclose(records["1.0"].g[:, 0, :, 0], plain[second], rtol=1e-12)


def test_a_step_that_sets_its_rate_takes_layers_before_a_batch_norm_as_they_are():
    params = mlp_params()
    apply = PLAIN["batch norm"]
    plan = kj.plan(apply, params, X)
    tx = optax.chain(kj.kfac(plan, step=kf.SelfTuning()), optax.scale(-1.0))

    def loss(params):
        return 0.5 * jnp.mean(jnp.sum((apply(params, X) - X[:, :3]) ** 2, 1))

    @partial(jax.jit, compiler_options=FAST)
    def step(params, state, noise):
        captured = kj.capture(plan, params, X)
        slope = (captured.prediction - X[:, :3]) / 6
        draws = kf.monte_carlo(kf.Gaussian(), captured.prediction, noise)
        records = captured.records(draws, 6, fisher=kf.monte_carlo, cotangent=slope)
        value = loss(params)
        given = {"records": records, "value": value, "value_fn": loss}
        moves, state = tx.update(captured.gradients(slope), state, params, **given)
        return optax.apply_updates(params, moves), state, value

    state = tx.init(params)
    values = []
    for i in range(8):
        params, state, value = step(params, state, normal((1, 6, 3), seed=i))
        values.append(float(value))
    assert values[-1] < 0.2 * values[0]


PLACES = {
    "an index of literals before": lambda p, x, i: (lambda row: jnp.tanh(x @ p["v"]) @ p["w"] + row)(jnp.eye(4)[i]),
    "leaves joined": lambda p, x, i: x @ jnp.concatenate([p["v"], p["w"]], 1),
    "leaves joined in a scan": lambda p, x, i: lax.scan(
        lambda c, _: (jnp.tanh(c @ jnp.concatenate([p["v"][:, :2], p["w"][:, 2:]], 1)), None), x, None, 2
    )[0],
}


@pytest.mark.parametrize("name", PLACES)
def test_what_stands_behind_an_equation_is_known_of_calls_that_have_other_places(name):
    """Indices that are folded, and products that are done leaf by leaf, are not where the model's jaxpr has them."""
    params = {"v": jnp.ones((4, 4)), "w": jnp.ones((4, 4))}
    x = jnp.ones((6, 4))

    def centred(p, x, i):
        f = PLACES[name](p, x, i)
        return f - f.mean(0)

    assert all(layer.mixed for layer in kj.plan(centred, params, x, 1, strict=True).layers)
    moved = kj.plan(lambda p, x, i: PLACES[name](p, x, i)[::-1], params, x, 1)
    assert [row.reason for row in moved.table] == ["goes into: dense on examples that rev moves along the batch"] * 2
    alone = kj.plan(PLACES[name], params, x, 1, strict=True)
    assert all(layer.own for layer in alone.layers)
