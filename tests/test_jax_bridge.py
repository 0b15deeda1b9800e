"""Out of JAX and back; explicit taps; half precision; and the examples, as documentation that runs."""

from __future__ import annotations

import importlib
from functools import partial

import numpy as np
import pytest

import kfaccore as kf
import kfaccore_numpy as kn
from jax_models import FAST, mlp, mlp_params, normal
from jax_needed import jax, jnp, kj
from jax_twins import twin

CHEAP = kf.Diagonal()  # compiles in no time


def front(dtype=jnp.float64):
    """(plan, records, gradients) of the MLP, computed under jit."""
    params = jax.tree.map(lambda v: v.astype(dtype), mlp_params())
    x = normal((6, 5), seed=2).astype(dtype)
    plan = kj.plan(mlp, params, x)

    @partial(jax.jit, compiler_options=FAST)
    def run(params, x):
        captured = kj.capture(plan, params, x)
        draws = kf.type2(kf.Gaussian(), captured.prediction)
        grads = captured.gradients((captured.prediction - 1) / 6)
        return captured.records(draws, 6.0), plan.matrices(grads)

    return plan, *run(params, x)


def test_the_core_runs_outside_jit_on_read_only_views():
    plan, records, grads = front()
    before = jax.tree.map(np.array, (records, grads))
    views, matrices = kj.exported((records, grads))
    assert all(isinstance(x, np.ndarray) and not x.flags.writeable for x in jax.tree.leaves(matrices))
    assert views["0.0"].g.__array_interface__["data"][0] == records["0.0"].g.unsafe_buffer_pointer()
    pre = kf.Preconditioner(CHEAP, kf.Clocks(1, 2), kf.Schedules(0.1, 0.9), donate=True)
    state = pre.init(plan.blocks, matrices["0.0"])
    tx = kj.kfac(plan, CHEAP, kf.Clocks(1, 2), kf.Schedules(0.1, 0.9))
    inside = tx.init(mlp_params())
    update = jax.jit(tx.update, compiler_options=FAST)
    for _ in range(3):
        updates, state, _ = pre.step(state, views, matrices)
        tree = plan.tree(mlp_params(), kj.imported(updates, like=grads))
        want, inside = update(plan.tree(mlp_params(), grads), inside, records=records)
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
    for a, b in zip(jax.tree.leaves((records, grads)), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("offset", [0, 3])
def test_memory_that_comes_in_is_never_aliased(offset):
    memory = np.zeros(64 + offset)[offset:]
    taken = kj.imported({"x": memory})["x"]
    memory[:] = 7.0
    assert not np.any(taken)


def test_half_precision_is_widened_inside_jax():
    plan, records, grads = front(jnp.bfloat16)
    assert records["0.0"].g.dtype == records["0.0"].a.dtype == jnp.float32
    views, matrices = kj.exported((records, grads))
    assert matrices["0.0"].dtype == np.float32
    pre = kf.Preconditioner(CHEAP)
    updates, _, _ = pre.step(pre.init(plan.blocks, matrices["0.0"]), views, matrices)
    assert kj.imported(updates, like=grads)["0.0"].dtype == jnp.bfloat16
    tx, params = kj.kfac(plan, CHEAP), jax.tree.map(lambda v: v.astype(jnp.bfloat16), mlp_params())
    state = tx.init(params)
    moves, after = jax.jit(tx.update, compiler_options=FAST)(plan.tree(params, grads), state, records=records)
    assert {leaf.dtype for leaf in jax.tree.leaves(moves)} == {jnp.dtype(jnp.bfloat16)}
    assert [x.dtype for x in jax.tree.leaves(after)] == [x.dtype for x in jax.tree.leaves(state)]
    np.testing.assert_allclose(plan.matrices(moves)["0.0"].astype(float), updates["0.0"], rtol=0.02, atol=1e-3)


def test_states_go_to_a_file_and_on_in_numpy(tmp_path):
    plan, records, grads = front()
    tx = kj.kfac(plan, CHEAP, kf.Clocks(1, 2), kf.Schedules(0.1, 0.9))
    update = jax.jit(tx.update, compiler_options=FAST)
    tree, state = plan.tree(mlp_params(), grads), tx.init(mlp_params())
    pre, host = kf.Preconditioner(CHEAP, kf.Clocks(1, 2), kf.Schedules(0.1, 0.9)), kj.exported((records, grads))
    numpy = pre.init(plan.blocks, host[1]["0.0"])
    for _ in range(3):
        _, state = update(tree, state, records=records)
    kf.save(tmp_path / "jax.safetensors", state.core)
    numpy = kf.load(tmp_path / "jax.safetensors", like=numpy)
    assert numpy.step == 3
    for _ in range(2):
        want, numpy, _ = pre.step(numpy, *host)
    kf.save(tmp_path / "numpy.safetensors", numpy)
    state = state._replace(core=kf.load(tmp_path / "numpy.safetensors", like=state.core))
    got, state = update(tree, state, records=records)
    want, numpy, _ = pre.step(numpy, *host)
    assert int(state.core.step) == numpy.step == 6
    for name, direction in plan.matrices(got).items():
        np.testing.assert_allclose(direction, want[name], rtol=1e-10, atol=1e-12)


def test_the_self_tuning_step_outside_jit_is_that_of_numpy():
    net, loss = kn.Sequential((5,), (kn.Dense(4), kn.Tanh(), kn.Dense(3))), kf.Gaussian()
    start, rng = net.init(np.random.default_rng(1), np.asarray), np.random.default_rng(2)
    host = rng.normal(size=(12, 5)), rng.normal(size=(12, 3))
    x, y = (jnp.asarray(v) for v in host)
    apply = twin(net)
    params = jax.tree.map(jnp.asarray, start)
    plan = kj.plan(apply, params, x)
    compiled = partial(jax.jit, compiler_options=FAST)

    @compiled
    def front(params, noise):
        captured = kj.capture(plan, params, x)
        f = captured.prediction
        slope = loss.gradient(f, y) / 12
        drawn = captured.records(kf.monte_carlo(loss, f, noise), 12.0, cotangent=slope)
        return drawn, plan.matrices(captured.gradients(slope)), loss.value(f, y) / 12

    value = compiled(lambda params: loss.value(apply(params, x), y) / 12)
    moved = compiled(lambda params, moves, share: jax.tree.map(lambda p, m: p - share * m[0], params, moves))
    pre = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 3), step=kf.SelfTuning())
    (state, other), numpy = (pre.init(net.blocks(), host[0]) for _ in range(2)), dict(start)
    for i in range(6):
        noise = kf.draw_noise(loss, (12, 3), 1, np.random.default_rng(100 + i))
        records, grads, before = kj.exported(front(params, noise))
        moves, state, _ = pre.step(state, records, grads, loss=float(before), own=records.own)
        old, box = params, [moved(params, kj.imported(moves), 1.0)]

        def place(share, old=old, moves=moves, box=box):
            box[0] = moved(old, kj.imported(moves), share)

        _, state = pre.judge(state, float(before), place, lambda box=box: float(value(box[0])))
        params = box[0]
        draws = np.random.default_rng(100 + i)
        _, other, _ = kn.step(net, numpy, host, loss, pre, other, i, draws)
    for name, matrix in numpy.items():
        np.testing.assert_allclose(params[name], matrix, rtol=1e-8, atol=1e-10)
    assert state.motion.steps == other.motion.steps == 6


