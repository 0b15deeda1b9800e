"""No leaf is left: rows that all examples share, coupled examples, tied and concatenated leaves, against autograd."""

from __future__ import annotations

from functools import cache, partial

import numpy as np
import pytest

import kfaccore as kf
from jax_checks import close, examples, reference
from jax_models import FAST
from jax_needed import jax, jnp, kj, optax
from jax_shared import COUPLED, MODELS


@cache
def made(name):
    needs, make = MODELS[name]
    for module in needs:
        pytest.importorskip(module)
    return make()


@pytest.mark.parametrize("name", MODELS)
def test_records_add_up_to_the_gradient_of_the_batch(name):
    """Of every leaf, summed over examples; example by example where nothing is shared or coupled."""
    apply, params, x = made(name)
    plan = kj.plan(apply, params, x, strict=True)

    @partial(jax.jit, compiler_options=FAST)
    def run(params, x):
        captured = kj.capture(plan, params, x)
        draws = jnp.asarray(np.random.default_rng(7).normal(size=(2, *captured.prediction.shape)))
        records = captured.records(draws, x.shape[0], fisher=kf.monte_carlo)
        totals = {}
        for layer in plan.layers:
            J = records[layer.name].examples()
            draw_first = J.reshape(2, -1, *J.shape[-3:]) if not layer.turned else J[0].reshape(1, 2, -1, *J.shape[-2:])
            total = J.sum(2) if not layer.turned else jnp.moveaxis(draw_first, 0, 2).sum(1)
            totals[layer.name] = total
        zeros = jax.tree.map(jnp.zeros_like, params)
        got = jax.vmap(lambda one: plan.tree(zeros, one))(totals)
        want = jax.vmap(lambda draw: jax.grad(lambda p: jnp.vdot(apply(p, x), draw))(params))(draws)
        return got, want, records, draws

    got, want, records, draws = run(params, x)
    close(got, want)
    if name not in COUPLED and not any(layer.common or layer.turned for layer in plan.layers):
        close(examples(plan, params, records), reference(apply, params, draws, x))


def blocks_of_the_loss(apply, params, x, plan, hessian_root):
    """Exact blocks, example by example: sum over examples and columns of vec(J) vec(J)^T / n, from jacrev alone."""

    def one(matrices, x):
        return apply(plan.tree(params, matrices), x[None])[0]

    J = jax.vmap(lambda x: jax.jacrev(one)(plan.matrices(params), x))(x)
    J = {
        name: j.reshape(len(x), -1, plan.blocks[name].blocks, plan.blocks[name].d_out * plan.blocks[name].d_in)
        for name, j in J.items()
    }
    roots = {name: jnp.einsum("nck,ncbd->nkbd", hessian_root, j) for name, j in J.items()}
    return {name: jnp.einsum("nkbd,nkbe->bde", r, r) / len(x) for name, r in roots.items()}


@pytest.mark.parametrize("name", ["tied_embedding", "tied_autoencoder"])
def test_a_tied_layer_has_the_exact_block_of_both_uses(name):
    apply, params, x = made(name)
    plan = kj.plan(apply, params, x, strict=True)

    @jax.jit
    def blocks(params, x):
        captured = kj.capture(plan, params, x)
        draws = jnp.asarray(np.random.default_rng(1).normal(size=(3, *captured.prediction.shape)))
        records = captured.records(draws, len(x))
        root = jnp.moveaxis(draws.reshape(3, len(x), -1), 0, -1)
        want = blocks_of_the_loss(lambda p, x: apply(p, x).reshape(len(x), -1), params, x, plan, root)
        return records, {name: kf.dense(record) for name, record in records.items()}, want

    records, got, want = blocks(params, x)
    for layer in plan.layers:
        np.testing.assert_allclose(got[layer.name], want[layer.name], rtol=1e-10, atol=1e-13)
    (tied,) = [layer for layer in plan.layers if layer.turned]
    record = records[tied.name]
    block = plan.blocks[tied.name]
    basis = jnp.eye(block.d_out * block.d_in).reshape(-1, 1, block.d_out, block.d_in)

    @jax.jit
    def diagonal(record):
        state = kf.settle(kf.KFAC(), record, 1, 0.0)
        return jax.vmap(lambda v: jnp.vdot(v, kf.KFAC().matvec(state, v, kf.Hyper(0, 0.0, 0.0))))(basis)

    trace = diagonal(record).sum()
    rows = np.sum(np.asarray(record.g) ** 2) / len(x)  # rows a have length one: the trace of expand's F
    np.testing.assert_allclose(trace, rows, rtol=1e-10)


