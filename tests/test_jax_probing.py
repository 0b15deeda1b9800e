"""What an optax optimizer does is seen on the user's own tree: masks, labels and rates go by name, axes and size."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

import kfaccore as kf
from jax_models import FAST, normal
from jax_needed import jax, jnp, kj, optax
from kfaccore_jax.probing import check_downhill, outline, shrinks, tried, turns

P = dict(zip("bsvw", normal((6,), (4,), (6, 3), (4, 6)), strict=True))
X, Y = normal((16, 4), (16, 3), seed=2)
DECAY = 5.0


def apply(p, x):
    """s belongs to no layer."""
    return jnp.tanh(x @ (p["w"] * jnp.exp(p["s"])[:, None]) + p["b"]) @ p["v"]


PLAN = kj.plan(apply, P, X)


def moved(graft=None, rest=None):
    """The first step, with the sign of a gradient."""
    tx = kj.kfac(PLAN, graft=graft, rest=rest)

    @partial(jax.jit, compiler_options=FAST)
    def step(state):
        captured = kj.capture(PLAN, P, X)
        records = captured.records(kf.type2(kf.Gaussian(), captured.prediction), 16, fisher=kf.type2)
        grads = captured.gradients((captured.prediction - Y) / 16)
        return tx.update(grads, state, P, records=records)[0], grads

    return step(tx.init(P))


def frozen_vectors(tree):
    return jax.tree.map(lambda x: "train" if x.ndim > 1 else "frozen", tree)


def by_name(tree):
    return {name: "train" if name == "s" else "frozen" for name in tree}


def either(one, labels, other=None):
    return optax.multi_transform({"train": one, "frozen": other or optax.set_to_zero()}, labels)


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("of", [frozen_vectors, by_name])
def test_an_optimizer_that_freezes_some_leaves_turns_the_others(of, tree):
    labels = of(P) if tree else of
    assert turns(either(optax.adamw(0.01, weight_decay=DECAY), labels), outline(P))


def test_what_is_beside_the_layers_goes_downhill():
    graft = either(optax.adamw(0.01, weight_decay=DECAY), frozen_vectors)
    slow = either(optax.adamw(0.01, weight_decay=DECAY), frozen_vectors, optax.sgd(1e-30))
    found, _ = moved(graft=graft)
    want, _ = moved(graft=slow)
    for name in P:
        np.testing.assert_allclose(found[name], want[name], rtol=1e-12, atol=1e-25)


def test_a_whole_optimizer_is_no_rest():
    warm = optax.adam(optax.linear_schedule(0.0, 0.02, 4))
    for rest in (warm, either(optax.adam(0.1), by_name)):
        with pytest.raises(ValueError, match="rest turns gradients round"):
            kj.kfac(PLAN, rest=rest).init(P)


@pytest.mark.parametrize("large", [lambda x: x.size > 8, lambda x: min(x.shape) > 2, lambda x: x.ndim > 1])
def test_decay_of_leaves_by_size_stays_beside_the_step(large):
    """Also by a tree."""
    plain, _ = moved(graft=optax.adam(0.01))
    chosen = jax.tree.map(large, P)
    assert shrinks(optax.adamw(0.01, weight_decay=DECAY, mask=chosen), outline(P))
    found, _ = moved(graft=optax.adamw(0.01, weight_decay=DECAY, mask=lambda tree: jax.tree.map(large, tree)))
    for name in P:
        want = plain[name] + 0.01 * DECAY * P[name] * chosen[name]
        np.testing.assert_allclose(found[name], want, rtol=1e-10, atol=1e-12)


def test_parts_before_the_rate_keep_the_sign():
    for rest in (optax.scale_by_adam(), optax.masked(optax.scale_by_adam(), {"s": True})):
        found, grads = moved(rest=rest)
        assert float(jnp.vdot(found["s"], grads["s"])) > 0


def test_a_rate_that_begins_with_zero_and_steps_that_are_gathered():
    late = optax.join_schedules([optax.constant_schedule(0.0), optax.constant_schedule(0.01)], [12])
    of = outline(P)
    for optimizer in (optax.adamw(late, weight_decay=DECAY), optax.MultiSteps(optax.adam(0.1), 16)):
        assert turns(optimizer, of)
    assert shrinks(optax.adamw(late, weight_decay=DECAY), of)
    assert not shrinks(optax.adam(late), of)
    assert turns(optax.set_to_zero(), of) is None
    with pytest.raises(ValueError, match="graft's optimizer has moved nothing"):
        moved(graft=optax.set_to_zero())
    moved(rest=optax.set_to_zero())


@pytest.mark.parametrize("seed", range(4))
def test_noise_that_an_optimizer_adds_does_not_turn_it(seed):
    noise = optax.add_noise(1e6, 0.55, seed)
    assert turns(optax.chain(noise, optax.sgd(0.1)), outline(P))
    assert turns(noise, outline(P)) is False


UPHILL = {
    "kfac": kj.kfac(PLAN),
    "graft": kj.kfac(PLAN, graft=optax.adamw(0.01)),
    "its own rate": kj.kfac(PLAN, step=kf.SelfTuning()),
    "micro-batches": kj.accumulate(kj.kfac(PLAN, graft=optax.adamw(0.01)), 2),
    "twice": optax.chain(kj.kfac(PLAN), optax.sgd(0.1), optax.scale(-1.0)),
    "a part": optax.masked(kj.kfac(PLAN), {"w": True, "b": True, "s": True, "v": False}),
}


@pytest.mark.parametrize("name", UPHILL)
def test_a_chain_that_goes_uphill_is_refused_before_its_first_step(name):
    tx = UPHILL[name]
    step = kj.step(PLAN, kf.Gaussian(), tx)
    with pytest.raises(ValueError, match="tx moves parameters up the gradient"):
        jax.eval_shape(step, P, tx.init(P), (X, Y), jax.random.key(0))


@pytest.mark.parametrize("name", UPHILL)
def test_and_the_same_turned_round_is_not(name):
    check_downhill(tried(optax.chain(UPHILL[name], optax.scale(-1.0))), P)
    check_downhill(tried(optax.chain(UPHILL[name], optax.scale(0.0))), P)


def test_a_chain_that_cannot_be_tried_is_not_judged():
    def update(grads, state, params=None, *, weather, **given):
        return grads, state

    strange = optax.GradientTransformationExtraArgs(lambda params: (), update)
    check_downhill(tried(optax.chain(kj.kfac(PLAN), strange)), P)


def test_large_trees_are_tried_on_shorter_axes():
    tree = {"one": jax.ShapeDtypeStruct((50_000, 768), jnp.float32), "bias": jax.ShapeDtypeStruct((300,), jnp.float32)}
    shapes = [shape for shape, _ in outline(tree)[1]]
    assert shapes == [(256,), (256, 256)]


@pytest.mark.parametrize(
    "tx",
    [kj.kfac(PLAN), kj.kfac(PLAN, graft=optax.adam(0.1)), kj.accumulate(kj.kfac(PLAN), 2)],
    ids=["kfac", "graft", "accumulate"],
)
def test_a_state_of_numpy_arrays_goes_on(tx):
    """As jax.device_get and files give it, also where no jit makes arrays of it: closed over, it is what it is."""
    captured = kj.capture(PLAN, P, X)
    records = captured.records(kf.type2(kf.Gaussian(), captured.prediction), 16, fisher=kf.type2)
    grads = captured.gradients((captured.prediction - Y) / 16)
    state = tx.init(P)
    read = jax.device_get(state)
    want = jax.eval_shape(lambda grads: tx.update(grads, state, P, records=records), grads)
    found = jax.eval_shape(lambda grads: tx.update(grads, read, P, records=records), grads)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(lambda x: (x.shape, x.dtype), want)
