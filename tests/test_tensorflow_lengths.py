"""Layers that Keras writes in one way for a length that is told and in another for any: one plan, one direction."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from tf_shared import SGD, L, crossentropy, keras, kt, tf
from tf_shared import double as double


def attention(kind, *sizes, **options):
    return lambda: lambda x: kind(*sizes, **options)(x, x)


LAYERS = {
    "attention": attention(L.MultiHeadAttention, 2, 3),
    "attention, outputs of two axes": attention(L.MultiHeadAttention, 2, 3, value_dim=2, output_shape=(5, 2)),
    "grouped queries": attention(L.GroupQueryAttention, 3, 4, 2),
    "heads": lambda: L.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="de"),
    "heads first": lambda: L.EinsumDense("abc,cde->adbe", (2, None, 3), bias_axes="de"),
    "turned": lambda: L.EinsumDense("abc,ced->abde", (None, 2, 3), bias_axes="de"),
    "a bias of one axis": lambda: L.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="e"),
}


def made(make, length):
    keras.utils.set_random_seed(1)
    x = keras.Input((length, 4))
    return keras.Model(x, L.Dense(3)(L.Activation("tanh")(make()(x))))


def shaken(net, rng):
    net.set_weights([w + rng.normal(size=w.shape) / 3 for w in net.get_weights()])
    return net


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_a_length_that_is_told_is_no_other_layer(make):
    found = []
    for length in (None, 5):
        parts = kt.coverage(made(make, length), strict=True).parts
        found.append([{role: matrix.key for role, matrix in part.matrices.items()} for part in parts])
    assert found[0] == found[1]


@pytest.mark.parametrize("judged", [False, True])
def test_attention_trains_on_batches_of_any_length(judged, rng):
    """The first step's batch makes the plan; of one length, it is that of a model that tells it."""
    x, y = rng.normal(size=(8, 5, 4)), rng.integers(0, 3, (8, 5))
    found = []
    for length in (5, None):
        net = shaken(made(LAYERS["attention"], length), np.random.default_rng(2))
        step = kt.Optimizer(net, crossentropy(), None if judged else SGD(0.5), fisher=kf.type2)
        step.step(x, y)
        found.append(np.concatenate(net.get_weights(), None))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-9)
    losses = [float(step.step(x[:, :t], y[:, :t])) for t in (4, 3, 5)]
    assert np.isfinite(losses).all()
    assert len(step.engine.plan.parts) == 5


def test_heads_split_from_one_product_are_heads_of_their_own_matrix(rng):
    """EinsumDense against a product, its bias and a reshape: one network, one direction."""
    x, y = rng.normal(size=(8, 5, 4)), rng.integers(0, 3, (8, 5))
    values = [rng.normal(size=size) / 2 for size in ((4, 6), (6,), (6, 3), (3,))]
    found = []
    for inner in (
        [L.EinsumDense("abc,cde->abde", (5, 2, 3), bias_axes="de")],
        [L.Dense(6), L.Lambda(lambda z: tf.reshape(z, (-1, 5, 2, 3)))],
    ):
        net = keras.Sequential([keras.Input((5, 4)), *inner, L.Activation("tanh"), L.Reshape((5, 6)), L.Dense(3)])
        net.set_weights([value.reshape(w.shape) for value, w in zip(values, net.get_weights(), strict=True)])
        step = kt.Optimizer(net, crossentropy(), SGD(1.0), fisher=kf.type2, schedules=kf.Schedules(1e-2, 0.0))
        step.step(x, y)
        found.append(np.concatenate([w.ravel() for w in net.get_weights()]))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-10)
