"""Batches of views that a model lays one behind the other, `jnp.concatenate([a, b])`: whose rows are whose, against one
example at a time and against the views encoded one by one."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

import kfaccore as kf
from jax_checks import close, examples, reference
from jax_models import normal
from jax_needed import jax, jnp, kj, lax

N = 6
A, B, C = normal((N, 4), (N, 4), (N, 4), seed=3)
NAMES = ("w1", "b1", "w2", "b2", "w3", "first", "w", "b")
SHAPES = ((4, 5), (5,), (5, 5), (5,), (5, 3), (4,), (2, 5, 5), (2, 5))
LAYERS = dict(zip(NAMES, normal(*SHAPES, seed=4), strict=True))
TIMES = normal((N, 3, 4), seed=5)
IMAGES = normal((N, 5, 5, 2), (N, 5, 5, 2), seed=6)


def encode(p, x):
    return jnp.tanh(jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]) @ p["w3"]


def halves(z):
    return z[: len(z) // 2], z[len(z) // 2 :]


def deep(p, x):
    """Layers of a scan, each with the views that its carry has."""

    def turn(h, w):
        return jnp.tanh(h @ w[0] + w[1] + h), None

    h = lax.scan(turn, jnp.tanh(x @ p["w1"] + p["b1"]), (p["w"], p["b"]))[0]
    return h @ p["w3"]


def recurrent(p, x):
    """Steps of a scan from a state of zeros, (time, views and examples, d)."""

    def turn(h, x):
        h = jnp.tanh(x @ p["w1"] + p["b1"] + h @ p["w2"] + p["b2"])
        return h, h

    return lax.scan(turn, jnp.zeros((x.shape[1], 5)), x)[1].sum(0) @ p["w3"]


def sim(z, y):
    return z * y / (1.0 + (z**2).sum(-1, keepdims=True))


JOINED = {
    "sliced": lambda p, a, b: sim(*halves(encode(p, jnp.concatenate([a, b])))),
    "split": lambda p, a, b: sim(*jnp.split(encode(p, jnp.concatenate([a, b])), 2)),
    "reshaped": lambda p, a, b: sim(*encode(p, jnp.concatenate([a, b])).reshape(2, -1, 3)),
    "stacked": lambda p, a, b: sim(*encode(p, jnp.stack([a, b]).reshape(-1, 4)).reshape(2, -1, 3)),
    "tiled": lambda p, a, b: sim(*halves(encode(p, jnp.tile(a * b, (2, 1)) + jnp.concatenate([a, b])))),
    "vstack under jit": lambda p, a, b: jax.jit(lambda x: sim(*halves(jax.jit(partial(encode, p))(x))))(
        jnp.vstack([a, b])
    ),
    "checkpointed": lambda p, a, b: sim(*halves(jax.checkpoint(encode)(p, jnp.concatenate([a, b])))),
    "in a scan of layers": lambda p, a, b: sim(*halves(deep(p, jnp.concatenate([a, b])))),
    "in a scan of time": lambda p, a, b: sim(
        *halves(recurrent(p, jnp.stack([jnp.concatenate([a, b]), jnp.concatenate([a * b, a])])))
    ),
    "negative": lambda p, a, b: sim(*(lambda z: (z[: -len(a)], z[-len(a) :]))(encode(p, jnp.concatenate([a, b])))),
    "target": lambda p, a, b: (lambda z, y: z - lax.stop_gradient(y))(*halves(encode(p, jnp.concatenate([a, b])))),
    "two and one": lambda p, a, b: sim(
        *(lambda z: (z[: 2 * len(a)].reshape(2, -1, 3).sum(0), z[2 * len(a) :]))(
            encode(p, jnp.concatenate([jnp.concatenate([a, b]), a * b]))
        )
    ),
    "one a call beside": lambda p, a, b: sim(*halves(encode(p, jnp.concatenate([a, b])))) + encode(p, a * b),
    "with a first row": lambda p, a, b: sim(
        *halves(
            encode(
                p,
                jnp.concatenate(
                    [jnp.broadcast_to(p["first"], (2 * len(a), 1, 4)), jnp.concatenate([a, b])[:, None]], 1
                ),
            ).sum(1)
        )
    ),
}


def rows_are_their_examples(apply, layers, a, b, draws):
    """All layers are covered, and each example's rows are those of its own loss."""
    plan = kj.plan(apply, layers, a, b, batched=(0, 1))
    assert all(row.covered or row.reason == "never used" for row in plan.table), str(plan)
    assert all(layer.own for layer in plan.layers)
    g = normal((draws, N, 3), seed=7)

    @jax.jit
    def found(params, a, b):
        records = kj.capture(plan, params, a, b).records(g, N)
        return examples(plan, params, records), reference(apply, params, g, a, b)

    close(*found(layers, a, b), tolerance=1e-12)


