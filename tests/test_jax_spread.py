"""State that lies along its blocks on several devices: each keeps its part, and the step is that of one device."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

NEEDED = [pytest.importorskip(name) for name in ("jax", "optax")]

SCRIPT = """
from functools import partial
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import kfaccore as kf, kfaccore_jax as kj
from jax_models import FAST, normal

# two sizes of matrices, so two loops of inverses, whose conditions are sums over the devices
up = normal(*[(3, 9)] * 4)
down = normal(*[(9, 3)] * 4, seed=1)
params = [*zip(up, down)]
x = normal((8, 3), seed=2)

def apply(params, x):
    for a, b in params:
        x = x + jnp.tanh(x @ a) @ b
    return x

plan = kj.plan(apply, params, x)
tx = kj.kfac(plan, clocks=kf.Clocks(1, 2), schedules=kf.Schedules(0.1, 0.9))

def step(params, state, x):
    captured = kj.capture(plan, params, x)
    f = captured.prediction
    records = captured.records(kf.type2(kf.Gaussian(), f), 8.0)
    moves, state = tx.update(captured.gradients(f / 8), state, records=records)
    return jax.tree.map(lambda p, d: p - 0.1 * d, params, moves), state

def run(params, state, x, **placed):
    compiled = jax.jit(step, compiler_options=FAST, **placed)
    for _ in range(3):
        params, state = compiled(params, state, x)
    return params, state

def bytes_of_first(state):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state) if leaf.ndim)

state = tx.init(params)
one = run(params, state, x)
mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
whole = NamedSharding(mesh, P())
along = NamedSharding(mesh, P("d"))
places = jax.tree.map(lambda leaf: along if leaf.ndim and leaf.shape[0] % 2 == 0 else whole, state)
there = jax.device_put((params, state, x), (whole, places, whole))
many = run(*there, out_shardings=(whole, places))
for u, v in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
    np.testing.assert_allclose(u, v, rtol=1e-10, atol=1e-12)
share = bytes_of_first(many[1]) / bytes_of_first(one[1])
assert share < 0.51, share  # clocks and the like are on each
print("same")
"""


def test_state_along_its_blocks_is_halved_on_two_devices():
    here = os.path.dirname(os.path.abspath(__file__))
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    # every collective that waits holds one of XLA's threads: with as few as this machine has cores all may wait
    threads = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2", "NPROC": "16"}
    env = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1", **threads}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "same", done.stderr[-2000:]
