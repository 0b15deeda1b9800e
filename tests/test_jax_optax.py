"""K-FAC as an optax transformation: against the NumPy core, under jit, in chains, with failures."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp

import kfaccore as kf
import kfaccore_jax as kj
import kfaccore_numpy as kn
from jax_models import mlp, mlp_params, normal
from jax_twins import twin

W3 = kf.Window((3, 3), padding=1)
NETS = {
    "dense": kn.Sequential((5,), (kn.Dense(4), kn.Tanh(), kn.Residual((kn.Dense(4), kn.Sigmoid())), kn.Dense(3))),
    "cnn": kn.Sequential(
        (6, 6, 2),
        (
            kn.Conv2d(3, W3),
            kn.Tanh(),
            kn.MaxPool(2),
            kn.Conv2d(2, kf.Window((2, 2), stride=2, padding=1, dilation=2)),
            kn.Flatten(),
            kn.Dense(3),
        ),
    ),
}
LOSS = kf.Gaussian()
X, Y = normal((6, 5), seed=2), normal((6, 3), seed=9)


def same(got, want, tolerance=0.0):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", [kf.KFAC(), kf.EKFAC(), kf.Diagonal()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("name", NETS)
def test_records_states_and_directions_are_those_of_numpy(name, method, rng):
    net, draw = NETS[name], jnp.asarray
    params = net.init(np.random.default_rng(1), np.asarray)
    x, y = rng.normal(size=(7, *net.inputs)), rng.normal(size=(7, 3))
    f, tape = net.forward(params, x)
    ours = {k: draw(v) for k, v in params.items()}
    plan = kj.plan(twin(net), ours, x, strict=True)
    assert plan.blocks == net.blocks()
    captured = kj.capture(plan, ours, draw(x))
    draws = rng.normal(size=(2, *f.shape))
    records = net.records(tape, net.backward(params, tape, draws), 7)
    found = captured.records(draw(draws), 7)
    for layer, record in records.items():
        np.testing.assert_allclose(found[layer].rows(), record.rows(), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(found[layer].g, record.g, rtol=1e-10, atol=1e-12)
    grads = net.gradients(tape, net.backward(params, tape, f - y), 7, factored=False)
    moved = captured.gradients((captured.prediction - y) / 7)
    tx = kj.kfac(plan, method, kf.Clocks(1, 2), kf.Schedules(0.1, 0.9))
    pre, state = kf.Preconditioner(method, kf.Clocks(1, 2), kf.Schedules(0.1, 0.9)), tx.init(ours)
    core = pre.init(net.blocks(), x[:0])
    update = jax.jit(partial(tx.update, records=found))
    for _ in range(3):
        want, core, info = pre.step(core, records, grads)
        got, state = update(moved, state)
        for layer, direction in want.items():
            np.testing.assert_allclose(got[layer], direction, rtol=1e-10, atol=1e-12)
            np.testing.assert_array_equal(state.codes[layer], info.codes[layer])
    for a, b in zip(kf_leaves(state.core), kf_leaves(core), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)
    assert sum(int(c) for c in state.counts) == 3 * len(want)


def kf_leaves(state):
    return [leaf for layer in state.layers.values() for _, leaf in tree.items(layer)]


@cache
def training(method=None, clocks=None, step=None):
    """(plan, transformation, step function counting its traces) for the MLP."""
    clocks = clocks or kf.Clocks(1, 3)
    plan = kj.plan(mlp, mlp_params(), X)
    tx = kj.kfac(plan, method or kf.KFAC(), clocks, kf.Schedules(0.1, 0.9), step or kf.Fixed())
    traces = []

    def run(params, state, x, y, fresh=None, measured=True):
        traces.append(fresh)
        captured = kj.capture(plan, params, x)
        grads = captured.gradients(LOSS.gradient(captured.prediction, y) / len(x))
        draws = kf.type2(LOSS, captured.prediction)
        records = captured.records(draws, len(x)) if measured else None
        moves, state = tx.update(grads, state, params, records=records, fresh=fresh)
        return optax.apply_updates(params, jax.tree.map(lambda d: -0.5 * d, moves)), state

    return plan, tx, run, traces


def trained(run, tx, steps, variants):
    params, state = mlp_params(), tx.init(mlp_params())
    for i in range(steps):
        params, state = run(params, state, X, Y, **({"fresh": i % 3 == 0} if variants else {}))
    return params, state


@pytest.mark.parametrize("method", [kf.KFAC(), kf.EKFAC()], ids=lambda m: type(m).__name__)
def test_two_variants_equal_the_cond_form_bitwise_and_eager(method):
    _, tx, run, traces = training(method)
    traces.clear()
    compiled = jax.jit(run, static_argnames=("fresh", "measured"), donate_argnums=(0, 1))
    two = trained(compiled, tx, 7, variants=True)
    assert traces == [True, False]
    one = trained(compiled, tx, 7, variants=False)
    assert traces == [True, False, None]
    same(two, one)
    same(trained(run, tx, 7, variants=True), two, 1e-12)
    assert int(two[1].core.step) == 7
    assert two[1].counts.tolist() == [14, 0, 0, 0, 0, 0, 0, 0]


def test_inside_a_scan_and_with_a_slow_update_clock():
    _, tx, run, _ = training(clocks=kf.Clocks(2, 3))

    @jax.jit
    def loop(params, state):
        return jax.lax.scan(lambda c, _: (run(*c, X, Y), None), (params, state), length=7)[0]

    scanned = loop(mlp_params(), tx.init(mlp_params()))
    compiled, pair = jax.jit(run, static_argnames=("fresh", "measured")), (mlp_params(), tx.init(mlp_params()))
    for i in range(7):
        pair = compiled(*pair, X, Y, fresh=i % 3 == 0, measured=i % 2 == 0)
    same(scanned, pair, 1e-12)


def test_the_step_of_the_preconditioner_and_a_schedule():
    plan, _, _, _ = training()
    rule, steps = kf.Fixed(0.3, 0.9, kf.KLClip(1e-3)), 3
    tx = kj.kfac(plan, schedules=kf.Schedules(lambda t: 0.1 * 0.5**t, 0.9), step=rule)
    pre = kf.Preconditioner(kf.KFAC(), kf.Clocks(), kf.Schedules(lambda t: 0.1 * 0.5**t, 0.9), step=rule)
    state, core = tx.init(mlp_params()), pre.init(plan.blocks, X)
    captured = kj.capture(plan, mlp_params(), X)
    records = captured.records(kf.type2(LOSS, captured.prediction), 6)
    grads = captured.gradients((captured.prediction - Y) / 6)
    update = jax.jit(partial(tx.update, records=records))
    for _ in range(steps):
        got, state = update(grads, state)
        want, core, _ = pre.step(core, records, plan.matrices(grads))
        same(plan.matrices(got), want, 1e-12)
    other = tx.update(grads, state, records=records, damping=jnp.asarray(3.0), fresh=True)[0]
    assert not np.allclose(jax.tree.leaves(other)[0], jax.tree.leaves(got)[0])


def test_factored_gradients_give_the_same_directions():
    plan, tx, _, _ = training()
    captured = kj.capture(plan, mlp_params(), X)
    records = captured.records(kf.type2(LOSS, captured.prediction), 6)
    cotangent = (captured.prediction - Y) / 6
    grads, factored = captured.gradients(cotangent), captured.factored(cotangent)
    state = tx.init(mlp_params())
    same(
        tx.update(grads, state, records=records)[0],
        tx.update(grads, state, records=records, factored=factored)[0],
        1e-12,
    )
    assert not factored  # 6 rows are more than these layers are wide
    few = kj.capture(plan, mlp_params(), X[:2])
    cotangent = few.prediction
    factored, matrices = few.factored(cotangent), plan.matrices(few.gradients(cotangent))
    assert set(factored) == set(matrices)
    for name, matrix in matrices.items():
        np.testing.assert_allclose(factored[name].dense(), matrix, rtol=1e-12, atol=1e-14)


def test_chain_masked_partition_and_apply_if_finite():
    plan, tx, _, _ = training()
    params = mlp_params()
    captured = kj.capture(plan, params, X)
    records = captured.records(kf.type2(LOSS, captured.prediction), 6)
    grads = captured.gradients((captured.prediction - Y) / 6)
    alone = tx.update(grads, tx.init(params), params, records=records)[0]

    def through(outer):
        return jax.jit(partial(outer.update, records=records))(grads, outer.init(params), params)[0]

    chained = through(optax.chain(tx, optax.trace(0.9), optax.scale(-0.1)))
    same(chained, jax.tree.map(lambda d: -0.1 * d, alone), 1e-14)
    same(through(optax.apply_if_finite(tx, 3)), alone, 1e-14)
    mask = [(True, True), (False, False)]
    masked = through(optax.masked(tx, mask))
    same(masked, [alone[0], grads[1]], 1e-14)
    labels = [("kfac", "kfac"), ("sgd", "sgd")]
    parts = through(optax.partition({"kfac": tx, "sgd": optax.sgd(1.0)}, labels))
    same(parts, [alone[0], jax.tree.map(jnp.negative, grads[1])], 1e-14)


def test_leaves_without_a_layer_keep_their_gradient():
    def apply(p, x):
        return mlp(p["net"], x) * jnp.max(p["odd"])

    params = {"net": mlp_params(), "odd": jnp.ones(2), "never": jnp.zeros((2, 2)), "count": jnp.zeros((), int)}
    plan = kj.plan(apply, params, X)
    assert [row.leaf for row in plan.table if not row.covered] == ["count", "never", "odd"]
    tx, captured = kj.kfac(plan, kf.KFAC()), kj.capture(plan, params, X)
    records = captured.records(kf.type2(LOSS, captured.prediction), 6)
    grads = captured.gradients(captured.prediction / 6)
    moves, state = tx.update(grads, tx.init(params), params, records=records)
    same({k: moves[k] for k in ("odd", "never", "count")}, {k: grads[k] for k in ("odd", "never", "count")})
    assert not np.allclose(moves["net"][0][0], grads["net"][0][0])
    assert set(state.codes) == {"net.0.0", "net.1.0", "never", "odd"}


def test_an_indefinite_factor_keeps_the_previous_inverse_and_counts_it():
    plan, tx, _, _ = training(clocks=kf.Clocks(1, 1))
    captured = kj.capture(plan, mlp_params(), X)
    records = captured.records(kf.type2(LOSS, captured.prediction), 6)
    grads = captured.gradients((captured.prediction - Y) / 6)
    update = jax.jit(partial(tx.update, records=records), static_argnames="fresh")
    _, state = update(grads, tx.init(mlp_params()), fresh=True)
    layers = dict(state.core.layers)
    broken = layers["0.0"].A - 50.0 * jnp.eye(6)
    layers["0.0"] = replace(layers["0.0"], A=broken)
    state = state._replace(core=replace(state.core, layers=layers))
    kept = state.core.layers["0.0"].inverse
    moves, state = update(grads, state, fresh=True)
    same(state.core.layers["0.0"].inverse, kept)
    assert state.codes["0.0"].tolist() == [kf.Code.PREVIOUS]
    assert state.counts.tolist() == [3, 0, 0, 1, 0, 0, 0, 0]
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(moves))


def test_a_gradient_that_is_not_finite_moves_nothing():
    plan, tx, _, _ = training()
    captured = kj.capture(plan, mlp_params(), X)
    records = captured.records(kf.type2(LOSS, captured.prediction), 6)
    grads = jax.tree.map(lambda g: g * jnp.nan, captured.gradients(captured.prediction))
    moves, state = jax.jit(partial(tx.update, records=records))(grads, tx.init(mlp_params()))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(moves))
    assert all(code.tolist() == [kf.Code.NONFINITE] for code in state.codes.values())


def test_misuse_is_named():
    plan, tx, _, _ = training()
    grads, state = jax.tree.map(jnp.ones_like, mlp_params()), tx.init(mlp_params())
    with pytest.raises(TypeError, match="records"):
        tx.update(grads, state)
    with pytest.raises(ValueError, match="update got no records"):
        tx.update(grads, state, records=None)
    with pytest.raises(ValueError, match=r"methods has no entry for layers \['1.0'\]"):
        kj.kfac(plan, {"0.0": kf.KFAC()}).init(mlp_params())
    with pytest.raises(ValueError, match="step is LineSearch"):
        kj.kfac(plan, step=kf.LineSearch())
    unchanged = tx.update(grads, state, records=None, fresh=False)[0]
    same(unchanged, grads)
