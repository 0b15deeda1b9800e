"""What no gradient of the prediction goes through: auxiliary results, stop_gradient, comparisons, prints. The oracle is
the same function with stop_gradient on the parameters there, where nothing of them can be followed."""

from __future__ import annotations

from functools import partial
from itertools import product

import numpy as np
import pytest

import kfaccore as kf
from jax_checks import close, examples, reference
from jax_models import FAST, normal
from jax_needed import jax, jnp, kj, optax

stop = jax.lax.stop_gradient
P = dict(zip(("w", "u", "b", "v"), normal((4, 5), (5, 5), (5,), (5, 3)), strict=True))
LEAVES = {name: P[name] for name in "wbv"}
X, Z = normal((8, 4), (8, 4), seed=2)
METHODS = [kf.KFAC(), kf.KFAC(sharing=kf.reduce), kf.EKFAC()]


def net(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]


def cell(p, h, x):
    return jnp.tanh(x @ p["w"] + h @ p["u"] + p["b"])


def unrolled(p, h, turns, x):
    return jax.lax.scan(lambda h, t: (cell(p, h, x * (1 + t)),) * 2, h, jnp.arange(turns))


def bootstrapped(p, q, x, z):
    return net(p, x) - 0.9 * stop(net(q, z))


def chosen(p, q, x, z):
    return net(p, x) + jax.nn.one_hot(net(q, z).argmax(-1), 3)


def compared(p, q, x, z):
    return net(p, x) * (net(q, z) > 0)


def rounded(p, q, x, z):
    return net(p, x) + jnp.round(net(q, z))


def beside(p, q, x, z):
    return net(p, x), net(q, z)


def jitted(p, q, x, z):
    return jax.jit(lambda p, q: (net(p, x), net(q, z)))(p, q)


def checkpointed(p, q, x, z):
    f, _ = jax.checkpoint(lambda p, q: (net(p, x), net(q, z)))(p, q)
    return f


def burnt_in(p, q, x, z):
    h = stop(unrolled(q, jnp.zeros((len(x), 5)), 4, z)[0])
    _, after = unrolled(p, h, 3, x)
    return jnp.swapaxes(after, 0, 1) @ p["v"]


def recycled(p, q, x, z):
    h = jax.lax.fori_loop(0, 3, lambda i, h: stop(cell(q, h, z)), jnp.zeros((len(x), 5)))
    return cell(p, h, x) @ p["v"]


def carried_along(p, q, x, z):
    """A scan whose second carry goes into itself alone."""

    def turn(carry, t):
        h, other = carry
        return (cell(p, h, x * (1 + t)), cell(q, other, z)), None

    (h, _), _ = jax.lax.scan(turn, (jnp.zeros((len(x), 5)), jnp.zeros((len(x), 5))), jnp.arange(3))
    return h @ p["v"]


RECURRENT = [burnt_in, recycled, carried_along]
BEHIND = [bootstrapped, chosen, compared, rounded, beside, jitted, checkpointed, *RECURRENT]


def direction(apply, start, method):
    aux = isinstance(jax.eval_shape(apply, start, X, Z), tuple)
    plan = kj.plan(apply, start, X, Z, batched=(0, 1), has_aux=aux, strict=True)
    tx = kj.kfac(plan, method)

    @partial(jax.jit, compiler_options=FAST)
    def step(params):
        captured = kj.capture(plan, params, X, Z)
        f = captured.prediction
        records = captured.records(kf.type2(kf.Gaussian(), f), len(X), fisher=kf.type2)
        return tx.update(captured.gradients(jnp.tanh(f) / len(X)), tx.init(params), params, records=records)[0]

    return step(start)


@pytest.mark.parametrize(
    ("model", "method"),
    [(model, METHODS[0]) for model in BEHIND] + list(product((bootstrapped, checkpointed, burnt_in), METHODS[1:])),
    ids=lambda given: getattr(given, "__name__", type(given).__name__),
)
def test_rows_that_no_gradient_reaches_do_not_count(model, method):
    start = P if model in RECURRENT else LEAVES
    got = direction(lambda p, x, z: model(p, p, x, z), start, method)
    want = direction(lambda p, x, z: model(p, stop(p), x, z), start, method)
    for name in start:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-11, atol=1e-13)


