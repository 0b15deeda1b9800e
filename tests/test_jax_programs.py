"""What is traced and compiled: a program that does not grow a kernel a layer, and a state that is made without one."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

import kfaccore as kf
from jax_models import FAST
from jax_needed import jax, jnp, kj, optax
from kfaccore.xp.blocks import parted, unstacked
from kfaccore_jax.present import matrices


def numbers(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


@pytest.mark.parametrize("each", [1, 2])
def test_blocks_of_a_tracer_are_cut_at_places_that_the_compiler_does_not_know(each):
    x = numbers(0, 6, 3, 2)

    def cut(x):
        return tuple(unstacked(x) if each == 1 else parted(x, each))

    want = [x[i] if each == 1 else x[i : i + each] for i in range(0, 6, each)]
    for got in (jax.jit(cut)(x), jax.jit(jax.vmap(cut))(x[None])):
        for one, other in zip(got, want, strict=True):
            np.testing.assert_array_equal(np.reshape(one, other.shape), other)
    sloped = jax.jit(jax.grad(lambda x: sum((i + 1.0) * jnp.sum(part) for i, part in enumerate(cut(x)))))(x)
    slope = np.repeat(np.arange(1.0, 6 // each + 1), each)[:, None, None]
    np.testing.assert_array_equal(sloped, np.broadcast_to(slope, x.shape))
    for hostile in (jnp.full_like(x, jnp.inf), jnp.full_like(x, jnp.nan), jnp.asarray(-x)):
        rows = hostile.at[:, 1, 1].set(jnp.arange(6.0))
        got = jnp.concatenate([jnp.reshape(one, (-1, 3, 2)) for one in jax.jit(cut)(rows)])
        np.testing.assert_array_equal(got[:, 1, 1], jnp.arange(6.0))


def layers(count):
    """`count` equal layers with a plan, an optimizer of it, and its parameters."""
    params = {f"w{i}": numbers(i, 3, 3) for i in range(count)}

    def apply(params, x):
        for w in params.values():
            x = jnp.tanh(x @ w)
        return x

    plan = kj.plan(apply, params, numbers(9, 4, 3))
    return plan, kj.kfac(plan), params


def kernels(count):
    """The bodies of what XLA compiles for a plain step, once each, of `count` equal layers."""
    _, tx, params = layers(count)
    state = tx.init(params)
    step = jax.jit(lambda grads, state: tx.update(grads, state, records=None, fresh=False))
    text = step.lower(params, state).compile().as_text()
    bodies = set()
    for body in text.split("\n\n"):
        if "fused_computation" in body.split("\n", 1)[0]:
            bodies.add("\n".join(line.split("metadata", 1)[0].split("=", 1)[-1] for line in body.split("\n")[1:]))
    return len({_nameless(body) for body in bodies})


def _nameless(body):
    import re

    return re.sub(r"%[\w.\-]+", "%", body)


def test_a_step_has_no_kernel_a_layer():
    assert kernels(9) <= kernels(5)


def joints(count):
    """How many arrays a compiled plain step joins of others, of `count` equal layers with biases."""
    params = {f"b{i}": numbers(i, 3) for i in range(count)} | layers(count)[2]

    def apply(params, x):
        for i in range(count):
            x = jnp.tanh(x @ params[f"w{i}"] + params[f"b{i}"])
        return x

    tx = kj.kfac(kj.plan(apply, params, numbers(9, 4, 3)))
    step = jax.jit(lambda grads, state: tx.update(grads, state, records=None, fresh=False))
    return step.lower(params, tx.init(params)).compile().as_text().count(" concatenate(")


def test_biases_are_joined_to_all_layers_at_once():
    assert joints(9) == joints(5)


def test_matrices_of_layers_alike_are_those_of_each():
    """Kernels of other axes but one size, one the transpose of the others, and biases of some."""
    shapes = {"a": (4, 6), "b": (2, 2, 6), "c": (4, 2, 3), "d": (6, 4), "e": (4, 6), "f": (4, 6)}
    params = {name: numbers(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    params |= {f"{name}0": numbers(9 + i, 6) for i, name in enumerate("abd")} | {"c0": numbers(20, 2, 3)}

    def apply(params, x):
        z = jnp.tanh(x @ params["a"] + params["a0"])[:, :4]
        z = jnp.tanh(jnp.einsum("nij,ijo->no", z.reshape(-1, 2, 2), params["b"]) + params["b0"])[:, :4]
        z = jnp.tanh(jnp.einsum("ni,ihk->nhk", z, params["c"]) + params["c0"]).reshape(-1, 6)[:, :4]
        z = jnp.tanh(jnp.einsum("ni,oi->no", z, params["d"]) + params["d0"])[:, :4]
        return jnp.tanh(z @ params["e"])[:, :4] @ params["f"]

    plan = kj.plan(apply, params, numbers(30, 5, 4))
    found = matrices(plan, params, plan.blocks)
    assert list(found) == [layer.name for layer in plan.layers]
    assert {found[name].shape for name in ("a", "b", "c", "d")} == {(1, 6, 5)}
    for layer in plan.layers:
        np.testing.assert_array_equal(found[layer.name], layer.matrix(params))


@pytest.mark.parametrize("method", [kf.KFAC(), kf.EKFAC(), kf.RandomizedKFAC()], ids=lambda m: type(m).__name__)
def test_a_state_made_on_the_host_is_the_traced_one(method):
    plan, _, params = layers(3)
    tx = kj.kfac(plan, method, step=kf.Fixed(0.1, 0.9))
    want = jax.jit(tx.init)(params)
    got = tx.init(params)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        np.testing.assert_array_equal(one, other)


def test_codes_are_one_array_that_reads_as_a_mapping(tmp_path):
    flax = pytest.importorskip("flax.serialization")
    params = {"w": numbers(0, 2, 3, 3), "v": numbers(1, 3, 2), "n": numbers(2, 5)}

    def apply(params, x):
        heads = jnp.einsum("bhi,hij->bhj", x, params["w"])
        return jnp.sum(heads, 1) @ params["v"] + jnp.sum(params["n"] ** 2)

    plan = kj.plan(apply, params, numbers(3, 4, 2, 3))
    tx = optax.chain(kj.kfac(plan, rest=None), optax.scale(-1.0))
    state = tx.init(params)
    codes = state[0].codes
    assert {name: code.shape for name, code in codes.items()} == {"w": (2,), "v": (1,), "n": (1,)}
    assert len(jax.tree.leaves(codes)) == 1

    @partial(jax.jit, compiler_options=FAST)
    def after_a_bad_gradient(state):
        captured = kj.capture(plan, params, numbers(3, 4, 2, 3))
        records = captured.records(numbers(5, 1, 4, 2), 4.0)
        grads = captured.gradients(numbers(6, 4, 2))
        bad = grads | {"v": jnp.full_like(grads["v"], jnp.nan)}
        return tx.update(bad, state, params, records=records)[1][0].codes

    codes = after_a_bad_gradient(state)
    assert codes["w"].tolist() == [kf.Code.OK, kf.Code.OK]
    assert codes["v"].tolist() == [kf.Code.NONFINITE]
    assert codes["n"].tolist() == [kf.Code.OK]
    assert set(flax.to_state_dict(codes)) == {"w", "v", "n"}
    np.testing.assert_array_equal(flax.from_bytes(codes, flax.to_bytes(codes)).table, codes.table)
    path = tmp_path / "codes.safetensors"
    kf.save(path, {"codes": dict(codes)})  # as files of before have them, by name
    back = codes.rebuilt(kf.load(path)["codes"])
    np.testing.assert_array_equal(back.table, codes.table)


def test_grafting_takes_the_length_of_another_optimizer():
    params = {"w": numbers(0, 3, 4), "b": numbers(1, 4), "v": numbers(2, 4, 2), "odd": numbers(3, 2)}

    def apply(params, x):
        return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"] * jnp.sum(params["odd"] ** 2)

    x = numbers(4, 6, 3)
    plan = kj.plan(apply, params, x)
    assert plan.uncovered == ("odd",)
    other = optax.adam(0.05)
    tx = kj.kfac(plan, graft=other)
    plain = kj.kfac(plan)
    state = tx.init(params)
    beside = other.init(params)
    free = plain.init(params)

    @partial(jax.jit, compiler_options=FAST)
    def step(states, draws, cotangent):
        captured = kj.capture(plan, params, x)
        records = captured.records(draws, 6.0)
        grads = captured.gradients(cotangent)
        state, free, beside = states
        moves, state = tx.update(grads, state, params, records=records)
        directions, free = plain.update(grads, free, params, records=records)
        updates, beside = other.update(grads, beside, params)
        return (state, free, beside), moves, directions, updates

    states = state, free, beside
    for turn in range(3):
        states, moves, directions, updates = step(states, numbers(10 + turn, 1, 6, 2), numbers(20 + turn, 6, 2))
        np.testing.assert_allclose(moves["odd"], -updates["odd"], rtol=1e-12)
        for names in (("w", "b"), ("v",)):
            length = np.sqrt(sum(np.sum(np.square(updates[name])) for name in names))
            size = np.sqrt(sum(np.sum(np.square(directions[name])) for name in names))
            for name in names:
                np.testing.assert_allclose(moves[name], directions[name] * length / size, rtol=1e-10)
    signed = kj.kfac(plan, graft=optax.scale(2.0))  # a transformation that keeps the sign

    @partial(jax.jit, compiler_options=FAST)
    def of_uncovered(state, draws, cotangent):
        captured = kj.capture(plan, params, x)
        records = captured.records(draws, 6.0)
        grads = captured.gradients(cotangent)
        return signed.update(grads, state, params, records=records)[0]["odd"], grads["odd"]

    moves, grads = of_uncovered(signed.init(params), numbers(10, 1, 6, 2), numbers(20, 6, 2))
    np.testing.assert_allclose(moves, 2.0 * grads, rtol=1e-12)


@pytest.mark.parametrize("given", [{"step": kf.Fixed(0.1)}, {"rest": optax.scale_by_adam()}])
def test_grafting_is_refused_beside_what_contradicts_it(given):
    plan, _, _ = layers(2)
    with pytest.raises(ValueError, match="graft"):
        kj.kfac(plan, graft=optax.adam(0.1), **given)
