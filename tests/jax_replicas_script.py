"""Run by test_jax_replicas on four devices: the step of replicas and of explicit meshes against that of one device."""

from __future__ import annotations

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import kfaccore as kf
import kfaccore_jax as kj
from jax_models import FAST, convolutions, embedding_and_position, mlp, mlp_params, normal

jax.config.update("jax_enable_x64", True)
N, STEPS = 8, 2
MESH = Mesh(np.array(jax.devices()), ("d",))


def image():
    apply, params, _ = convolutions()
    return apply, params, normal((N, 5, 4, 2), seed=2)


def words():
    apply, params, _ = embedding_and_position()
    return apply, params, jnp.asarray(np.random.default_rng(3).integers(0, 7, (N, 5)))


MODELS = {"mlp": lambda: (mlp, mlp_params(), normal((N, 5), seed=2)), "image": image, "words": words}


def setting(model, method, step, axis):
    apply, params, x = MODELS[model]()
    plan = kj.plan(apply, params, x)
    loss = kf.Gaussian()
    tx = kj.kfac(plan, method, kf.Clocks(1, 2), kf.Schedules(0.1, 0.9), step, axis_name=axis)
    outputs = jax.eval_shape(apply, params, x).shape[1:]

    def run(params, state, x, y, noise):
        captured = kj.capture(plan, params, x)
        f = captured.prediction
        draws = kf.monte_carlo(loss, f, noise)
        slope = (f - y) / len(x)
        own = slope if step.judges else None
        records = captured.records(draws, len(x), one_by_one=x.ndim == 4, fisher=kf.monte_carlo, cotangent=own)
        grads = captured.gradients(slope)
        judged = {}
        if step.judges:
            judged = {"value": jnp.mean((f - y) ** 2) / 2 * y.shape[1]}
            judged["value_fn"] = lambda p: jnp.mean((apply(p, x) - y) ** 2) / 2 * y.shape[1]
        moves, state = tx.update(grads, state, params, records=records, **judged)
        return jax.tree.map(lambda p, m: p - 0.1 * m, params, moves), state, moves

    y = normal((N, *outputs), seed=5)
    return tx, run, params, x, y, normal((2, N, *outputs), seed=6)


def trained(run, tx, params, *batch):
    state = tx.init(params)
    if not isinstance(jax.tree.leaves(params)[0], jax.Array):
        state = jax.device_get(state)  # on no device yet
    for _ in range(STEPS):
        params, state, _ = run(params, state, *batch)
    return jax.device_get((params, state.core.layers))


def same(got, want, name):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11, err_msg=f"{name} {jax.tree_util.keystr(path)}")


def one_device(*what):
    tx, run, *rest = setting(*what, None)
    return trained(jax.jit(run, compiler_options=FAST), tx, *rest)


def sharded(what, check_vma):
    tx, run, params, x, y, noise = setting(*what, "d")
    split = (P(), P(), P("d"), P("d"), P(None, "d"))
    params, x, y, noise = jax.device_get((params, x, y, noise))
    if hasattr(jax, "shard_map"):
        shard_map = partial(jax.shard_map, check_vma=check_vma)
    else:  # jax 0.6
        from jax.experimental.shard_map import shard_map as before

        shard_map = partial(before, check_rep=check_vma)
    checked = shard_map(run, mesh=MESH, in_specs=split, out_specs=(P(), P(), P()))
    return trained(jax.jit(checked, compiler_options=FAST), tx, params, x, y, noise)


def mapped(what):
    tx, run, params, x, y, noise = setting(*what, "d")
    parts = [a.reshape(4, N // 4, *a.shape[1:]) for a in (x, y)]
    draws = jnp.moveaxis(noise.reshape(2, 4, N // 4, *noise.shape[2:]), 1, 0)
    pmapped = jax.pmap(run, axis_name="d", in_axes=(None, None, 0, 0, 0), out_axes=(None, None, 0))
    return trained(pmapped, tx, params, *parts, draws)


def explicit(what):
    tx, run, params, x, y, noise = setting(*what, None)
    mesh = jax.make_mesh((4,), ("d",))
    params = jax.device_put(params, NamedSharding(mesh, P()))
    x, y = jax.device_put((x, y), NamedSharding(mesh, P("d")))
    noise = jax.device_put(noise, NamedSharding(mesh, P(None, "d")))
    traces = []

    def counted(*args):
        traces.append(0)
        return run(*args)

    found = trained(jax.jit(counted, compiler_options=FAST), tx, params, x, y, noise)
    assert len(traces) == (1 if hasattr(jax, "shard_map") else 2)  # make_mesh of jax 0.6 is no explicit mesh
    return found


TUNED, FIXED = kf.SelfTuning(), kf.Fixed()
CASES = {
    "kfac": ("mlp", kf.KFAC(), FIXED),
    "words": ("words", kf.EKFAC(), FIXED),
    "conv": ("image", kf.Diagonal(), FIXED),
    "tuned": ("mlp", kf.Diagonal(), TUNED),
}
WAYS = {
    "shard_map": partial(sharded, check_vma=False),
    "checked": partial(sharded, check_vma=True),
    "pmap": mapped,
    "explicit": explicit,
}


def independent():
    """axis_name=(): four devices train four models, as they would alone."""
    tx, run, params, x, y, noise = setting("mlp", kf.Diagonal(), FIXED, ())
    parts = [a.reshape(4, N // 4, *a.shape[1:]) for a in (x, y)]
    draws = jnp.moveaxis(noise.reshape(2, 4, N // 4, *noise.shape[2:]), 1, 0)
    many = jax.pmap(run, axis_name="d", in_axes=(None, None, 0, 0, 0))(params, tx.init(params), *parts, draws)[2]
    for i in range(4):
        same(
            jax.tree.map(lambda m, i=i: m[i], many),
            run(params, tx.init(params), *(p[i] for p in parts), draws[i])[2],
            i,
        )


def main(pairs):
    assert len(jax.devices()) == 4
    want = {}
    for pair in pairs:
        way, case = pair.split(":")
        if case not in want:
            want[case] = one_device(*CASES[case])
        same(WAYS[way](CASES[case]), want[case], pair)
    independent()
    print("same")


if __name__ == "__main__":
    main(sys.argv[1:])
