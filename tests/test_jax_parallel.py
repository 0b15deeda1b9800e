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
from jax_models import FAST, convolutions, normal

apply, params, _ = convolutions()
x, y = normal((8, 5, 4, 2), seed=2), normal((8, 2), seed=3)
plan = kj.plan(apply, params, x)
tx = kj.kfac(plan, kf.Diagonal(), kf.Clocks(1, 2), kf.Schedules(0.1, 0.9))

@partial(jax.jit, compiler_options=FAST)
def step(params, state, x, y):
    captured = kj.capture(plan, params, x)
    records = captured.records(kf.type2(kf.Gaussian(), captured.prediction), 8.0, one_by_one=True)
    grads = captured.gradients((captured.prediction - y) / 8)
    moves, state = tx.update(grads, state, records=records)
    return jax.tree.map(lambda p, d: p - 0.1 * d, params, moves), state

def run(devices):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",), axis_types=(AxisType.Auto,))
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    p, s = jax.device_put((params, tx.init(params)), whole)
    a, b = jax.device_put((x, y), split)
    assert len(a.addressable_shards) == devices
    for _ in range(3):
        p, s = step(p, s, a, b)
    return jax.device_get((p, s))

count = int(sys.argv[1])
assert len(jax.devices()) == count
one, many = run(1), run(count)
for u, v in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
    np.testing.assert_allclose(u, v, rtol=1e-10, atol=1e-12)
print("same")
"""


@pytest.mark.parametrize("devices", [2, 4])
def test_global_arrays_give_the_step_of_one_device(devices):
    here = os.path.dirname(os.path.abspath(__file__))
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = {**os.environ, "PYTHONPATH": path, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(devices)], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "same", done.stderr[-2000:]
