"""Data parallel over global arrays: on 2 and 4 devices the step is the one of a single device."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

NEEDED = [pytest.importorskip(name) for name in ("jax", "optax")]

SCRIPT = """
import sys
import jax, jax.numpy as jnp, numpy as np
from functools import partial
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import kfaccore as kf, kfaccore_jax as kj
from jax_models import FAST, convolutions, embedding_and_position, mlp, mlp_params, normal

def run(devices, apply, params, x, method, loss, fisher):
    plan = kj.plan(apply, params, x)
    tx = kj.kfac(plan, method, kf.Clocks(1, 2), kf.Schedules(0.1, 0.9))
    y = jnp.arange(8) % 3 if isinstance(loss, kf.SoftmaxCrossEntropy) else jnp.zeros((8, 2))

    @partial(jax.jit, compiler_options=FAST)
    def step(params, state, x, y, key):
        captured = kj.capture(plan, params, x)
        f = captured.prediction
        noise = jax.random.uniform(key, (2, 8))
        draws = kf.type2(loss, f) if fisher == "type2" else kf.monte_carlo(loss, f, noise)
        records = captured.records(draws, 8.0, one_by_one=x.ndim == 4)
        grads = captured.gradients(loss.gradient(f, y) / 8)
        moves, state = tx.update(grads, state, records=records)
        return jax.tree.map(lambda p, d: p - 0.1 * d, params, moves), state

    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",), axis_types=(AxisType.Auto,))
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    p, s = jax.device_put((params, tx.init(params)), whole)
    a, b = jax.device_put((x, y), split)
    assert len(a.addressable_shards) == devices
    for i in range(3):
        p, s = step(p, s, a, b, jax.random.key(i))
    return jax.device_get((p, s))

softmax, gaussian, conv = kf.SoftmaxCrossEntropy(), kf.Gaussian(), convolutions()
net, image = (mlp, mlp_params(), normal((8, 5), seed=2)), (*conv[:2], normal((8, 5, 4, 2), seed=2))
embed = embedding_and_position()
words = (*embed[:2], jnp.asarray(np.random.default_rng(3).integers(0, 7, (8, 5))))
CASES = {
    "diagonal type2": (*image, kf.Diagonal(), gaussian, "type2"),
    "kfac type2": (*net, kf.KFAC(), softmax, "type2"),
    "kfac monte_carlo": (*words, kf.KFAC(), softmax, "monte_carlo"),
    "kfac conv": (*image, kf.KFAC(), gaussian, "type2"),
    "ekfac monte_carlo": (*net, kf.EKFAC(), softmax, "monte_carlo"),
}

count = int(sys.argv[1])
assert len(jax.devices()) == count
for name in sys.argv[2].split(","):
    one, many = run(1, *CASES[name]), run(count, *CASES[name])
    for u, v in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(u, v, rtol=1e-10, atol=1e-12, err_msg=name)
print("same")
"""
FEW = "kfac type2,ekfac monte_carlo"
ALL = f"{FEW},kfac monte_carlo,kfac conv,diagonal type2"


@pytest.mark.parametrize(("devices", "cases"), [(2, ALL), (4, FEW)], ids=["2", "4"])
def test_global_arrays_give_the_step_of_one_device(devices, cases):
    here = os.path.dirname(os.path.abspath(__file__))
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    env = {**os.environ, "PYTHONPATH": path, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(devices), cases], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "same", done.stderr[-2000:]