def hidden(p, x):
    return jnp.tanh(x @ p["w"] + p["b"])


def printed(p, x):
    jax.debug.print("{} {}", p["b"], p["w"].mean())
    return net(p, x)


SEEN = {
    "norm": lambda p, x: (net(p, x), optax.tree.norm(p)),
    "median": lambda p, x: (net(p, x), jnp.median(hidden(p, x))),
    "first": lambda p, x: (net(p, x), hidden(p, x)[0]),
    "best": lambda p, x: (lambda f: (f, jax.lax.top_k(f[:, 0], 3)))(net(p, x)),
    "other_batch": lambda p, x: (net(p, x), net(p, jnp.ones((3, 4)))),
    "joined": lambda p, x: (lambda f: (f, f.T.reshape(-1)))(net(p, x)),
    "printed": printed,
    "straight_through": lambda p, x: net({**p, "w": p["w"] + stop(jnp.round(p["w"]) - p["w"])}, x),
    "over_its_norm": lambda p, x: net({**p, "w": p["w"] / stop(jnp.linalg.norm(p["w"]))}, x),
}


@pytest.mark.parametrize("name", SEEN)
def test_what_looks_at_a_leaf_takes_no_layer_away(name):
    apply = SEEN[name]
    aux = isinstance(jax.eval_shape(apply, LEAVES, X), tuple)
    plan = kj.plan(apply, LEAVES, X, has_aux=aux)
    alone = kj.plan(net, LEAVES, X)
    assert plan.uncovered == ()
    assert {row.leaf: row.kind for row in plan.table} == {row.leaf: row.kind for row in alone.table}


@pytest.mark.parametrize("name", [name for name in SEEN if name not in ("straight_through", "over_its_norm")])
def test_and_its_records_are_those_of_the_model_alone(name):
    def records(apply, aux):
        captured = kj.capture(kj.plan(apply, LEAVES, X, has_aux=aux), LEAVES, X)
        return captured.records(kf.type2(kf.Gaussian(), captured.prediction), len(X))

    found = records(SEEN[name], name != "printed")
    for layer, record in records(net, False).items():
        np.testing.assert_array_equal(kf.dense(found[layer])[0], kf.dense(record)[0])


K = normal((4, 5), seed=3)
ADDED = {
    "sum": lambda p, x: jnp.tanh(x @ (p["w"] + K)) @ p["v"],
    "difference": lambda p, x: jnp.tanh(x @ (K - p["w"])) @ p["v"],
    "turned": lambda p, x: jnp.tanh(x @ (2 * p["w"] - K).T.T) @ p["v"],
}


@pytest.mark.parametrize("name", ADDED)
def test_arrays_added_to_a_leaf_are_seen_through(name):
    apply = ADDED[name]
    params = {key: P[key] for key in "wv"}
    plan = kj.plan(apply, params, X, strict=True)
    draws = normal((2, len(X), 3), seed=4)
    records = kj.capture(plan, params, X).records(draws, len(X))
    close(examples(plan, params, records), reference(apply, params, draws, X))
    assert {row.leaf: row.kind for row in plan.table} == {"w": "dense", "v": "dense"}


FUNCTIONS = [lambda w: jnp.tanh(w + K).T.T, jax.nn.softmax]


@pytest.mark.parametrize("function", FUNCTIONS, ids=["tanh", "softmax"])
def test_a_function_of_a_leaf_and_an_array_is_of_all_examples(function):
    plan = kj.plan(lambda p, x: jnp.tanh(x @ function(p["w"])) @ p["v"], {key: P[key] for key in "wv"}, X)
    assert plan.uncovered == ()
    assert [call.batch for call in plan.calls.values() if call.kind == "bias"] == [None]
