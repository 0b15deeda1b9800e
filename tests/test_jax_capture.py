"""What the JAX adapter captures: per-example gradients from records against vmap(grad), for models of all libraries."""

from __future__ import annotations

from functools import cache, partial

import numpy as np
import pytest

import kfaccore as kf
from jax_checks import close, examples, reference
from jax_libraries import LIBRARIES
from jax_models import EXACT, FAST, mlp, mlp_params, normal
from jax_needed import jax, jnp, kj

MAKERS = {make.__name__: (None, make) for make in EXACT} | LIBRARIES
models = pytest.mark.parametrize("name", MAKERS)


@cache
def made(name):
    needs, make = MAKERS[name]
    if needs:
        pytest.importorskip(needs)
    return make()


@models
def test_examples_from_records_are_those_of_vmap_grad(name):
    apply, params, x = made(name)
    plan = kj.plan(apply, params, x, strict=True)
    assert all(row.covered for row in plan.table)

    @partial(jax.jit, compiler_options=FAST)
    def run(params, x):
        captured = kj.capture(plan, params, x)
        shape = (2, *captured.prediction.shape)
        draws = jnp.asarray(np.random.default_rng(7).normal(size=shape))
        records = captured.records(draws, x.shape[0])
        mean = captured.gradients(draws[0] / x.shape[0])
        return captured.prediction, examples(plan, params, records), reference(apply, params, draws, x), mean

    prediction, got, want, mean = run(params, x)
    close(prediction, jax.jit(apply)(params, x), 1e-13)
    close(got, want)
    close(jax.tree.map(lambda j: j[0].mean(0), want), mean)


SOME = ["fused_qkv_split", "matrix_with_bias_column", "stacked_python_loop", "heads", "convolutions", "constants"]


@pytest.mark.parametrize("name", SOME)
def test_matrices_and_back(name):
    apply, params, x = made(name)
    plan = kj.plan(apply, params, x)
    matrices = plan.matrices(params)
    assert {k: (b.blocks, b.d_out, b.d_in) for k, b in plan.blocks.items()} == {k: m.shape for k, m in matrices.items()}
    back = plan.tree(jax.tree.map(jnp.zeros_like, params), matrices)
    used = plan.tree(jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.ones_like, matrices))
    for a, b, u in zip(jax.tree.leaves(back), jax.tree.leaves(params), jax.tree.leaves(used), strict=True):
        np.testing.assert_array_equal(a, b * u)
    assert set(plan.blocks) == {layer.name for layer in plan.layers}


def test_a_plan_serves_another_batch_size():
    plan = kj.plan(mlp, mlp_params(), normal((6, 5)))
    x, draws = normal((9, 5), seed=3), jnp.ones((1, 9, 3))
    records = kj.capture(plan, mlp_params(), x).records(draws, 9)
    close(examples(plan, mlp_params(), records), reference(mlp, mlp_params(), draws, x))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_draws_by_vmap_by_loop_and_without(count):
    plan, x, draws = kj.plan(mlp, mlp_params(), normal((6, 5))), normal((6, 5)), normal((3, 6, 3), seed=4)[:count]
    captured = kj.capture(plan, mlp_params(), x)
    many, one = (captured.records(draws, 6, one_by_one=flag) for flag in (False, True))
    for name, record in many.items():
        assert record.g.shape == (count, 1, 6, 1, plan.blocks[name].d_out)
        np.testing.assert_allclose(one[name].g, record.g, rtol=1e-13, atol=1e-15)


def ggn(apply, params, x, hessian, loss):
    """Blocks, J^T H J / n of each layer by the Jacobian of the network function, and type-2 records."""
    plan = kj.plan(apply, params, x)

    def predict(matrices):
        return apply(plan.tree(params, matrices), x)

    @partial(jax.jit, compiler_options=FAST)
    def blocks(params, hessian):
        J = jax.jacrev(predict)(plan.matrices(params))
        J = {name: j.reshape(*j.shape[:2], -1) for name, j in J.items()}
        return {name: jnp.einsum("ncp,ncd,ndq->pq", j, hessian, j) / len(x) for name, j in J.items()}

    @partial(jax.jit, compiler_options=FAST)
    def records(params, x):
        captured = kj.capture(plan, params, x)
        return captured.records(kf.type2(loss, captured.prediction), 6.0)

    host = jax.tree.map(np.asarray, (blocks(params, hessian), records(params, x)))
    return plan.blocks, *host


def test_type2_records_give_the_dense_block_of_a_softmax_net():
    p, x = mlp_params(), normal((6, 5), seed=2)
    probabilities = jax.nn.softmax(mlp(p, x))
    hessian = jax.vmap(lambda q: jnp.diag(q) - jnp.outer(q, q))(probabilities)
    _, want, records = ggn(mlp, p, x, hessian, kf.SoftmaxCrossEntropy())
    for name, record in records.items():
        np.testing.assert_allclose(kf.dense(record)[0], want[name], rtol=1e-10, atol=1e-14)


def test_deep_linear_nets_are_exact_through_the_whole_path():
    def apply(p, x):
        for w, b in p:
            x = x @ w + b
        return x

    hessian = jnp.broadcast_to(jnp.eye(3), (6, 3, 3))
    blocks, want, records = ggn(apply, mlp_params(), normal((6, 5), seed=2), hessian, kf.Gaussian())
    for name, record in records.items():
        np.testing.assert_allclose(kf.dense(record)[0], want[name], rtol=1e-10, atol=1e-14)
        block, method, hyper = blocks[name], kf.KFAC(), kf.Hyper(0, 0.0, 0.0)
        state = method.init(block, record.g)
        state = method.update(state, method.measure(state, record, hyper), hyper)
        v = np.random.default_rng(6).normal(size=(1, block.d_out, block.d_in))
        applied = method.matvec(state, v, hyper)
        np.testing.assert_allclose(applied.reshape(-1), want[name] @ v.reshape(-1), rtol=1e-10, atol=1e-14)


def test_a_model_is_traced_once_less_for_its_second_program():
    """The types of what its calls give are known by those of the arguments; one pullback serves all that ask for it."""
    calls = []

    def apply(params, x):
        calls.append(x.shape)
        return mlp(params, x)

    params = mlp_params()
    x = normal((12, 5))
    plan = kj.plan(apply, params, x)

    def both(params, x):
        captured = kj.capture(plan, params, x)
        slope = captured.prediction / len(x)
        grads = captured.gradients(slope)
        assert captured.gradients(slope) is grads
        return grads, captured.factored(slope)

    calls.clear()
    first = jax.make_jaxpr(lambda *args: both(*args))(params, x)
    assert calls == [(12, 5)] * 2
    second = jax.make_jaxpr(lambda *args: both(*args))(params, x)
    assert calls == [(12, 5)] * 3
    assert str(first) == str(second)
    jax.make_jaxpr(lambda *args: both(*args))(params, x[:8])
    assert calls == [(12, 5)] * 3 + [(8, 5)] * 2


def test_a_model_that_runs_other_layers_later_is_refused():
    """Also where the types of its arguments were seen before."""
    wide = [True]

    def apply(params, x):
        if wide[0]:
            return mlp(params, x)
        (w, b), (v, c) = params
        return jnp.tanh(jnp.sin(x) @ w + b) @ v + c

    params = mlp_params()
    x = normal((12, 5))
    plan = kj.plan(apply, params, x)
    kj.capture(plan, params, x)
    wide[0] = False
    with pytest.raises(ValueError, match="apply runs other layers than when it was planned"):
        kj.capture(plan, params, x)
