"""One file, every framework: 50 steps in torch, 50 in JAX and 50 in NumPy are 150 in NumPy."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

import numpy as np
import pytest

import kfaccore as kf
import kfaccore_numpy as kn

torch = pytest.importorskip("torch")

import kfaccore_torch as kt  # noqa: E402
from jax_needed import jax, jnp, kj  # noqa: E402

nn = torch.nn
LOSS = kf.SoftmaxCrossEntropy()
NET = kn.Sequential((4,), (kn.Dense(6), kn.Tanh(), kn.Dense(3)))
RATE = 0.05


def batch(i):
    rng = np.random.default_rng([1, i])
    x = rng.normal(size=(16, 4))
    return x, np.abs(x[:, :3]).argmax(1)


def core(method, **options):
    return kf.Preconditioner(method, kf.Clocks(2, 5), kf.Schedules(0.1, 0.9), **options)


def numpy_steps(params, state, steps, pre):
    for i in steps:
        rng = np.random.default_rng(i)
        _, state, _ = kn.step(NET, params, batch(i), LOSS, pre, state, i, rng, kn.true_labels)
    return state


def torch_steps(path, start, method):
    layers = OrderedDict(dense0=nn.Linear(4, 6), tanh1=nn.Tanh(), dense2=nn.Linear(6, 3))
    model = nn.Sequential(layers).double()
    ours = kt.Optimizer(model, LOSS, core(method, step=kf.Fixed(RATE)), fisher=kf.empirical)
    with torch.no_grad():
        for name, layer in ours.engine.plan.layers.items():
            for role, x in layer.arrays(start[name]).items():
                layer.parameters[role].copy_(torch.from_numpy(np.array(x)))
    for i in range(50):
        x, y = batch(i)
        ours.step(torch.from_numpy(x), torch.from_numpy(y))
    ours.save(path, task="one file")


def jax_steps(old, new, like, method):
    """From one file to the next, through the optax transformation."""

    def apply(params, x):
        h = jnp.tanh(x @ params["dense0"][:, :-1].T + params["dense0"][:, -1])
        return h @ params["dense2"][:, :-1].T + params["dense2"][:, -1]

    tree = kf.load(old, like=like)
    params = jax.tree.map(jnp.asarray, tree["params"])
    plan = kj.plan(apply, params, jnp.asarray(batch(0)[0]))
    tx = kj.kfac(plan, method, kf.Clocks(2, 5), kf.Schedules(0.1, 0.9))
    state = tx.init(params)
    state = state._replace(core=kf.unflatten(kf.flatten(tree["state"]), state.core))

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def step(params, state, x, y):
        captured = kj.capture(plan, params, x)
        g = LOSS.gradient(captured.prediction, y)
        records = captured.records(g[None], 16.0)
        moves, state = tx.update(captured.gradients(g / 16), state, params, records=records)
        return jax.tree.map(lambda p, m: p - RATE * m, params, moves), state

    for i in range(50, 100):
        x, y = batch(i)
        params, state = step(params, state, jnp.asarray(x), jnp.asarray(y))
    kf.save(new, {"params": params, "state": state.core})


@pytest.mark.parametrize("method", [kf.KFAC(), kf.EKFAC()], ids=["kfac", "ekfac"])
def test_torch_jax_numpy(method, tmp_path):
    start = NET.init(np.random.default_rng(2), np.asarray)
    pre = core(method, step=kf.Fixed(RATE))
    whole = dict(start)
    numpy_steps(whole, pre.init(NET.blocks(), np.zeros(1)), range(150), pre)
    like = {"params": dict(start), "state": pre.init(NET.blocks(), np.zeros(1))}
    torch_steps(tmp_path / "one", start, method)
    jax_steps(tmp_path / "one", tmp_path / "two", like, method)
    tree = kf.load(tmp_path / "two", like=like)
    assert tree["state"].step == 100
    assert kf.metadata(tmp_path / "one")["task"] == "one file"
    numpy_steps(tree["params"], tree["state"], range(100, 150), pre)
    for name, W in whole.items():
        np.testing.assert_allclose(tree["params"][name], W, rtol=1e-8, atol=1e-8)
