"""How people use it: one jitted step, heads, flax and orbax, weakly typed batches, network-level methods."""

from __future__ import annotations

from inspect import signature

import numpy as np
import pytest

import kfaccore as kf
from jax_models import mlp, mlp_params, normal
from jax_needed import jax, jnp, kj, optax

X, Y = normal((8, 5), seed=2), normal((8, 3), seed=3)
LABELS = jnp.arange(8) % 3


def same(got, want, tolerance=0.0):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def cheap(plan, **options):
    return optax.chain(kj.kfac(plan, kf.Diagonal(), schedules=kf.Schedules(0.1), **options), optax.scale(-0.5))


def test_one_function_is_the_loop_written_out():
    plan = kj.plan(mlp, mlp_params(), X)
    loss = kf.SoftmaxCrossEntropy()
    step = kj.step(plan, loss, cheap(plan), draws=2)
    key = jax.random.key(1)
    params, state, metrics = step(mlp_params(), step.init(mlp_params()), (X, LABELS), key)
    captured = kj.capture(plan, mlp_params(), X)
    f = captured.prediction
    draws = kf.monte_carlo(loss, f, jax.random.uniform(key, (2, 8), f.dtype))
    records = captured.records(draws, 8, fisher=kf.monte_carlo)
    tx = cheap(plan)
    moves, want = tx.update(captured.gradients(loss.gradient(f, LABELS) / 8), tx.init(mlp_params()), records=records)
    same(params, optax.apply_updates(mlp_params(), moves), 1e-12)
    same(state[0].core.layers, want[0].core.layers, 1e-12)
    np.testing.assert_allclose(metrics["loss"], loss.value(f, LABELS) / 8, rtol=1e-12)
    assert int(metrics["code/OK"]) == 2


def heads(p, x):
    h = jnp.tanh(x @ p["w"])
    return {"policy": h @ p["p"], "value": h @ p["v"]}


def test_heads_have_the_fisher_of_their_sum():
    w, p, v = normal((5, 4), (4, 3), (4, 1))
    params = {"w": w, "p": p, "v": v}
    plan = kj.plan(heads, params, X, strict=True)
    loss = kf.Joint({"policy": kf.SoftmaxCrossEntropy(), "value": kf.Gaussian()}, {"value": 0.5})
    captured = kj.capture(plan, params, X)
    target = {"policy": LABELS, "value": Y[:, :1]}
    records = captured.records(kf.type2(loss, captured.prediction, target), 8, fisher=kf.type2)

    def mean(matrices, which):
        f = heads(plan.tree(params, matrices), X)[which]
        if which == "value":
            return 0.25 * jnp.sum(f**2) / 8  # its Hessian in f is that of the Gaussian, weight one half
        return -jnp.sum(jax.nn.log_softmax(f)[jnp.arange(8), LABELS]) / 8

    for name, head in (("p", "policy"), ("v", "value")):  # last layers: the loss's Hessian is the GGN
        H = jax.jit(jax.hessian(lambda m, head=head: mean(m, head)))(plan.matrices(params))[name][name]
        size = plan.blocks[name].d_out * plan.blocks[name].d_in
        np.testing.assert_allclose(kf.dense(records[name])[0], H.reshape(size, size), rtol=1e-10, atol=1e-14)
    step = kj.step(plan, loss, cheap(plan))
    _, _, metrics = step(jax.tree.map(jnp.copy, params), step.init(params), (X, target), jax.random.key(0))
    np.testing.assert_allclose(metrics["loss"], loss.value(captured.prediction, target) / 8, rtol=1e-12)


def test_the_default_of_the_step_tunes_itself():
    params = mlp_params()
    plan = kj.plan(mlp, params, X)
    step = kj.step(
        plan, kf.Gaussian(), optax.chain(kj.kfac(plan, kf.Diagonal(), step=kf.SelfTuning()), optax.scale(-1.0))
    )
    state = step.init(params)
    losses = []
    for i in range(4):
        params, state, metrics = step(params, state, (X, Y), jax.random.key(i))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]


def test_weakly_typed_batches():
    pixels = jnp.asarray(np.random.default_rng(0).integers(0, 255, (6, 5)), jnp.uint8)
    x = pixels / 255.0
    assert jax.typeof(x).weak_type
    plan = kj.plan(mlp, mlp_params(), x)
    records = kj.capture(plan, mlp_params(), x).records(jnp.ones((1, 6, 3)), 6)
    again = kj.capture(plan, mlp_params(), jnp.asarray(np.asarray(x))).records(jnp.ones((1, 6, 3)), 6)
    same(dict(records), dict(again))


