"""Replicas of one program, each with its own part of the batch: shard_map, pmap, explicit meshes."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import kfaccore as kf
from jax_models import FAST, mlp, mlp_params, normal
from jax_needed import jax, jnp, kj

HERE = Path(__file__).parent
PAIRS = ["shard_map:words", "checked:tuned", "pmap:conv", "explicit:kfac"]


def test_four_devices_equal_one():
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    env = {**os.environ, "PYTHONPATH": path, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "ignore", str(HERE / "jax_replicas_script.py"), *PAIRS]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "same", done.stderr[-3000:]


X = normal((6, 5), seed=2)


def updated(tx, plan, x):
    captured = kj.capture(plan, mlp_params(), x)
    records = captured.records(kf.type2(kf.Gaussian(), captured.prediction), len(x))
    return tx.update(captured.gradients(captured.prediction / len(x)), tx.init(mlp_params()), records=records)[0]


def test_an_axis_that_nobody_spoke_of_is_refused():
    plan = kj.plan(mlp, mlp_params(), X)

    def under(axis_name, name="d"):
        tx = kj.kfac(plan, kf.Diagonal(), axis_name=axis_name)
        run = jax.vmap(lambda x: updated(tx, plan, x), axis_name=name)
        return jax.jit(run, compiler_options=FAST)(X.reshape(2, 3, 5))

    with pytest.raises(ValueError, match=r"kfac\(plan, axis_name='d'\) to average statistics over it, axis_name=\(\)"):
        under(None)
    with pytest.raises(ValueError, match=r"axis_name \['e'\], and update runs under the axes \['d'\]"):
        under("e")
    apart = under(())
    for i, half in enumerate(X.reshape(2, 3, 5)):
        alone = jax.jit(partial(updated, kj.kfac(plan, kf.Diagonal()), plan), compiler_options=FAST)(half)
        for a, b in zip(jax.tree.leaves(apart), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-12)


def test_a_method_that_keeps_rows_is_refused_over_an_axis():
    plan = kj.plan(mlp, mlp_params(), X)
    with pytest.raises(ValueError, match=r"SKFAC.* keeps rows of one process"):
        kj.kfac(plan, kf.SKFAC(), axis_name="d").init(mlp_params())
    tx = kj.kfac(plan, kf.Diagonal(), axis_name="d")

    def run(x):
        captured = kj.capture(plan, mlp_params(), x)
        factored = captured.factored(captured.prediction)
        state = tx.init(mlp_params())
        return tx.update(mlp_params(), state, records=None, fresh=False, factored=factored)[0]

    with pytest.raises(ValueError, match=r"factored gradients are each device's own"):
        jax.vmap(run, axis_name="d")(X.reshape(3, 2, 5))


def test_unequal_parts_are_weighted_by_their_n():
    """A part of the batch with fewer examples that count: a step over both is that of the whole."""
    plan = kj.plan(mlp, mlp_params(), X)
    method = kf.Diagonal()
    tx = kj.kfac(plan, method, axis_name="d")
    one = kj.kfac(plan, method)
    weights = jnp.asarray([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])

    def run(tx, x, w):
        captured = kj.capture(plan, mlp_params(), x)
        n = jnp.sum(w)
        draws = kf.type2(kf.Gaussian(), captured.prediction) * w[:, None]
        records = captured.records(draws, n)
        grads = captured.gradients(captured.prediction * w[:, None] / n)
        return tx.update(grads, tx.init(mlp_params()), records=records)[0]

    devices = jax.vmap(partial(run, tx), axis_name="d")
    apart = jax.jit(devices, compiler_options=FAST)(X.reshape(2, 3, 5), weights)
    whole = jax.jit(lambda: run(one, X, weights.reshape(-1)), compiler_options=FAST)()
    for a, b in zip(jax.tree.leaves(apart), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a[0], b, rtol=1e-11)
        np.testing.assert_allclose(a[1], b, rtol=1e-11)


def test_a_model_that_sums_over_devices_is_planned_outside_of_them():
    """BatchNorm over two axes: a step of all devices is that of the whole batch."""

    def apply(p, x, names=("d", "e")):
        h = x @ p["w"]
        mean = h.mean(0)
        square = (h**2).mean(0)
        if names:
            mean, square = jax.lax.pmean((mean, square), names)
        return jnp.tanh((h - mean) / jnp.sqrt(square - mean**2 + 0.1) * p["g"]) @ p["v"]

    params = dict(zip("wgv", normal((5, 4), (4,), (4, 3)), strict=True))
    x = normal((8, 5), seed=2)
    draws = normal((1, 8, 3), seed=3)

    def run(plan, tx, x, draws):
        captured = kj.capture(plan, params, x)
        records = captured.records(draws, len(x), fisher=kf.monte_carlo)
        return tx.update(captured.gradients(draws[0] / len(x)), tx.init(params), records=records)[0]

    with pytest.raises(NameError) as caught:
        kj.plan(apply, params, x[:2])
    assert any("plan(axis_name=...)" in note for note in caught.value.__notes__)
    plan = kj.plan(apply, params, x[:2], axis_name=("d", "e"))
    assert [layer.name for layer in plan.layers if layer.mixed] == ["w"]
    devices = partial(run, plan, kj.kfac(plan, axis_name=("d", "e")))
    split = x.reshape(2, 2, 2, 5), draws.reshape(1, 2, 2, 2, 3)
    named = jax.vmap(jax.vmap(devices, (0, 1), axis_name="e"), (0, 1), axis_name="d")
    got = jax.jit(named, compiler_options=FAST)(*split)
    alone = kj.plan(partial(apply, names=()), params, x)
    want = jax.jit(partial(run, alone, kj.kfac(alone)), compiler_options=FAST)(x, draws)
    for name, whole in want.items():
        np.testing.assert_allclose(got[name], np.broadcast_to(whole, got[name].shape), rtol=1e-10)
