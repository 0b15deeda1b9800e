"""K-FAC as an optax transformation: against the NumPy core, under jit, in chains, with failures."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest

import kfaccore as kf
import kfaccore_numpy as kn
from jax_models import FAST, mlp, mlp_params, normal
from jax_needed import jax, jnp, kj, optax
from jax_twins import twin
from kfaccore import tree

W3 = kf.Window((3, 3), padding=1)
NETS = {
    "dense": kn.Sequential((5,), (kn.Dense(4), kn.Tanh(), kn.Residual((kn.Dense(4), kn.Sigmoid())), kn.Dense(3))),
    "cnn": kn.Sequential(
        (6, 6, 2),
        (
            kn.Conv2d(3, W3),
            kn.Tanh(),
            kn.MaxPool(2),
            kn.Conv2d(2, kf.Window((2, 2), stride=2, padding=1)),
            kn.Flatten(),
            kn.Dense(3),
        ),
    ),
}
LOSS, CHEAP = kf.Gaussian(), kf.Diagonal()  # a refresh without a Cholesky compiles in no time
X, Y = normal((6, 5), seed=2), normal((6, 3), seed=9)


def same(got, want, tolerance=0.0):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


PAIRS = [("dense", kf.KFAC()), ("dense", kf.Diagonal()), ("cnn", kf.KFAC()), ("cnn", kf.EKFAC())]


@pytest.mark.parametrize(("name", "method"), PAIRS, ids=lambda m: getattr(m, "__name__", type(m).__name__))
def test_records_states_and_directions_are_those_of_numpy(name, method, rng):
    net, draw = NETS[name], jnp.asarray
    params = net.init(np.random.default_rng(1), np.asarray)
    x, y = rng.normal(size=(7, *net.inputs)), rng.normal(size=(7, 3))
    f, tape = net.forward(params, x)
    ours = {k: draw(v) for k, v in params.items()}
    plan = kj.plan(twin(net), ours, x, strict=True)
    assert plan.blocks == net.blocks()
    draws = rng.normal(size=(2, *f.shape))

    @partial(jax.jit, compiler_options=FAST)
    def front(params, x, y, draws):
        captured = kj.capture(plan, params, x)
        return captured.records(draws, 7.0), captured.gradients((captured.prediction - y) / 7)

    found, moved = front(ours, x, y, draws)
    records = net.records(tape, net.backward(params, tape, draws), 7)
    for layer, record in records.items():
        np.testing.assert_allclose(found[layer].rows(), record.rows(), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(found[layer].g, record.g, rtol=1e-10, atol=1e-12)
    grads = net.gradients(tape, net.backward(params, tape, f - y), 7, factored=False)
    tx = kj.kfac(plan, method, kf.Clocks(1, 2), kf.Schedules(0.1, 0.9))
    pre, state = kf.Preconditioner(method, kf.Clocks(1, 2), kf.Schedules(0.1, 0.9)), tx.init(ours)
    core = pre.init(net.blocks(), x[:0])
    update = jax.jit(partial(tx.update, records=found), compiler_options=FAST)
    for _ in range(3):
        want, core, info = pre.step(core, records, grads)
        got, state = update(moved, state)
        for layer, direction in want.items():
            np.testing.assert_allclose(got[layer], direction, rtol=1e-10, atol=1e-12)
            np.testing.assert_array_equal(state.codes[layer], info.codes[layer])
    assert sum(int(c) for c in state.counts) == 3 * len(want)
    if method == kf.EKFAC():
        return  # eigenvectors have a sign
    for layer, ours in state.core.layers.items():
        for (path, a), (_, b) in zip(tree.items(ours), tree.items(core.layers[layer]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11, err_msg=f"{layer} {path}")


@cache
def batch():
    """(plan, records, gradients) of the MLP at its first parameters; records leave jit as a tree."""
    plan = kj.plan(mlp, mlp_params(), X)

    @partial(jax.jit, compiler_options=FAST)
    def front(params):
        captured = kj.capture(plan, params, X)
        records = captured.records(kf.type2(LOSS, captured.prediction), 6)
        return records, captured.gradients((captured.prediction - Y) / 6)

    return plan, *front(mlp_params())


def quick(function, **fixed):
    return jax.jit(partial(function, **fixed), compiler_options=FAST, static_argnames="fresh")


@cache
def training(method=None, clocks=None, step=None):
    """(plan, transformation, step function counting its traces) for the MLP."""
    clocks = clocks or kf.Clocks(1, 3)
    plan = batch()[0]
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


def test_two_variants_equal_the_cond_form_bitwise():
    _, tx, run, traces = training()
    traces.clear()
    compiled = jax.jit(run, static_argnames=("fresh", "measured"), donate_argnums=(0, 1))
    two = trained(compiled, tx, 7, variants=True)
    assert traces == [True, False]
    one = trained(compiled, tx, 7, variants=False)
    assert traces == [True, False, None]
    same(two, one)
    told = trained(jax.jit(run, static_argnames="measured", donate_argnums=(0, 1)), tx, 7, variants=True)
    assert len(traces) == 4  # a flag that is traced: one program for both
    same(told, one)
    assert int(two[1].core.step) == 7
    assert two[1].counts.tolist() == [14] + [0] * (len(kf.Code) - 1)


@cache
def refreshed():
    """(directions, state) of one compiled step from the first state."""
    (_, records, grads), tx = batch(), training()[1]
    return quick(tx.update, records=records)(grads, tx.init(mlp_params()), fresh=True)


def test_jit_equals_eager():
    (_, records, grads), tx = batch(), training(kf.EKFAC())[1]
    eager = tx.update(grads, tx.init(mlp_params()), records=records, fresh=True)
    same(quick(tx.update, records=records)(grads, tx.init(mlp_params()), fresh=True), eager, 1e-12)


def test_inside_a_scan_and_with_a_slow_update_clock():
    _, tx, run, _ = training(CHEAP, kf.Clocks(2, 3))

    @partial(jax.jit, compiler_options=FAST)
    def loop(params, state):
        return jax.lax.scan(lambda c, _: (run(*c, X, Y), None), (params, state), length=7)[0]

    scanned = loop(mlp_params(), tx.init(mlp_params()))
    compiled, pair = (
        jax.jit(run, static_argnames=("fresh", "measured"), compiler_options=FAST),
        (mlp_params(), tx.init(mlp_params())),
    )
    for i in range(7):
        pair = compiled(*pair, X, Y, fresh=i % 3 == 0, measured=i % 2 == 0)
    same(scanned, pair, 1e-12)


def test_the_step_of_the_preconditioner_and_a_schedule():
    plan, records, grads = batch()
    rule, steps = kf.Fixed(0.3, 0.9, kf.KLClip(1e-3)), 3
    tx = kj.kfac(plan, CHEAP, schedules=kf.Schedules(lambda t: 0.1 * 0.5**t, 0.9), step=rule)
    pre = kf.Preconditioner(CHEAP, kf.Clocks(), kf.Schedules(lambda t: 0.1 * 0.5**t, 0.9), step=rule)
    host = jax.tree.map(np.asarray, (records, plan.matrices(grads)))
    state, core = tx.init(mlp_params()), pre.init(plan.blocks, np.asarray(X))
    update = quick(tx.update, records=records)
    for _ in range(steps):
        got, state = update(grads, state)
        want, core, _ = pre.step(core, *host)
        same(plan.matrices(got), want, 1e-12)
    other = update(grads, state, damping=jnp.asarray(3.0))[0]
    assert not np.allclose(jax.tree.leaves(other)[0], jax.tree.leaves(got)[0])


def test_factored_gradients_give_the_same_directions():
    plan, tx = batch()[0], training()[1]

    @partial(jax.jit, compiler_options=FAST)
    def both(params, state, x):
        captured = kj.capture(plan, params, x)
        grads, factored = (f(captured.prediction) for f in (captured.gradients, captured.factored))
        one = tx.update(grads, state, records=None, fresh=False)[0]
        two = tx.update(grads, state, records=None, fresh=False, factored=factored)[0]
        return plan.matrices(grads), factored, one, two

    state = refreshed()[1]
    assert not both(mlp_params(), state, X)[1]  # 6 rows are more than these layers are wide
    matrices, factored, one, two = both(mlp_params(), state, X[:2])
    assert set(factored) == set(matrices)
    for name, matrix in matrices.items():
        np.testing.assert_allclose(factored[name].dense(), matrix, rtol=1e-12, atol=1e-14)
    same(one, two, 1e-12)


def test_chain_masked_partition_and_apply_if_finite():
    (_, records, grads), tx = batch(), training(CHEAP)[1]
    params = mlp_params()
    alone = tx.update(grads, tx.init(params), params, records=records)[0]

    def through(outer):
        return quick(outer.update, records=records)(grads, outer.init(params), params)[0]

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
    tx = kj.kfac(plan, CHEAP)

    @partial(jax.jit, compiler_options=FAST)
    def step(params, state):
        captured = kj.capture(plan, params, X)
        records = captured.records(kf.type2(LOSS, captured.prediction), 6)
        grads = captured.gradients(captured.prediction / 6)
        return grads, *tx.update(grads, state, params, records=records, fresh=True)

    grads, moves, state = step(params, tx.init(params))
    same({k: moves[k] for k in ("odd", "never", "count")}, {k: grads[k] for k in ("odd", "never", "count")})
    assert not np.allclose(moves["net"][0][0], grads["net"][0][0])
    assert set(state.codes) == {"net.0.0", "net.1.0", "never", "odd"}


def test_an_indefinite_factor_keeps_the_previous_inverse_and_counts_it():
    (_, records, grads), tx = batch(), training()[1]
    update = quick(tx.update, records=records)
    _, state = refreshed()
    layers = dict(state.core.layers)
    broken = layers["0.0"].A - 50.0 * jnp.eye(6)
    layers["0.0"] = replace(layers["0.0"], A=broken)
    state = state._replace(core=replace(state.core, layers=layers))
    kept = state.core.layers["0.0"].inverse
    moves, state = update(grads, state, fresh=True)
    same(state.core.layers["0.0"].inverse, kept)
    assert state.codes["0.0"].tolist() == [kf.Code.PREVIOUS]
    assert state.counts.tolist() == [3, 0, 0, 1] + [0] * (len(kf.Code) - 4)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(moves))


def test_a_gradient_that_is_not_finite_moves_nothing():
    (_, records, grads), tx = batch(), training(CHEAP)[1]
    grads = jax.tree.map(lambda g: g * jnp.nan, grads)
    moves, state = quick(tx.update, records=records)(grads, tx.init(mlp_params()))
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
    with pytest.raises(ValueError, match="init got params without an array of real numbers"):
        optax.partition({"one": tx, "other": optax.sgd(0.1)}, lambda params: "other").init(mlp_params())
    unchanged = tx.update(grads, state, records=None, fresh=False)[0]
    same(unchanged, grads)


def test_a_core_is_taken_whole():
    """`core=` is methods, clocks, schedules and step at once."""
    plan, _, _, _ = training()
    core = kf.Preconditioner(kf.EKFAC(), kf.Clocks(2, 4), kf.Schedules(damping=0.2), step=kf.Fixed(0.5))
    one = kj.kfac(plan, core=core).init(mlp_params())
    two = kj.kfac(plan, kf.EKFAC(), kf.Clocks(2, 4), kf.Schedules(damping=0.2), kf.Fixed(0.5)).init(mlp_params())
    assert jax.tree.structure(one) == jax.tree.structure(two)
    narrow = kj.kfac(plan, core=kf.Preconditioner(kf.KFAC(), widest=3)).init(mlp_params())
    assert all(layer.A.ndim == 2 for layer in narrow.core.layers.values())  # diagonals of sides wider than 3
    with pytest.raises(ValueError, match="both core and clocks are given"):
        kj.kfac(plan, clocks=kf.Clocks(7, 7), core=core)
    with pytest.raises(ValueError, match="ranks, which do not run inside jit"):
        kj.kfac(plan, core=kf.Preconditioner(kf.KFAC(), comm=kf.Serial(0, 2)))


def test_a_method_that_rests_cannot_be_traced():
    plan, _, _, _ = training()
    tx = kj.kfac(plan, kf.FNGD(steps=2))
    grads = jax.tree.map(jnp.ones_like, mlp_params())
    with pytest.raises(ValueError, match=r"rest in some epochs.*run it outside jit"):
        jax.jit(lambda g, s: tx.update(g, s, records=None, fresh=False))(grads, tx.init(mlp_params()))
