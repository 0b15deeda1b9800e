"""Residuals made by vmapped derivatives of a network: directions that are one for all points meet its first layer, and
slopes that are one for all its last; each point has rows of its own there, as if the whole batch were derived."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

import kfaccore as kf
from jax_checks import close, examples, reference
from jax_models import FAST, normal
from jax_needed import jax, jnp, kj

EYE = np.eye(2)
X = normal((6, 2), seed=1)


def made():
    names = ("w1", "b1", "w2", "b2", "w3", "b3")
    return dict(zip(names, normal((2, 5), (5,), (5, 4), (4,), (4, 1), (1,)), strict=True))


def u(p, x):
    h = jnp.tanh(x @ p["w1"] + p["b1"])
    return (jnp.tanh(h @ p["w2"] + p["b2"]) @ p["w3"] + p["b3"])[..., 0]


def twice(first, second):
    """The second derivative along each axis, by two functions (f, x, direction) -> slope."""
    return lambda f, x: sum(second(lambda y, e=e: first(f, y, e), x, e) for e in EYE)


def forward(f, x, e):
    return jax.jvp(f, (x,), (jnp.asarray(e),))[1]


def backward(f, x, e):
    return jax.grad(f)(x) @ jnp.asarray(e)


def looped(f, x):
    _, along = jax.linearize(jax.grad(f), x)
    return jax.lax.fori_loop(0, 2, lambda i, total: total + along(jnp.eye(2)[i])[i], 0.0)


def by_arguments(f, x):
    g = lambda a, b: f(jnp.stack([a, b]))  # noqa: E731
    return jax.grad(jax.grad(g))(*x) + jax.grad(jax.grad(g, 1), 1)(*x)


LAPLACIANS = {
    "hessian": lambda f, x: jnp.trace(jax.hessian(f)(x)),
    "reverse over forward": lambda f, x: jnp.trace(jax.jacrev(jax.jacfwd(f))(x)),
    "jvp of jvp": twice(forward, forward),
    "jvp of grad": twice(backward, forward),
    "grad of grad by arguments": by_arguments,
    "linearized in a loop": looped,
    "under jit and checkpoint": lambda f, x: jax.jit(lambda x: jnp.trace(jax.hessian(jax.checkpoint(f))(x)))(x),
}


def residual(laplacian, p, x):
    """The value beside it, so that the last layer has rows of both kinds."""
    f = partial(u, p)
    return jnp.stack([jax.vmap(partial(laplacian, f))(x), jax.vmap(f)(x)], 1)


@pytest.mark.parametrize("name", LAPLACIANS)
def test_every_layer_is_covered_and_its_rows_add_up_to_the_gradient(name):
    """Example by example where no layer is used transposed."""
    apply = partial(residual, LAPLACIANS[name])
    params = made()
    plan = kj.plan(apply, params, X, strict=True)
    assert not any(layer.common for layer in plan.layers)
    turned = any(layer.turned for layer in plan.layers)

    @partial(jax.jit, compiler_options=FAST)
    def run(params, x):
        captured = kj.capture(plan, params, x)
        draws = jnp.asarray(np.random.default_rng(7).normal(size=(2, *captured.prediction.shape)))
        records = captured.records(draws, len(x), fisher=kf.monte_carlo)
        if not turned:
            return examples(plan, params, records), reference(apply, params, draws, x)
        totals = {}
        for layer in plan.layers:
            J = records[layer.name].examples()  # a tied layer has its draws among the examples
            split = jnp.moveaxis(J[0].reshape(1, 2, -1, *J.shape[-2:]), 0, 2) if layer.turned else J.swapaxes(1, 2)
            totals[layer.name] = split.sum(1)
        zeros = jax.tree.map(jnp.zeros_like, params)
        got = jax.vmap(lambda one: plan.tree(zeros, one))(totals)
        return got, jax.vmap(lambda draw: jax.grad(lambda p: jnp.vdot(apply(p, x), draw))(params))(draws)

    for x in (X, X[:1]) if name == "hessian" else (X,):
        close(*run(params, x))


def test_the_records_are_those_of_derivatives_of_the_whole_batch():
    """jvp along a direction repeated for all points: each row was a point's own already."""

    def whole(p, x):
        es = [jnp.broadcast_to(jnp.asarray(e), x.shape) for e in EYE]
        slopes = [lambda x, e=e: jax.jvp(partial(u, p), (x,), (e,))[1] for e in es]
        bends = [jax.jvp(slope, (x,), (e,))[1] for slope, e in zip(slopes, es, strict=True)]
        return jnp.stack([sum(bends), u(p, x)], 1)

    params = made()
    vmapped = partial(residual, LAPLACIANS["jvp of jvp"])
    plans = [kj.plan(apply, params, X, strict=True) for apply in (vmapped, whole)]

    @partial(jax.jit, compiler_options=FAST)
    def sums(params):
        found = []
        for plan in plans:
            captured = kj.capture(plan, params, X)
            records = captured.records(kf.type2(kf.Gaussian(), captured.prediction), len(X), fisher=kf.type2)
            rows = {
                name: (r.a.reshape(-1, r.a.shape[-1]), r.g.reshape(-1, r.g.shape[-1])) for name, r in records.items()
            }
            found.append({name: (len(a), a.T @ a, g.T @ g) for name, (a, g) in rows.items()})
        return found

    close(*sums(params))


def test_what_cannot_be_followed_to_the_points_is_named():
    """A point that all others are compared with goes through the whole network."""
    plan = kj.plan(lambda p, x: (u(p, x) - u(p, jnp.zeros(2)))[:, None], made(), X)
    row = next(row for row in plan.table if row.leaf == "w1")
    assert row.reason == "goes into: dense on rows of examples and on rows that all of them share"


VIEWS = {
    "one by one": lambda encode, a, b: (encode(a), encode(b)),
    "stacked in front": lambda encode, a, b: tuple(encode(jnp.stack([a, b]))),
    "stacked behind the examples": lambda encode, a, b: tuple(
        encode(jnp.stack([a, b], 1).reshape(-1, 2)).reshape(-1, 2, 4).swapaxes(0, 1)
    ),
    "one batch behind the other": lambda encode, a, b: tuple(jnp.split(encode(jnp.concatenate([a, b])), 2)),
}


def test_two_views_of_an_example_are_rows_of_it_however_they_are_put_together():
    params = made()
    a, b = normal((6, 2), (6, 2), seed=3)

    def apply(name, p, a, b):
        def encode(x):
            return jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]

        z, y = VIEWS[name](encode, a, b)
        return jnp.abs(z - y)

    @partial(jax.jit, static_argnums=0)
    def found(name, params):
        plan = kj.plan(partial(apply, name), params, a, b, batched=(0, 1))
        captured = kj.capture(plan, params, a, b)
        records = captured.records(kf.type2(kf.Gaussian(), captured.prediction), 6, fisher=kf.type2)
        return {k: (r.examples(), jnp.einsum("kzbsi,kzbsj->ij", r.g, r.g)) for k, r in records.items()}

    want = found("one by one", params)
    for name in list(VIEWS)[1:]:
        close(found(name, params), want)