@pytest.mark.parametrize("n", [1, 2])
def test_a_plan_of_one_example_is_that_of_many(n):
    def apply(p, x):
        x = (x - x.mean(-1, keepdims=True)) * p["g"] + p["s"]
        return jnp.concatenate([jnp.broadcast_to(p["c"], (len(x), 2)), x @ p["w"]], -1)

    params = dict(zip("gscw", normal((5,), (5,), (2,), (5, 3)), strict=True))
    plan = kj.plan(apply, params, X[:n], strict=True)
    assert plan.calls.keys() == kj.plan(apply, params, X).calls.keys()
    draws = normal((1, n, 5))
    records = kj.capture(plan, params, X[:n]).records(draws, n)
    got = {name: records[name].examples()[0, 0].sum(0).reshape(params[name].T.shape) for name in params}
    want = jax.grad(lambda p: jnp.vdot(apply(p, X[:n]), draws[0]))(params)
    same(got, {name: g.T for name, g in want.items()}, 1e-12)


def test_states_go_through_flax_and_orbax(tmp_path):
    serialization = pytest.importorskip("flax.serialization")
    plan = kj.plan(mlp, mlp_params(), X)
    step = kj.step(plan, kf.Gaussian(), cheap(plan))
    _, state, _ = step(mlp_params(), step.init(mlp_params()), (X, Y), jax.random.key(0))
    empty = step.init(mlp_params())
    same(serialization.from_bytes(empty, serialization.to_bytes(state)), state)
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        same(checkpointer.restore(tmp_path / "state", empty), state)


def test_train_state_and_nnx_optimizer():
    train_state = pytest.importorskip("flax.training.train_state")
    plan = kj.plan(mlp, mlp_params(), X)
    captured = kj.capture(plan, mlp_params(), X)
    records = captured.records(kf.type2(kf.Gaussian(), captured.prediction), 8)
    grads = captured.gradients((captured.prediction - Y) / 8)
    state = train_state.TrainState.create(apply_fn=mlp, params=mlp_params(), tx=cheap(plan))
    moves, opt_state = state.tx.update(grads, state.opt_state, state.params, records=records)
    state = state.replace(step=state.step + 1, params=optax.apply_updates(state.params, moves), opt_state=opt_state)
    assert int(state.opt_state[0].core.step) == 1

    nnx = pytest.importorskip("flax.nnx")
    net = nnx.Linear(5, 3, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    graph, params = nnx.split(net, nnx.Param)
    plan = kj.plan(lambda p, x: nnx.merge(graph, p)(x), params, X)
    optimizer = nnx.Optimizer(net, cheap(plan), wrt=nnx.Param)
    captured = kj.capture(plan, params, X)
    records = captured.records(kf.type2(kf.Gaussian(), captured.prediction), 8)
    grads = captured.gradients((captured.prediction - Y) / 8)
    before = float(jnp.sum((net(X) - Y) ** 2))
    given = (net, grads) if "model" in signature(nnx.Optimizer.update).parameters else (grads,)  # from flax 0.11 on
    optimizer.update(*given, records=records)
    assert float(jnp.sum((net(X) - Y) ** 2)) < before


def test_network_level_methods_run_inside_jit():
    network = kf.TwoLevel(kf.KFAC())
    plan = kj.plan(mlp, mlp_params(), X)
    captured = kj.capture(plan, mlp_params(), X)
    records = captured.records(kf.type2(kf.Gaussian(), captured.prediction), 8)
    grads = captured.gradients((captured.prediction - Y) / 8)
    tx = kj.kfac(plan, network=network, schedules=kf.Schedules(0.1, 0.9))
    moves, _ = jax.jit(tx.update)(grads, tx.init(mlp_params()), records=records)
    pre = kf.Preconditioner(network=network, schedules=kf.Schedules(0.1, 0.9))
    host = jax.tree.map(np.asarray, (dict(records), plan.matrices(grads)))
    want, _, _ = pre.step(pre.init(plan.blocks, np.asarray(X)), *host)
    same(plan.matrices(moves), want, 1e-9)


def test_own_gradients_are_asked_for():
    plan = kj.plan(mlp, mlp_params(), X)
    captured = kj.capture(plan, mlp_params(), X)
    tx = kj.kfac(plan, kf.FNGD(steps=1))
    records = captured.records(kf.type2(kf.Gaussian(), captured.prediction), 8, fisher=kf.type2)
    with pytest.raises(ValueError, match="FNGD takes the loss's own gradients: use empirical"):
        tx.update(mlp_params(), tx.init(mlp_params()), records=records)