@pytest.mark.parametrize("name", JOINED)
def test_rows_of_joined_views_are_their_examples(name):
    def apply(p, a, b):
        return JOINED[name](p, a, b)

    rows_are_their_examples(apply, LAYERS, A, B, draws=2)


def test_the_factors_and_directions_are_those_of_views_stacked_behind_the_examples():
    """For each way to fill g, at another batch size than planned with too, a batch of one example among them."""

    def apart(p, a, b):
        z = encode(p, jnp.stack([a, b], 1).reshape(-1, 4)).reshape(-1, 2, 3)
        return sim(z[:, 0], z[:, 1])

    params = {name: LAYERS[name] for name in NAMES[:5]}
    loss = kf.SoftmaxCrossEntropy()
    noise = kf.draw_noise(loss, (N, 3), 2, np.random.default_rng(8))
    fills = {
        kf.type2: lambda f, y: kf.type2(loss, f, y),
        kf.empirical: lambda f, y: kf.empirical(loss, f, y),
        kf.monte_carlo: lambda f, y: kf.monte_carlo(loss, f, jnp.asarray(noise[:, : len(f)]), y),
    }
    plans = [kj.plan(f, params, A, B, batched=(0, 1), strict=True) for f in (JOINED["sliced"], apart)]
    target = jnp.arange(N) % 3

    def directions(plan, fill, a, b):
        captured = kj.capture(plan, params, a, b)
        records = captured.records(fills[fill](captured.prediction, target[: len(a)]), len(a), fisher=fill)
        tx = kj.kfac(plan, kf.KFAC(), schedules=kf.Schedules(1e-2, 0.9))
        grads = captured.gradients(captured.prediction)
        moves, _ = tx.update(grads, tx.init(params), params, records=records)
        rows = {name: (record.a, record.g) for name, record in records.items()}
        return rows, moves

    for fill, count in zip(fills, (N, 5, 1), strict=True):
        found = jax.jit(lambda a, b, fill=fill: [directions(plan, fill, a, b) for plan in plans])
        close(*found(A[:count], B[:count]), tolerance=1e-12)


