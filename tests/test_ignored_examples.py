"""Examples whose label is ignored: in torch and JAX their inputs count in A, and a mask makes them as absent."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf

torch = pytest.importorskip("torch")

import kfaccore_torch as kt  # noqa: E402
from jax_needed import jnp, kj  # noqa: E402

nn = torch.nn
D, C, B = 5, 3, 6


def problem():
    """(W, x, y): one layer, of which four more examples count for nothing."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(B + 4, D))
    y = np.append(rng.integers(0, C, B), [-100] * 4)
    return rng.normal(size=(C, D)), x, y


def wanted(W, x, y, masked):
    """G^-1 V A^-1 of the counted examples' G, V and n, and A of the rows that count."""
    there = y >= 0
    p = np.exp(x[there] @ W.T)
    p /= p.sum(1, keepdims=True)
    a = x[there] if masked else x
    A = a.T @ a / len(a)
    G = (np.diag(p.sum(0)) - p.T @ p) / B
    V = (p - np.eye(C)[y[there]]).T @ x[there] / B
    pi = np.sqrt((np.trace(A) / D) / (np.trace(G) / C))
    shift = np.sqrt(0.01)
    return np.linalg.solve(G + shift / pi * np.eye(C), V) @ np.linalg.inv(A + shift * pi * np.eye(D))


@pytest.mark.parametrize("masked", [False, True])
def test_torch(masked):
    W, x, y = problem()
    net = nn.Linear(D, C, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(torch.from_numpy(W))
    core = kf.Preconditioner(kf.KFAC(), schedules=kf.Schedules(0.01))
    pre = kt.Preconditioner(net, nn.CrossEntropyLoss(), core, fisher=kf.type2)
    x, target = torch.from_numpy(x), torch.from_numpy(y)
    with pre.capture(mask=(target >= 0)[:, None] if masked else None):
        f = net(x)
    pre.loss(f, target).backward()
    pre.step()
    np.testing.assert_allclose(net.weight.grad, wanted(W, x.numpy(), y, masked), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("masked", [False, "layers", "whole"])
def test_jax(masked):
    W, x, y = problem()
    params, there = {"w": jnp.asarray(W)}, jnp.asarray(y >= 0)[:, None]
    plan = kj.plan(lambda p, x: x @ p["w"].T, params, jnp.asarray(x))
    loss = kf.SoftmaxCrossEntropy(ignore=-100)
    captured = kj.capture(plan, params, jnp.asarray(x))
    f, target = captured.prediction, jnp.asarray(y)
    n = loss.normaliser(f, target)
    mask = {False: None, "layers": {layer.name: there for layer in plan.layers}, "whole": there}[masked]
    records = captured.records(kf.type2(loss, f, target), n, fisher=kf.type2, mask=mask)
    tx = kj.kfac(plan, schedules=kf.Schedules(0.01))
    moves, _ = tx.update(captured.gradients(loss.gradient(f, target) / n), tx.init(params), params, records=records)
    np.testing.assert_allclose(moves["w"], wanted(W, x, y, masked), rtol=1e-10, atol=1e-12)


def test_jax_refuses_positions_that_no_layer_has():
    W, x, y = problem()
    params = {"w": jnp.asarray(W)}
    plan = kj.plan(lambda p, x: x @ p["w"].T, params, jnp.asarray(x))
    captured = kj.capture(plan, params, jnp.asarray(x))
    loss = kf.SoftmaxCrossEntropy(ignore=-100)
    draws = kf.type2(loss, captured.prediction, jnp.asarray(y))
    with pytest.raises(ValueError, match=r"mask has shape \(10, 7\), and no layer has rows of such positions"):
        captured.records(draws, 6.0, fisher=kf.type2, mask=jnp.ones((len(x), 7), bool))
