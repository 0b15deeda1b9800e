"""Layer kinds: J from activations and gradients is the derivative, and matrices go back to parameters."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from conftest import FEW
from kfaccore.layers import Bias, Embedding, Gain, Linear
from oracle import jacobian
from rows import LAYERS


@pytest.mark.parametrize("layer", LAYERS, ids=lambda r: r.name)
def test_every_layer_kind(layer, xp, rng):
    """Records fit the block, draws come first, matrices go back to parameters, and K-FAC takes the record."""
    kind, named = layer.layer, {k: rng.normal(size=shape) for k, shape in layer.parameters.items()}
    x = rng.integers(0, layer.ids, layer.inputs) if layer.ids else rng.normal(size=layer.inputs)
    gy = rng.normal(size=(2, *layer.outputs))

    @xp.whole
    def seen(named, x, gy):
        matrix = kind.matrix(named)
        record = kf.Record(kind.activations(x), kind.gradients(gy, draws=True), 6.0)
        single = kf.Record(kind.activations(x), kind.gradients(gy[1, ...]), 6.0)
        assert kf.Block.of(record) == kind.block()
        assert record.draws == 2
        direction = kf.direction(record, matrix, damping=0.1)
        return kind.parameters(matrix), record.g[1, ...], single.g[0, ...], matrix, direction

    back, second, alone, matrix, direction = seen({k: xp.put(v) for k, v in named.items()}, xp.put(x), xp.put(gy))
    assert set(back) == set(named)
    assert all(np.array_equal(xp.get(back[k]), v) for k, v in named.items())
    assert np.array_equal(xp.get(second), xp.get(alone))
    assert tuple(matrix.shape)[-2:] == (kind.block().d_out, kind.block().d_in)
    assert np.isfinite(xp.get(direction)).all()
    assert direction.shape == matrix.shape


@pytest.mark.parametrize("layer", LAYERS, ids=lambda r: r.name)
@pytest.mark.parametrize("xp", FEW, ids=lambda n: n.name)
def test_matrix_times_activations_is_the_forward(layer, xp, rng):
    """Output by output: the draw that asks for one output alone finds it in g and matrix @ a."""
    named = {k: rng.normal(size=shape) for k, shape in layer.parameters.items()}
    x = rng.integers(0, layer.ids, layer.inputs) if layer.ids else rng.normal(size=layer.inputs)
    y = layer.forward(x, **named)
    assert y.shape == layer.outputs
    batch, units = len(y), y[0].size
    each = np.repeat(np.eye(units).reshape(units, 1, *y.shape[1:]), batch, axis=1)
    g = layer.gradients(layer.layer, xp.put(each), xp.put(x))
    record = kf.Record(layer.layer.activations(xp.put(x)), g, 1.0)
    matrix = xp.get(layer.layer.matrix({k: xp.put(v) for k, v in named.items()}))
    matrix = matrix.reshape(record.blocks, record.d_out, record.d_in)
    z = np.einsum("boi,bnsi->bnso", matrix, xp.get(record.rows()))
    found = np.einsum("vbnso,bnso->nv", xp.get(record.g), z)
    np.testing.assert_allclose(found, y.reshape(batch, units), rtol=0, atol=1e-13 * np.abs(y).max())


def grad_of(record: kf.Record) -> np.ndarray:
    return record.examples()[:, 0].sum(1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(6, 4), (6, 2, 3, 4)])
def test_linear(xp, rng, bias, transposed, shape):
    layer = Linear(4, 3, bias, transposed)
    named = {"weight": rng.normal(size=(4, 3) if transposed else (3, 4))}
    named |= {"bias": rng.normal(size=3)} if bias else {}
    M = layer.matrix({k: xp.put(v) for k, v in named.items()})
    for key, value in layer.parameters(M[None, ...]).items():
        assert np.array_equal(xp.get(value), named[key])
    x, gy = rng.normal(size=shape), rng.normal(size=(2, *shape[:-1], 3))
    record = kf.Record(layer.activations(xp.put(x)), layer.gradients(xp.put(gy), draws=True), 6.0)

    def y(W):
        return np.concatenate([x, np.ones_like(x[..., :1])], -1)[..., : W.shape[1]] @ W.T

    J = jacobian(y, xp.get(M)).reshape(-1, M.shape[0] * M.shape[1])
    want = np.stack([g.ravel() @ J for g in gy]).reshape(2, 3, -1)
    np.testing.assert_allclose(grad_of(kf.Record(xp.get(record.a), xp.get(record.g), 6.0)), want, rtol=1e-12)
    block = layer.block()
    assert (block.d_out, block.d_in) == (record.d_out, record.d_in)


def test_embedding(rng):
    layer, ids, gy = Embedding(7, 3), rng.integers(0, 7, (5, 2, 2)), rng.normal(size=(5, 2, 2, 3))
    record = kf.Record(layer.activations(ids), layer.gradients(gy), 5.0)
    want = np.zeros((7, 3))
    np.add.at(want, ids, gy)
    np.testing.assert_allclose(grad_of(record)[0], want.T, rtol=1e-12)
    table = rng.normal(size=(7, 3))
    assert np.array_equal(layer.parameters(layer.matrix({"weight": table}))["weight"], table)
    assert layer.block() == kf.Block(3, 7, diagonal_in=True) == kf.Block.of(record)


def test_gain_and_bias_are_lone_vectors(rng):
    xhat, gy = rng.normal(size=(5, 6, 3)), rng.normal(size=(5, 6, 3))
    gain, bias = Gain(3), Bias(3)
    for layer, g, want in (
        (gain, gain.scaled(gy, xhat), (gy * xhat).sum((0, 1))),
        (bias, bias.gradients(gy), gy.sum((0, 1))),
    ):
        record = kf.Record(layer.activations(xhat), g, 5.0)
        np.testing.assert_allclose(grad_of(record)[0, :, 0], want, rtol=1e-12)
        assert kf.Block.of(record) == layer.block()
        (name,) = layer.parameters(np.ones((1, 3, 1)))
        v = rng.normal(size=3)
        assert np.array_equal(layer.parameters(layer.matrix({name: v}))[name], v)
        F, state = kf.dense(record)[0], kf.settle(kf.KFAC(kf.reduce), record)
        got = kf.KFAC().matvec(state, v[None, :, None], kf.Hyper(0, 0.0, 0.0))[0, :, 0]
        np.testing.assert_allclose(got, F @ v, rtol=1e-12)


def test_wrong_features_are_named():
    with pytest.raises(ValueError, match=r"x has shape \(6, 5\); need 4 features"):
        Linear(4, 3).activations(np.ones((6, 5)))
    with pytest.raises(ValueError, match=r"gy has shape \(6, 4\); need 3 features"):
        Linear(4, 3).gradients(np.ones((6, 4)))