def convolved(p, x):
    h = lax.conv_general_dilated(x, p["k"], (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")) + p["b1"]
    h = lax.conv_general_dilated(jnp.tanh(h), p["g"], (1, 1), "VALID", (1, 1), (2, 1), ("NHWC", "HWIO", "NHWC"))
    return jnp.tanh(h).mean((1, 2)) @ p["w3"]


def looked_up(p, ids):
    return jnp.tanh(p["table"][ids] * p["b1"] + p["b2"]).mean(1) @ p["w3"]


def attending(p, x):
    h = jnp.tanh(x @ p["w1"] + p["b1"])
    weights = jax.nn.softmax(jnp.einsum("bsd,btd->bst", h @ p["w2"], h))
    keep = jnp.zeros(h.shape[:2], int).at[:, 1].set(1)
    return jnp.where(keep[..., None], 0.0, weights @ h).reshape(-1, 5)


WIDE = dict(zip(("k", "g", "table"), normal((3, 3, 2, 5), (2, 2, 5, 5), (7, 5), seed=9), strict=True)) | LAYERS
IDS = (np.arange(N * 3).reshape(N, 3) * 5 % 7, np.arange(N * 3).reshape(N, 3) * 3 % 7)
RICH = {
    "images": (lambda p, a, b: sim(*halves(convolved(p, jnp.concatenate([a, b])))), IMAGES),
    "words": (lambda p, a, b: sim(*halves(looked_up(p, jnp.concatenate([a, b])))), IDS),
    "attention": (
        lambda p, a, b: sim(*halves((attending(p, jnp.concatenate([a, b])) @ p["w3"]).reshape(-1, 3, 3).sum(1))),
        (TIMES, TIMES[::-1]),
    ),
    "time before the examples": (
        lambda p, a, b: sim(*(encode(p, x.swapaxes(0, 1).reshape(-1, 4)).reshape(3, -1, 3).sum(0) for x in (a, b))),
        (TIMES, TIMES[::-1]),
    ),
}


@pytest.mark.parametrize("name", RICH)
def test_convolutions_tables_and_positions_of_joined_views(name):
    apply, (a, b) = RICH[name]
    rows_are_their_examples(apply, WIDE, a, b, draws=1)


LEFT_OUT = {  # what is no join or cut of whole batches, and the primitive that is named
    "a ragged cut": (lambda z, n: z[1 : n + 1] + z[n - 1 : -1], "slice"),
    "every second row": (lambda z, n: z[::2] + z[1::2], "slice"),
    "rolled": (lambda z, n: sim(*halves(jnp.roll(z, 1, 0))), "slice"),
    "flipped": (lambda z, n: sim(*halves(z[::-1])), "rev"),
    "one flipped": (lambda z, n: z[:n] * z[n:][::-1], "rev"),
    "shuffled": (lambda z, n: sim(*halves(z[jnp.argsort(z[:, 0])])), "gather"),
    "pairs of rows": (lambda z, n: z.reshape(-1, 2, z.shape[1]).sum(1), "reshape"),
    "against rows twice each": (lambda z, n: sim(*halves(z + jnp.repeat(z[:n], 2, 0))), "add"),
    "against every other row": (lambda z, n: sim(*halves(jax.nn.softmax(z @ z.T) @ z)), "dot_general"),
    "chosen in a branch": (
        lambda z, n: lax.cond(z[0, 0] > 9, lambda z: z[:n], lambda z: z.reshape(n, 2, -1)[:, 0], z),
        "slice",
    ),
    "carried on in a scan": (
        lambda z, n: sim(*halves(lax.scan(lambda h, _: (jnp.repeat(h[:n], 2, 0), h), z, None, length=2)[0])),
        "slice",
    ),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_other_cuts_of_joined_views_are_refused(name):
    cut, primitive = LEFT_OUT[name]

    def apply(p, a, b):
        return cut(jnp.tanh(jnp.concatenate([a, b]) @ p["w1"]), len(a)) @ p["w3"]

    table = kj.plan(apply, {name: LAYERS[name] for name in ("w1", "w3")}, A, B, batched=(0, 1)).table
    assert table[0].reason == f"goes into: dense on examples that {primitive} moves along the batch"
    assert not table[1].covered


def normed(z):
    return (z - z.mean(0)) / jnp.sqrt(z.var(0) + 0.1)


def test_moments_of_joined_views_mix_what_comes_before_them():
    """As of each view by itself: a layer before BatchNorm is the whole batch's, one after it each example's."""

    def joined(norm, p, a, b):
        z = jnp.tanh(norm(jnp.concatenate([a, b]) @ p["w1"])) @ p["w3"]
        return sim(*halves(z))

    def apart(p, a, b):
        z, y = jnp.split(normed(jnp.concatenate([a @ p["w1"], b @ p["w1"]])), 2)
        return sim(jnp.tanh(z) @ p["w3"], jnp.tanh(y) @ p["w3"])

    params = {name: LAYERS[name] for name in ("w1", "w3")}
    draws = normal((2, N, 3), seed=7)

    @partial(jax.jit, static_argnums=0)
    def found(apply, params):
        plan = kj.plan(apply, params, A, B, batched=(0, 1), strict=True)
        assert {layer.name: layer.mixed for layer in plan.layers} == {"w1": True, "w3": False}
        records = kj.capture(plan, params, A, B).records(draws, N, fisher=kf.monte_carlo)
        return {name: (record.a, record.g) for name, record in records.items()}

    close(found(partial(joined, normed), params), found(apart, params), 1e-12)
    plan = kj.plan(partial(joined, lambda z: z - lax.stop_gradient(z.mean(0))), params, A, B, batched=(0, 1))
    assert all(layer.own for layer in plan.layers)


def test_a_prediction_of_joined_views_is_refused():
    """Of words too, where no gradient goes through the join."""
    for apply, table, (a, b) in (
        (lambda p, a, b: jnp.concatenate([a, b]) @ p, LAYERS["w1"], (A, B)),
        (lambda p, a, b: p[jnp.concatenate([a, b])[:, 0]], WIDE["table"], IDS),
    ):
        with pytest.raises(ValueError, match=r"shape \(12, 5\) for 6 examples, and the model joins the batch axis"):
            kj.plan(apply, table, a, b, batched=(0, 1))


def test_words_in_the_order_of_time_are_their_examples():
    def apply(p, ids):
        return (p["table"][ids.T.reshape(-1)] @ p["w"]).reshape(ids.shape[1], -1, 3).sum(0)

    params = {"table": WIDE["table"], "w": LAYERS["w3"]}
    plan = kj.plan(apply, params, IDS[0], strict=True)
    draws = normal((1, N, 3), seed=7)

    @jax.jit
    def found(params, ids):
        records = kj.capture(plan, params, ids).records(draws, N)
        return examples(plan, params, records), reference(apply, params, draws, ids)

    close(*found(params, IDS[0]), tolerance=1e-12)


def test_what_stands_behind_a_reshape_across_examples_is_marked():
    def apply(p, x):
        z = jnp.tanh(x.reshape(-1, 4) @ p["w1"]).reshape(3, -1, 5)  # rows of time as if they were examples
        return jnp.tanh(z @ p["w2"]).sum(0)

    def after(p, a, b):
        return apply(p, jnp.concatenate([a, b]).reshape(2, -1, 3, 4).sum(0))

    params = {name: LAYERS[name] for name in ("w1", "w2")}
    for plan in (kj.plan(apply, params, TIMES), kj.plan(after, params, TIMES, TIMES, batched=(0, 1))):
        assert all(layer.mixed for layer in plan.layers)


def test_a_capture_of_other_shapes_is_refused():
    """How many batches lie behind each other goes by the shapes."""

    def apply(p, x):
        return (x.swapaxes(0, 1).reshape(-1, 4) @ p).reshape(x.shape[1], -1, 5).sum(0)

    plan = kj.plan(apply, LAYERS["w1"], TIMES)
    captured = kj.capture(plan, LAYERS["w1"], TIMES[:2])
    assert captured.records(jnp.ones((1, 2, 5)), 2)["params"].a.shape == (1, 2, 3, 4)
    with pytest.raises(
        ValueError, match=r"several batches along one axis. Of what apply takes, argument 0 .* \(4, 4\)"
    ):
        kj.capture(plan, LAYERS["w1"], np.ones((N, 4, 4)))


@pytest.mark.parametrize("turned", [lambda x: x, jnp.flip], ids=["in order", "backwards"])
def test_a_mask_of_steps_of_time_before_the_examples(turned):
    """Its rows are those of the model that has the examples first, so that padding changes nothing."""

    def apply(p, x, m):
        z = jnp.tanh(x.swapaxes(0, 1).reshape(-1, 4) @ p["w1"])
        return ((z @ p["w2"]).reshape(x.shape[1], -1, 5) * m.T[..., None]).sum(0)

    def plain(p, x, m):
        return ((jnp.tanh(x @ p["w1"]) @ p["w2"]) * m[..., None]).sum(1)

    params = {name: LAYERS[name] for name in ("w1", "w2")}
    mask = turned(jnp.arange(3) < 1 + jnp.arange(N)[:, None] % 3)
    draws = normal((1, N, 5), seed=7)
    found = []
    for model in (apply, plain):
        plan = kj.plan(model, params, TIMES, mask * 1.0, batched=(0, 1))
        found.append(kj.capture(plan, params, TIMES, mask * 1.0).records(draws, N, fisher=kf.monte_carlo, mask=mask))
    for name, record in found[0].items():
        np.testing.assert_array_equal(record.mask, mask)
        for got, want in zip(jax.tree.leaves(record), jax.tree.leaves(found[1][name]), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)


def test_a_mask_of_joined_views_is_asked_for():
    """It may mean one view or all."""
    plan = kj.plan(lambda p, x: sum(halves(jnp.concatenate([x, -x]) @ p)).sum(1), LAYERS["w1"], TIMES)
    captured = kj.capture(plan, LAYERS["w1"], TIMES)
    with pytest.raises(ValueError, match=r"layer 'params' has rows of shape \(2, 3\) an .* joins several batches"):
        captured.records(jnp.ones((1, N, 5)), N, mask=jnp.ones((N, 3), bool))
    mask = jnp.arange(6) < jnp.arange(N)[:, None]
    assert captured.records(jnp.ones((1, N, 5)), N, mask={"params": mask})["params"].mask.shape == (N, 6)