def tapped(p, x, tap):
    x = jnp.tanh(tap.conv(x, p["w"], p["b"], stride=(2, 1), padding=((1, 0), (0, 1))))
    x = tap.bias(tap.scale(x, p["gain"]), p["shift"]).mean((1, 2))
    y = tap.embedding((10 * x[:, :1]).astype(int) % 5, p["table"]).sum(1)
    return tap.dense(jnp.tanh(tap.dense(x, p["v"], p["c"])), p["u"]) + y


class Plain:
    """The layers of a Tap without a tap."""

    def dense(self, x, w, b=0.0):
        return x @ w + b

    def conv(self, x, w, b, stride, padding):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, stride, padding, dimension_numbers=numbers) + b

    def embedding(self, ids, table):
        return table[ids]

    def scale(self, x, gain):
        return x * gain

    def bias(self, x, b):
        return x + b


def test_taps_record_what_the_interpreter_finds():
    names = ("w", "b", "gain", "shift", "table", "v", "c", "u")
    shapes = ((2, 2, 2, 4), (4,), (4,), (4,), (5, 3), (4, 4), (4,), (4, 3))
    p, x = dict(zip(names, normal(*shapes), strict=True)), normal((6, 5, 4, 2), seed=2)
    explicit = kj.plan(tapped, p, x, explicit=True, strict=True)
    followed = kj.plan(lambda p, x: tapped(p, x, Plain()), p, x, strict=True)
    assert explicit.blocks == followed.blocks
    draws = normal((2, 6, 3), seed=4)

    @partial(jax.jit, compiler_options=FAST)
    def run(p, x):
        pair = [kj.capture(plan, p, x) for plan in (explicit, followed)]
        return [(c.prediction, c.gradients(draws[0]), c.records(draws, 6.0)) for c in pair]

    one, two = run(p, x)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


RECIPES = ("packed_graphs", "ppo_two_heads", "contrastive", "wave_function", "pinn")


@pytest.mark.parametrize(
    ("name", "library"), [("flax_optax", "flax"), ("equinox_loop", "equinox"), *((name, "jax") for name in RECIPES)]
)
def test_examples_train(name, library):
    pytest.importorskip(library)
    module = importlib.import_module(f"kfaccore_jax.examples.{name}")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        losses = module.main(steps=12)
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    assert losses[-1] < 0.7 * losses[0]
