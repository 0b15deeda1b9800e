"""Sparse inputs: rows of the dense product, however Keras or TensorFlow writes it."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from tf_shared import SGD, L, crossentropy, keras, kt, tf
from tf_shared import double as double


class Own(keras.Model):
    """`how` of a sparse batch and a weight, or of the dense one."""

    def __init__(self, how=None):
        super().__init__()
        self.how = how
        self.w = self.add_weight(shape=(6, 4), name="w", initializer="normal")
        self.head = L.Dense(3, name="head")

    def call(self, x):
        return self.head(tf.tanh(x @ self.w if self.how is None else self.how(x, self.w)))


def looked_up(x, w):
    ids = tf.SparseTensor(x.indices, x.indices[:, 1], x.dense_shape)
    return tf.nn.embedding_lookup_sparse(w.value, ids, x, combiner="sum")


def keras_input(how):
    return keras.Sequential(
        [keras.Input((6,), sparse=how is not None), L.Dense(4, "tanh", name="d"), L.Dense(3, name="e")]
    )


SPARSE = {
    "input of keras": (keras_input, True),
    "product": (Own, tf.sparse.sparse_dense_matmul),
    "transposed": (Own, lambda x, w: tf.sparse.sparse_dense_matmul(x, tf.transpose(w), adjoint_b=True)),
    "looked up": (Own, looked_up),
}


@pytest.fixture
def batch(rng):
    """Sparse, as it is dense, and labels; no row is empty."""
    x = rng.normal(size=(12, 6)) * (rng.random((12, 6)) < 0.5)
    x[:, 0] = 0.3
    return tf.sparse.from_dense(x), x, rng.integers(0, 3, 12)


@pytest.mark.parametrize(("make", "how"), SPARSE.values(), ids=SPARSE)
def test_sparse_rows_are_those_of_the_dense_product(make, how, batch):
    sparse, dense, y = batch
    found = []
    for given, x in ((how, sparse), (None, dense)):
        keras.utils.set_random_seed(1)
        model = make(given)
        model(x)
        kt.Optimizer(model, crossentropy(), SGD(1.0), fisher=kf.type2, strict=True).step(x, y)
        found.append(model.get_weights())
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-13)


def test_what_is_given_may_be_sparse(batch):
    sparse, dense, y = batch
    model, same = keras_input(True), keras_input(None)
    same.set_weights(model.get_weights())
    assert str(kt.coverage(model, x=sparse)) == str(kt.coverage(model))
    assert kt.unread(model, sparse) == {}
    loss = kf.SoftmaxCrossEntropy()
    stream = kt.Stream(model, loss, tf.data.Dataset.from_tensor_slices((sparse, y)).batch(5), kf.type2)
    parts = [kf.concat(*pair) for pair in zip(*(list(each.values()) for each in list(stream)[:2]), strict=True)]
    want = kt.records(same, dense[:10], y[:10], loss, fisher=kf.type2)
    for one, other in zip(parts, want.values(), strict=True):
        np.testing.assert_allclose(kf.dense(one), kf.dense(other), rtol=1e-11, atol=1e-13)


def test_one_sparse_example_and_then_more(batch):
    sparse, _, y = batch
    model = kt.KFACModel(keras_input(True), fisher=kf.type2)
    model.compile(SGD(0.1), crossentropy())
    data = tf.data.Dataset.from_tensor_slices((sparse, y))
    model.fit(data.batch(1).take(2), verbose=0, shuffle=False)
    model.fit(data.batch(12), verbose=0, shuffle=False)
    assert [part.name for part in model.engine.plan.parts] == ["d", "e"]


def test_rows_too_wide_to_write_out_are_named():
    model = keras.Sequential([keras.Input((100_000,), sparse=True), L.Dense(2, name="d"), L.Dense(2)])
    with pytest.raises(ValueError, match="d: it is multiplied with sparse rows of 100000 inputs, more than the 65536"):
        kt.coverage(model, strict=True)