def test_what_is_shared_is_unbiased_for_draws_of_independent_signs():
    """The mean over all sign patterns of an example and draw is the block example by example."""
    apply, params, x = made("positions_by_a_range")
    x = x[:3]
    plan = kj.plan(apply, params, x, strict=True)
    captured = kj.capture(plan, params, x)
    columns = kf.type2(kf.Gaussian(), captured.prediction)
    signs = jnp.asarray(np.array(np.meshgrid(*[[-1.0, 1.0]] * 3)).reshape(3, -1).T)
    draws = (signs[:, None, :, None] * columns[None]).reshape(-1, *columns.shape[1:]) * len(signs) ** -0.5
    records = captured.records(draws, 3, fisher=kf.monte_carlo)
    assert records["q"].batch == 1
    root = jnp.moveaxis(columns, 0, -1)
    want = jax.jit(lambda params, x: blocks_of_the_loss(apply, params, x, plan, root))(params, x)
    for name in plan.blocks:
        np.testing.assert_allclose(kf.dense(records[name]), want[name], rtol=1e-10, atol=1e-13)
    with_signs = captured.records(columns, 3, fisher=kf.type2)
    np.testing.assert_array_equal(with_signs["w"].g, captured.records(columns, 3)["w"].g)
    assert not np.allclose(with_signs["q"].g, captured.records(columns, 3, fisher=kf.monte_carlo)["q"].g)


def odd(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ jnp.exp(p["e"]) * jnp.max(p["m"])


ODD = {"w": jnp.ones((4, 3)) / 3, "b": jnp.zeros(3), "e": jnp.ones((3, 2)) / 4, "m": jnp.ones(2)}


def test_uncovered_leaves_have_the_diagonal_of_the_same_draws():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(6, 4)))
    plan = kj.plan(odd, ODD, x)
    assert plan.uncovered == ("e", "m")
    captured = kj.capture(plan, ODD, x)
    draws = jnp.asarray(np.random.default_rng(3).normal(size=(2, 6, 2)))
    records = captured.records(draws, 6, fisher=kf.monte_carlo)
    grads = captured.gradients(captured.prediction / 6)
    tx = kj.kfac(plan, kf.KFAC(), schedules=kf.Schedules(0.1, 0.9), uncovered=kf.Diagonal())
    moves, _ = jax.jit(tx.update)(grads, tx.init(ODD), records=records)
    alone = kj.accumulate(tx, 1)
    summed, _ = jax.jit(lambda g, s, r: alone.update(g, s, ODD, records=r))(grads, alone.init(ODD), records)
    for name in plan.uncovered:
        np.testing.assert_allclose(summed[name], moves[name], rtol=1e-12)
        J = jax.vmap(lambda d: jax.grad(lambda p: jnp.vdot(odd(p, x), d))(ODD))(draws)[name]
        np.testing.assert_allclose(moves[name], grads[name] / ((J**2).sum(0) / 6 + 0.1), rtol=1e-10)
    plain = kj.kfac(plan, kf.KFAC(), schedules=kf.Schedules(0.1, 0.9))
    np.testing.assert_array_equal(plain.update(grads, plain.init(ODD), records=records)[0]["e"], grads["e"])


def test_another_transformation_takes_what_is_left():
    x = jnp.ones((6, 4))
    plan = kj.plan(odd, ODD, x)
    tx = kj.kfac(plan, kf.Diagonal(), rest=optax.scale_by_adam())
    state = tx.init(ODD)
    assert set(state.core.layers) == {"w"}
    captured = kj.capture(plan, ODD, x)
    grads = captured.gradients(captured.prediction / 6)
    records = captured.records(jnp.ones((1, 6, 2)), 6, fisher=kf.monte_carlo)
    moves, state = tx.update(grads, state, ODD, records=records)
    np.testing.assert_allclose(moves["e"], np.sign(grads["e"]), rtol=1e-6)
    assert int(state.rest.count) == 1
    with pytest.raises(ValueError, match=r"take the part before the rate, such as optax.scale_by_adam\(\)"):
        kj.kfac(plan, rest=optax.adam(1e-3)).init(ODD)
    with pytest.raises(ValueError, match="both uncovered and rest"):
        kj.kfac(plan, rest=optax.scale_by_adam(), uncovered=kf.Diagonal())


