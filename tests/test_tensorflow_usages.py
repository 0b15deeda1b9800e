"""Keras as people use it: layers, nesting and fit's own options, against brute force and against Keras itself."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from tf_shared import L, crossentropy, keras, kt, tf
from tf_shared import double as double

layers = pytest.importorskip("test_tensorflow_layers")


def siamese():
    """An encoder of an encoder, each used twice, on two inputs."""
    first, second = keras.Input((4,)), keras.Input((4,))
    inner = keras.Sequential([keras.Input((4,)), L.Dense(4, "tanh"), L.LayerNormalization()])
    x = keras.Input((4,))
    outer = keras.Model(x, L.Dense(3)(inner(inner(x)) + x))
    return keras.Model([first, second], L.Dense(2)(L.Subtract()([outer(first), outer(second)])))


def masked_attention():
    ids = keras.Input((5,), dtype="int32")
    x = L.Embedding(6, 4, mask_zero=True)(ids)
    x = L.MultiHeadAttention(2, 2)(x, x, use_causal_mask=True)
    return keras.Model(ids, L.Dense(2)(L.GlobalAveragePooling1D()(x)))


def translator():
    """States of one recurrent layer go into another."""
    source, target = keras.Input((3, 4)), keras.Input((2, 4))
    _, h, c = L.LSTM(3, return_state=True)(source)
    return keras.Model([source, target], L.Dense(2)(L.LSTM(3, return_sequences=True)(target, initial_state=[h, c])))


class Views(keras.Model):
    """Two views of each example behind each other on the batch axis, and positions folded into it."""

    def __init__(self):
        super().__init__()
        self.encode = L.Dense(4, "tanh")
        self.mix = L.Dense(3)
        self.head = L.Dense(2)

    def call(self, x):
        first, second = tf.split(self.encode(tf.concat([x[:, 0], x[:, 1]], 0)), 2)
        rows = tf.reshape(self.mix(tf.reshape(x, (-1, 4))), (-1, 2, 3))
        return self.head(tf.concat([first * second, tf.reduce_sum(rows, 1)], 1))


class Experts(L.Layer):
    """Stacked matrices by einsum, mixed by a gate."""

    def build(self, shape):
        self.stack = self.add_weight(shape=(3, 4, 2), name="stack", initializer="normal")
        self.gate = L.Dense(3, "softmax")
        self.gate.build(shape)

    def call(self, x):
        return tf.einsum("be,bed->bd", self.gate(x), tf.einsum("bi,eid->bed", x, self.stack))


def rows(*shape):
    return lambda rng: rng.normal(size=(3, *shape))


def stack(*inner, shape):
    return lambda: keras.Sequential([keras.Input(shape), *(layer() for layer in inner), L.Flatten(), L.Dense(2)])


CASES = {
    "shared and nested": (siamese, lambda rng: [rng.normal(size=(3, 4)), rng.normal(size=(3, 4))]),
    "masked attention": (masked_attention, lambda rng: np.array([[1, 2, 3, 0, 0], [4, 5, 1, 2, 0], [3, 3, 3, 3, 3]])),
    "spectral": (stack(lambda: L.SpectralNormalization(L.Conv2D(3, 2)), shape=(4, 4, 2)), rows(4, 4, 2)),
    "binned": (stack(lambda: L.Discretization([-0.5, 0, 0.5]), lambda: L.Embedding(4, 3), shape=(4,)), rows(4)),
    "cells": (stack(lambda: L.RNN([L.GRUCell(3), L.SimpleRNNCell(2)]), shape=(3, 4)), rows(3, 4)),
    "translator": (translator, lambda rng: [rng.normal(size=(3, 3, 4)), rng.normal(size=(3, 2, 4))]),
    "ConvLSTM": (stack(lambda: L.ConvLSTM2D(2, 2), shape=(2, 3, 3, 1)), rows(2, 3, 3, 1)),
    "views": (Views, rows(2, 4)),
    "experts": (stack(Experts, shape=(4,)), rows(4)),
}


@pytest.mark.parametrize(("make", "inputs"), CASES.values(), ids=CASES)
def test_records_are_the_slopes_of_each_example(make, inputs, rng):
    layers.test_records_are_the_slopes_of_each_example(make, inputs, rng)


class Shrunk(L.Layer):
    """Adds a loss of its own."""

    def call(self, x):
        self.add_loss(0.1 * tf.reduce_mean(tf.square(x)))
        return x


def everything():
    """Regularisers, constraints, losses of its own, statistics and dropped units."""
    penalty = keras.regularizers.L1L2(l1=0.01)  # the L1 of Keras 3.10 knows float32 alone
    first = L.Dense(
        5,
        "tanh",
        kernel_regularizer="l2",
        activity_regularizer=penalty,
        kernel_constraint=keras.constraints.MaxNorm(0.5),
    )
    inner = [first, L.BatchNormalization(), L.Dropout(0.5, seed=3), Shrunk(), L.Dense(3)]
    return keras.Sequential([keras.Input((4,)), *inner])


def stateful():
    return keras.Sequential([keras.Input(batch_shape=(4, 3, 4)), L.LSTM(3, stateful=True), L.Dense(3)])


def outputs():
    x = keras.Input((4,), name="x")
    h = L.Dense(5, "tanh")(x)
    return keras.Model({"x": x}, {"a": L.Dense(3, name="a")(h), "b": L.Dense(1, name="b")(h)})


def weighted(rng):
    """A dataset of sample weights whose last batch is short."""
    data = rng.normal(size=(22, 4)), rng.integers(0, 3, 22), rng.uniform(0.5, 2, 22)
    return {"x": tf.data.Dataset.from_tensor_slices(data).batch(8)}


def named(rng):
    x = rng.normal(size=(22, 4))
    return {"x": {"x": x}, "y": {"a": rng.integers(0, 3, 22), "b": x[:, :1]}, "batch_size": 4}


FITS = {
    "everything": (everything, {"loss": crossentropy(), "weighted_metrics": ["accuracy"]}, weighted),
    "stateful": (
        stateful,
        {"loss": crossentropy()},
        lambda rng: {"x": rng.normal(size=(16, 3, 4)), "y": rng.integers(0, 3, 16), "batch_size": 4},
    ),
    "outputs": (
        outputs,
        {"loss": {"a": crossentropy(), "b": "mse"}, "loss_weights": {"a": 1.0, "b": 0.3}, "steps_per_execution": 3},
        named,
    ),
    "one loss for all": (
        lambda: listed(outputs()),
        {"loss": "mse"},
        lambda rng: {"x": rng.normal(size=(22, 4)), "y": [rng.normal(size=(22, 3)), rng.normal(size=(22, 1))]},
    ),
    "a list of outputs": (
        lambda: listed(outputs()),
        {"loss": {"a": crossentropy(), "b": "mse"}, "metrics": {"a": "accuracy", "b": "mae"}},
        named,
    ),
}


def listed(model):
    """Its outputs one after the other."""
    return keras.Model(model.inputs, [model.get_layer(name).output for name in "ab"])


@pytest.mark.parametrize(("make", "options", "data"), FITS.values(), ids=FITS)
def test_fit_without_curvature_is_that_of_keras(make, options, data):
    """Weights, statistics, states and the history of every epoch."""
    found = []
    for wrap in (lambda model: model, lambda model: kt.KFACModel(model, method=kf.Identity())):
        keras.utils.set_random_seed(1)
        inner = make()
        model = wrap(inner)
        model.compile(keras.optimizers.SGD(0.1), **options)
        told = model.fit(**data(np.random.default_rng(5)), epochs=2, shuffle=False, verbose=0).history
        found.append((inner.get_weights(), told))
    (first, told), (second, again) = found
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-10, atol=1e-13)
    assert set(told) == set(again)
    for name, values in told.items():
        np.testing.assert_allclose(again[name], values, rtol=1e-10, err_msg=name)


class Stepping(keras.Model):
    """Trains in its own way."""

    def train_step(self, data):
        raise AssertionError

    def compute_loss(self, *args, **kwargs):
        raise AssertionError


def test_a_model_that_says_how_it_trains_is_refused():
    with pytest.raises(ValueError, match=r"Stepping has a train_step and a compute_loss of its own.*Optimizer"):
        kt.KFACModel(Stepping())


@pytest.mark.parametrize("scaled", [True, False])
def test_float16_is_refused_with_what_to_use(scaled, rng):
    keras.config.set_dtype_policy("mixed_float16")
    net = keras.Sequential([keras.Input((4,)), L.Dense(3, name="it")])
    model = kt.KFACModel(net)
    model.compile(keras.optimizers.SGD(0.1), crossentropy(), auto_scale_loss=scaled)
    reason = "LossScaleOptimizer looks for overflow" if scaled else r"parts \['it'\] are float16"
    with pytest.raises(ValueError, match=f"{reason}.*mixed_bfloat16"):
        model.fit(rng.normal(size=(4, 4)), rng.integers(0, 3, 4), verbose=0)


def test_the_numbers_of_a_step_go_into_a_summary(tmp_path, rng):
    """`info.metrics()` by a writer of tf.summary, as a callback of every epoch."""
    model = kt.KFACModel(keras.Sequential([keras.Input((4,)), L.Dense(3)]), step=kf.SelfTuning())
    model.compile(keras.optimizers.SGD(1.0), crossentropy())
    writer = tf.summary.create_file_writer(str(tmp_path))
    told = []

    class Told(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            told.append(model.engine.info.metrics())
            with writer.as_default():
                for name, value in told[-1].items():
                    tf.summary.write(name, tf.constant(value, tf.float64), step=epoch)

    model.fit(rng.normal(size=(8, 4)), rng.integers(0, 3, 8), epochs=2, verbose=0, callbacks=[Told()])
    writer.close()
    (path,) = tmp_path.iterdir()
    events = [tf.compat.v1.Event.FromString(raw.numpy()) for raw in tf.data.TFRecordDataset(str(path))]
    values = [(e.step, v.tag, float(tf.make_ndarray(v.tensor))) for e in events for v in e.summary.value]
    assert sorted(values) == sorted((step, name, value) for step, one in enumerate(told) for name, value in one.items())
    assert {"alpha", "mu", "damping", "rho", "code/OK"} <= set(told[0])


class Wrapped(keras.Model):
    """One output in `how` it is returned, and a loss of the model's own of each example, or their sum."""

    def __init__(self, how, each):
        super().__init__()
        self.how, self.each = how, each
        self.a, self.b = L.Dense(4, "tanh", name="a"), L.Dense(3, name="b")

    def call(self, x):
        z = self.a(x)
        own = 0.1 * tf.reduce_sum(tf.square(z), 1)
        self.add_loss(own if self.each else tf.reduce_sum(own))
        return self.how(self.b(z))


@pytest.mark.parametrize("loss", [crossentropy, kf.SoftmaxCrossEntropy], ids=["keras", "kfaccore"])
@pytest.mark.parametrize("how", [lambda f: {"p": f}, lambda f: [f]], ids=["dict", "list"])
@pytest.mark.parametrize("fits", [False, True], ids=["step", "fit"])
def test_one_output_in_a_structure_and_a_loss_of_each_example(how, loss, fits, rng):
    """As Keras takes them: the same as the tensor and the sum."""
    x, y = rng.normal(size=(8, 5)), rng.integers(0, 3, 8)
    found = []
    for each, given in ((True, how), (False, lambda f: f)):
        keras.utils.set_random_seed(1)
        model = Wrapped(given, each)
        model(x)
        if fits:
            outer = kt.KFACModel(model, fisher=kf.type2)
            outer.compile(keras.optimizers.SGD(1.0), loss())
            outer.fit(x, y, batch_size=8, verbose=0)
        else:
            kt.Optimizer(model, loss(), keras.optimizers.SGD(1.0), fisher=kf.type2).step(x, y)
        found.append(np.concatenate(model.get_weights(), None))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-12)
