"""What a plan must see: other elements of a leaf at other arguments, and rows that outputs of several examples use."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from jax_needed import jax, jnp, kj, lax, optax


def numbers(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


LENGTHS = {
    "added": lambda p, x: (jnp.tanh(x + p["q"][: x.shape[1]]) @ p["w"]).sum(1),
    "multiplied": lambda p, x: (jnp.tanh(x * p["q"][: x.shape[1]]) @ p["w"]).sum(1),
    "einsum": lambda p, x: jnp.einsum("btd,td->b", x, p["q"][: x.shape[1]])[:, None] + x.sum(1) @ p["w"],
}


@pytest.mark.parametrize("apply", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("length", [3, 8])
def test_a_plan_of_another_length_is_refused_where_other_elements_are_used(apply, length):
    params = {"q": numbers(0, 16, 4), "w": numbers(1, 4, 3)}
    plan = kj.plan(apply, params, numbers(2, 6, 4, 4))
    kj.capture(plan, params, numbers(3, 5, 4, 4))
    with pytest.raises(
        ValueError, match=r"runs other layers than when it was planned.* q is used as .* the plan has q"
    ):
        kj.capture(plan, params, numbers(3, 6, length, 4))


def test_a_plan_of_another_length_is_used_where_the_same_elements_are():
    params = {"w": numbers(1, 4, 3)}
    plan = kj.plan(lambda p, x: jnp.tanh(x @ p["w"]).sum(1), params, numbers(2, 6, 4, 4))
    x, draw = numbers(3, 5, 7, 4), numbers(4, 1, 5, 3)
    record = kj.capture(plan, params, x).records(draw, 5.0, fisher=kf.empirical)["w"]
    want = jax.jacrev(lambda p: (jnp.tanh(x @ p["w"]).sum(1) * draw[0]).sum(1))(params)["w"]
    np.testing.assert_allclose(record.examples()[0, 0].mT, want, rtol=1e-12)


def test_a_plan_of_another_leaf_or_geometry_is_refused():
    params = {"image": numbers(0, 4, 5), "text": numbers(1, 4, 5), "head": numbers(2, 5, 3)}

    def apply(p, batch):
        ((name, x),) = batch.items()
        return jnp.tanh(x @ p[name]) @ p["head"]

    plan = kj.plan(apply, params, {"image": numbers(3, 6, 4)})
    with pytest.raises(ValueError, match=r"text is used as dense .* the plan has image"):
        kj.capture(plan, params, {"text": numbers(3, 6, 4)})

    def conv(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, p["k"], (2, 2), "SAME", dimension_numbers=numbers).sum((1, 2))

    kernel = {"k": numbers(4, 3, 3, 2, 3)}
    plan = kj.plan(conv, kernel, numbers(5, 2, 9, 9, 2))
    with pytest.raises(ValueError, match="k is used as conv"):
        kj.capture(plan, kernel, numbers(5, 2, 8, 8, 2))


def running(h):
    def turn(mean, row):
        mean = 0.9 * mean + 0.1 * row
        return mean, row - mean

    return lax.scan(turn, jnp.zeros(5), h)[1]


SUMS = {
    "batch mean": lambda h: h - h.mean(0),
    "ghost norm": lambda h: (h.reshape(-1, 4, 5) - h.reshape(-1, 4, 5).mean(1, keepdims=True)).reshape(-1, 5),
    "deviation of groups": lambda h: h + jnp.tile(h.reshape(2, -1, 5).std(0), (2, 1)),
    "moved by reshape": lambda h: h.reshape(2, -1, 5).swapaxes(0, 1).reshape(-1, 5),
    "pairs": lambda h: (h.reshape(-1, 2, 5) - h.reshape(-1, 2, 5)[:, ::-1]).reshape(-1, 5),
    "running mean": running,
    "segments": lambda h: h - jax.ops.segment_sum(h, jnp.arange(len(h)) % 2, 2)[jnp.arange(len(h)) % 2],
    "written": lambda h: h - jnp.zeros((2, 5)).at[jnp.arange(len(h)) % 2].add(h)[0],
    "window": lambda h: lax.reduce_window(h, 0.0, lax.add, (3, 1), (1, 1), "SAME"),
    "fourier": lambda h: jnp.fft.fft2(h).real,
    "orthogonal": lambda h: jnp.linalg.qr(h)[0] if h.shape[0] >= 5 else h,
}


@pytest.mark.parametrize("mix", SUMS.values(), ids=SUMS)
def test_sums_over_examples_are_marked(mix):
    params = {"w": numbers(0, 4, 5), "v": numbers(1, 5, 3)}
    plan = kj.plan(lambda p, x: mix(jnp.tanh(x @ p["w"])) @ p["v"], params, numbers(2, 8, 4))
    layers = {layer.name: layer for layer in plan.layers}
    assert layers["w"].mixed
    assert not layers["w"].own
    assert "rows that mix examples" in str(plan)


APART = {
    "positions": lambda h: (h.reshape(-1, 2, 5) * 2).reshape(-1, 5),
    "flattened": lambda h: h.reshape(-1, 10).reshape(-1, 5),
    "mapped": lambda h: lax.map(lambda row: 2 * row, h),
    "turned and back": lambda h: (
        (2 * h.reshape(-1, 2, 5).swapaxes(0, 1).reshape(-1, 5)).reshape(2, -1, 5).swapaxes(0, 1)
    ),
    "within": lambda h: (h.reshape(-1, 2, 5) - h.reshape(-1, 2, 5).mean(1, keepdims=True)).reshape(-1, 5),
}


@pytest.mark.parametrize("keep", APART.values(), ids=APART)
def test_what_stays_with_its_example_is_not(keep):
    """Two rows an example: (8 examples, 2, d) as 16 rows."""
    params = {"w": numbers(0, 4, 5), "v": numbers(1, 5, 3)}

    def apply(p, x):
        h = keep(jnp.tanh(x.reshape(-1, 4) @ p["w"]))
        return (h.reshape(-1, 2, 5) @ p["v"]).sum(1)

    plan = kj.plan(apply, params, numbers(2, 8, 2, 4))
    assert not any(layer.mixed for layer in plan.layers)


def test_groups_of_joined_positions_are_seen_as_groups_of_examples():
    """(8 examples, 4, d) as 32 rows in 4 groups, as many as positions: their mean is over several examples."""
    params = {"w": numbers(0, 4, 5), "v": numbers(1, 5, 3)}

    def apply(p, x):
        groups = jnp.tanh(x @ p["w"]).reshape(-1, 5).reshape(4, -1, 5)
        return (groups - groups.mean(0)).reshape(-1, 4, 5) @ p["v"]

    plan = kj.plan(apply, params, numbers(2, 8, 4, 4))
    assert {layer.name: layer.mixed for layer in plan.layers} == {"v": False, "w": True}


@pytest.mark.parametrize(
    "move", [lambda h: lax.top_k(h.T, len(h))[0].T, lambda h: lax.cond(h[0, 0] > 9, lambda z: z, lambda z: z[::-1], h)]
)
def test_moves_by_rank_or_in_a_branch_are_refused_by_name(move):
    params = {"w": numbers(0, 4, 5), "v": numbers(1, 5, 3)}
    plan = kj.plan(lambda p, x: move(jnp.tanh(x @ p["w"])) @ p["v"], params, numbers(2, 8, 4))
    assert "along the batch" in next(row.reason for row in plan.table if row.leaf == "w")


def test_complex_leaves_keep_their_gradient():
    params = {"c": numbers(0, 5, 4) + 1j * numbers(1, 5, 4), "w": numbers(2, 4, 1)}

    def apply(p, x):
        return (x @ p["c"]).real @ p["w"]

    x, slope = numbers(3, 6, 5), numbers(4, 6, 1)
    plan = kj.plan(apply, params, x)
    found = kj.capture(plan, params, x).gradients(slope)
    want = jax.grad(lambda p: (apply(p, x) * slope).sum())(params)
    np.testing.assert_allclose(found["c"], want["c"], rtol=1e-12)


def recurrent(p, x):
    w = p["w"] * jnp.tri(4)
    return lax.scan(lambda h, row: (jnp.tanh(row + h @ w), None), jnp.zeros((len(x), 4)), x.swapaxes(0, 1))[0]


def deep(p, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x[:, 0], p["w"] * jnp.tri(4))[0]


@pytest.mark.parametrize(("apply", "shape"), [(recurrent, (4, 4)), (deep, (2, 4, 4))])
def test_kernels_masked_before_a_scan(apply, shape):
    """One row for all examples, as masked kernels have: the gradient of the batch."""
    params, x, draw = {"w": numbers(0, *shape)}, numbers(1, 6, 3, 4), numbers(2, 1, 6, 4)
    plan = kj.plan(apply, params, x)
    record = kj.capture(plan, params, x).records(draw, 6.0, fisher=kf.monte_carlo)["w"]
    want = jax.grad(lambda p: (apply(p, x) * draw[0]).sum())(params)
    found = plan.tree(params, {"w": record.examples()[0, :, 0]})
    np.testing.assert_allclose(found["w"], want["w"], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("loss", [kf.Bernoulli(), kf.SoftmaxCrossEntropy()])
def test_a_step_draws_labels_of_half_precision_predictions_in_full(loss):
    """Predictions that bfloat16 holds give the same step as they do in float32: noise and sums are as fine."""
    x, target = numbers(0, 600, 4), numbers(1, 600, 3)
    target = jnp.argmax(target, 1) if isinstance(loss, kf.SoftmaxCrossEntropy) else (target > 0).astype(jnp.bfloat16)
    found = []
    for dtype in (jnp.bfloat16, jnp.float32):
        apply = lambda p, x, dtype=dtype: (x @ p["w"]).astype(jnp.bfloat16).astype(dtype)  # noqa: E731
        params = {"w": numbers(2, 4, 3)}
        plan = kj.plan(apply, params, x)
        step = kj.step(plan, loss, optax.chain(kj.kfac(plan), optax.sgd(0.1)))
        found.append(step(params, step.init(params), (x, target), jax.random.key(3)))
    np.testing.assert_array_equal(found[0][2]["loss"], found[1][2]["loss"])
    np.testing.assert_allclose(found[0][0]["w"], found[1][0]["w"], rtol=1e-6)


KERNELS = {
    "masked, with a gain": lambda v, g, mask: v * mask * g,
    "gain first": lambda v, g, mask: g * (mask * v),
    "both masked": lambda v, g, mask: (v * mask) * (g * mask[0]),
    "masked twice": lambda v, g, mask: v * mask * (mask + 1) * g,
    "turned": lambda v, g, mask: (v * mask).T * g,
    "under jit": lambda v, g, mask: jax.jit(lambda w: w * g)(v * mask),
    "added": lambda v, g, mask: v * mask + g * mask[0],
    "divided": lambda v, g, mask: v * mask / jnp.linalg.norm(v, axis=0) * g,
    "through a function": lambda v, g, mask: jnp.tanh(v * mask) * jnp.exp(g * mask[1]),
    "chosen": lambda v, g, mask: jnp.where(mask > 0, v * mask, g),
}


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_kernels_of_several_leaves_and_arrays_are_captured_as_planned(kernel):
    """What is covered is so in the capture too, with the gradient of the batch."""
    params, x, draw = {"v": numbers(0, 4, 4), "g": numbers(3, 4)}, numbers(1, 6, 4), numbers(2, 1, 6, 4)

    def apply(p, x):
        return x @ kernel(p["v"], p["g"], 1.0 + jnp.tri(4))

    plan = kj.plan(apply, params, x)
    records = kj.capture(plan, params, x).records(draw, 6.0, fisher=kf.monte_carlo)
    want = jax.grad(lambda p: (apply(p, x) * draw[0]).sum())(params)
    covered = {row.leaf for row in plan.table if row.covered}
    found = plan.tree(want, {layer.name: records[layer.name].examples()[0].sum(1) for layer in plan.layers})
    rest = {name: record.g.reshape(want[name].shape) for name, record in records.rest.items()}
    for name in params:
        np.testing.assert_allclose((found if name in covered else rest)[name], want[name], rtol=1e-11, atol=1e-13)