@pytest.mark.parametrize("given", ["rest", "graft"])
def test_a_gradient_that_is_not_finite_leaves_another_transformation_what_it_was(given):
    plan = kj.plan(odd, ODD, jax.ShapeDtypeStruct((6, 4), float))
    tx = kj.kfac(plan, kf.Identity(), **{given: optax.scale_by_adam() if given == "rest" else optax.adam(0.1)})
    grads = jax.tree.map(jnp.ones_like, ODD)
    _, before = tx.update(grads, tx.init(ODD), ODD, records=None, fresh=False)
    moves, after = tx.update(grads | {"e": grads["e"] * jnp.nan}, before, ODD, records=None, fresh=False)
    assert not any(np.any(moves[name]) for name in ("e", "m"))
    for old, new in zip(jax.tree.leaves(before.rest), jax.tree.leaves(after.rest), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_step_of_its_own_rate_moves_every_leaf_out_of_the_box():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(6, 4)))
    plan = kj.plan(odd, ODD, x)
    tx = kj.kfac(plan, kf.Diagonal(), step=kf.SelfTuning())

    def value(p):
        return 0.5 * jnp.sum((odd(p, x) - 1) ** 2) / 6

    @jax.jit
    def step(params):
        captured = kj.capture(plan, params, x)
        f = captured.prediction
        records = captured.records(kf.type2(kf.Gaussian(), f), 6, fisher=kf.type2)
        judged = {"value": value(params), "value_fn": value}
        return tx.update(captured.gradients((f - 1) / 6), tx.init(params), params, records=records, **judged)[
            0
        ], records

    moves, records = step(ODD)
    assert all(np.any(m) for m in jax.tree.leaves(moves))
    assert value(jax.tree.map(jnp.subtract, ODD, moves)) < value(ODD)
    with pytest.raises(ValueError, match=r"layers \['e', 'm'\] have gradients but no records, which SelfTuning"):
        tx.update(ODD, tx.init(ODD), ODD, records=dict(records), value=value(ODD), value_fn=value)
    for left in ({"uncovered": kf.Identity()}, {"rest": optax.scale_by_adam()}):
        with pytest.raises(ValueError, match=r"leave out rest, and give uncovered=Diagonal\(\)"):
            kj.kfac(plan, step=kf.SelfTuning(), **left)


@pytest.mark.parametrize("hidden", ["w", "b"])
def test_own_gradients_are_those_of_the_part_that_is_not_hidden(hidden):
    """Of a layer without its weight or its bias: the step of a model that has that part for a constant."""
    x = jnp.asarray(np.random.default_rng(2).normal(size=(6, 4)))
    full = {"w": jnp.asarray(np.random.default_rng(3).normal(size=(4, 3))), "b": jnp.ones(3)}
    part = {name: leaf for name, leaf in full.items() if name != hidden}

    def apply(p, x):
        p = full | p
        return x @ p["w"] + p["b"]

    def step(params, given):
        plan = kj.plan(apply, params, x)
        captured = kj.capture(plan, params, x)
        f = captured.prediction
        slope = f / 6
        records = captured.records(kf.type2(kf.Gaussian(), f), 6.0, fisher=kf.type2, cotangent=slope)
        grads = captured.gradients(slope)
        tx = kj.kfac(plan, kf.KFAC(), step=kf.SelfTuning())
        asked = {"value": jnp.sum(f * f) / 12, "value_fn": lambda p: jnp.sum(apply(p, x) ** 2) / 12}
        moves, _ = tx.update({k: grads[k] for k in given}, tx.init(given), given, records=records, **asked)
        return moves

    steps = [jax.jit(partial(step, params, part), compiler_options=FAST)() for params in (full, part)]
    close(*steps)
