"""accumulate over layers of equal sizes, which share a state: under jit, in a scan, from a state restored."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

import kfaccore as kf
from jax_models import FAST, normal
from jax_needed import jax, jnp, kj, optax

P = dict(zip("wvsbcou", normal((4, 4), (4, 4), (4,), (4,), (4,), (4, 3), (5, 4)), strict=True))
X, NOISE, Y = normal((2, 2, 6, 5), (2, 2, 1, 6, 3), (2, 2, 6, 3), seed=2)  # steps, micro-batches of a step, ...
LOSS = kf.Gaussian()


def net(p, x):
    """Two layers of 4 x 4, a gain and two biases of 4."""
    h = jnp.tanh(jnp.tanh(x @ p["u"]) @ p["w"]) * p["s"]
    return jnp.tanh(jnp.tanh(jnp.sin(h + p["b"]) @ p["v"]) + p["c"]) @ p["o"]


PLAN = kj.plan(net, P, X[0, 0])


def step(tx, params, state, x, noise, y, n):
    captured = kj.capture(PLAN, params, x)
    f = captured.prediction
    records = captured.records(kf.monte_carlo(LOSS, f, noise), n, fisher=kf.monte_carlo)
    moves, state = tx.update(captured.gradients((f - y) / len(x)), state, params, records=records)
    return optax.apply_updates(params, moves), state


def chain(method):
    return optax.chain(kj.kfac(PLAN, method, kf.Clocks(1, 1), kf.Schedules(0.1, 0.9)), optax.sgd(0.1))


def whole(method, n):
    batches = X.reshape(2, 12, 5), NOISE.swapaxes(1, 2).reshape(2, 1, 12, 3), Y.reshape(2, 12, 3)
    return jitted(chain(method), batches, n * 2)


def jitted(tx, batches, n, between=lambda state: state):
    run = jax.jit(lambda params, state, *batch: step(tx, params, state, *batch), compiler_options=FAST)
    params, state = P, tx.init(P)
    for batch in zip(*batches, strict=True):
        params, state = run(params, between(state), *batch, jnp.asarray(n))  # a traced share of the normaliser
    return params


def scanned(tx, batches, n):
    def one(carry, batch):
        return step(tx, *carry, *batch, n), None

    return jax.jit(lambda carry: jax.lax.scan(one, carry, batches)[0], compiler_options=FAST)((P, tx.init(P)))[0]


def restored(tx, batches, n):
    """Pickled within a step, whose first micro-batch waits as Stats."""
    return jitted(tx, batches, n, lambda state: pickle.loads(pickle.dumps(state)))


@pytest.mark.parametrize("way", [scanned, restored])
def test_micro_batches_of_equal_layers_equal_the_whole_batch(way):
    agrees(way, kf.KFAC())


@pytest.mark.parametrize("method", [kf.EKFAC(), kf.Diagonal()], ids=lambda method: type(method).__name__)
def test_so_do_those_of_other_methods(method):
    agrees(jitted, method)


def agrees(way, method):
    tx = kj.accumulate(chain(method), 2)
    got = way(tx, [x.reshape(4, *x.shape[2:]) for x in (X, NOISE, Y)], 6.0)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(whole(method, 6.0)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
