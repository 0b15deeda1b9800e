"""What is told before it does harm: noise that is not repeated, layers of one name, outputs of other axes."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest

import kfaccore as kf
from tf_shared import SGD, L, crossentropy, keras, kt, tf
from tf_shared import double as double


class Noisy(L.Layer):
    def __init__(self, how):
        super().__init__()
        self.how = how
        self.seed = keras.random.SeedGenerator(3)

    def call(self, x, training=None):
        return self.how(x, self.seed) if training else x


def checked(x, seed):
    """Operations that TensorFlow runs in order, and that draw nothing."""
    tf.debugging.assert_all_finite(x, "finite")
    tf.print("seen", output_stream="file:///dev/null")
    return tf.debugging.check_numerics(x, "finite")


def by_numpy(stateful, f=lambda a: a + np.random.normal(size=a.shape)):
    return lambda x, seed: tf.ensure_shape(tf.numpy_function(f, [x], x.dtype, stateful), x.shape)


PRIVATE = np.random.default_rng(1)
NOISE = {
    "numpy": (by_numpy(True), r"PyFunc\)"),
    "numpy, told that it draws nothing": (by_numpy(False, np.sin), None),
    "python": (lambda x, seed: tf.ensure_shape(tf.py_function(tf.sin, [x], x.dtype), x.shape), r"EagerPyFunc\)"),
    "numpy, traced": (lambda x, seed: x + np.random.normal(size=x.shape[1:]), None),
    "python, traced": (
        lambda x, seed: x * random.gauss(1, 0.1) if random.random() < 0.5 else x - random.random(),
        None,
    ),
    "a generator of one's own, traced": (lambda x, seed: x + PRIVATE.normal(size=x.shape[1:]), "noisy"),
    "clock": (lambda x, seed: x + tf.cast(tf.timestamp() % 1.0, x.dtype), r"Timestamp\)"),
    "checked": (checked, None),
    "tf.nn.dropout": (lambda x, seed: tf.nn.dropout(x, 0.5), r"RandomUniform\)"),
    "tf.random": (lambda x, seed: x + tf.random.normal(tf.shape(x), dtype=x.dtype), r"RandomStandardNormal\)"),
    "in a function": (tf.function(lambda x, seed: x * tf.random.uniform(tf.shape(x), dtype=x.dtype)), "RandomUniform"),
    "keras.random": (lambda x, seed: x + keras.random.normal(tf.shape(x)), None),
    "seeded": (lambda x, seed: x + keras.random.normal(tf.shape(x), seed=seed), None),
    "stateless": (lambda x, seed: x + tf.random.stateless_normal(tf.shape(x), [1, 2], dtype=x.dtype), None),
}


@pytest.mark.parametrize(("how", "named"), NOISE.values(), ids=NOISE)
def test_noise_that_a_judge_cannot_repeat_is_named_once(how, named, rng):
    net = keras.Sequential([keras.Input((4,)), Noisy(how), L.Dropout(0.5), L.Dense(3)])
    step = kt.Optimizer(net, crossentropy())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for size in (6, 6, 7):
            step.step(rng.normal(size=(size, 4)), np.arange(size) % 3)
    found = [str(one.message) for one in told if "judged under other draws" in str(one.message)]
    assert len(found) == (named is not None)
    if named is not None:
        with pytest.warns(UserWarning, match=f"by .*{named}"):
            warnings.warn(found[0], stacklevel=1)


def test_what_the_shell_asks_itself_is_no_noise(rng):
    """A loss of the core and a penalty by schedule are functions of NumPy."""
    net = keras.Sequential([keras.Input((4,)), L.Dropout(0.5), L.Dense(3)])
    schedules = kf.Schedules(l2=lambda step: 0.1)
    step = kt.Optimizer(net, kf.SoftmaxCrossEntropy(), schedules=schedules)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step.step(rng.normal(size=(6, 4)), np.arange(6) % 3)


def test_noise_is_the_judge_s_alone_to_care_for(rng):
    net = keras.Sequential([keras.Input((4,)), Noisy(NOISE["tf.nn.dropout"][0]), L.Dense(3)])
    step = kt.Optimizer(net, crossentropy(), SGD(0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step.step(rng.normal(size=(6, 4)), np.arange(6) % 3)


class Same(keras.Model):
    """Layers of one name."""

    def __init__(self):
        super().__init__()
        self.inner = [L.Dense(4, name="fc") for _ in range(4)]

    def call(self, x):
        for layer in self.inner:
            x = tf.tanh(layer(x))
        return x


def test_layers_of_one_name_are_parts_of_their_own(rng):
    net, x = Same(), rng.normal(size=(6, 4))
    net(x)
    plan = kt.coverage(net)
    assert [part.name for part in plan.parts] == ["fc", "fc*", "fc**", "fc***"]
    assert kt.unread(net, x) == {}
    model = kt.KFACModel(net)
    model.compile(SGD(0.1), crossentropy())
    model.fit(x, np.arange(6) % 4, batch_size=3, verbose=0)


class Axes(keras.Model):
    """An output of each position, flattened, and one of each example."""

    def __init__(self):
        super().__init__()
        self.a, self.b = L.Dense(4), L.Dense(4)

    def call(self, x):
        return {"a": tf.reshape(self.a(x), [-1, 4]), "b": self.b(tf.reduce_mean(x, 1))}


def test_outputs_of_other_leading_axes_are_refused(rng):
    net, x = Axes(), rng.normal(size=(6, 5, 4))
    net(x)
    step = kt.Optimizer(net, {"a": crossentropy(), "b": crossentropy()}, SGD(0.1))
    with pytest.raises(ValueError, match=r"outputs have {'a': 30, 'b': 6} examples; need the same leading axis"):
        step.step(x, {"a": np.zeros(30, int), "b": np.zeros(6, int)})


def test_functions_that_run_eagerly_are_refused(rng):
    net = keras.Sequential([keras.Input((4,)), L.Dense(3)])
    step = kt.Optimizer(net, crossentropy(), SGD(0.1))
    tf.config.run_functions_eagerly(True)
    try:
        with pytest.raises(ValueError, match=r"turn tf\.config\.run_functions_eagerly off"):
            step.step(rng.normal(size=(6, 4)), np.arange(6) % 3)
    finally:
        tf.config.run_functions_eagerly(False)


def test_records_of_one_example_have_all_parts(rng):
    inner = [L.Dense(3, "tanh", name="a"), L.LayerNormalization(name="n"), L.Dense(2, name="b")]
    net = keras.Sequential([keras.Input((4,)), *inner])
    x, y = rng.normal(size=(3, 4)), np.array([0, 1, 1])
    names = ["a", "n.gamma", "n.beta", "b"]
    every = [kt.records(net, x[b : b + 1], y[b : b + 1], crossentropy(), fisher=kf.empirical) for b in range(3)]
    whole = kt.records(net, x, y, crossentropy(), fisher=kf.empirical)
    assert list(whole) == names
    for one in every:
        assert list(one) == names
    for name in names:
        J = np.concatenate([np.asarray(one[name].examples()) for one in every], axis=2)
        np.testing.assert_allclose(J, whole[name].examples(), rtol=1e-11, atol=1e-13)
    assert kt.unread(net, x[:1]) == {}


@pytest.mark.parametrize("flat", [False, True])
def test_a_prediction_of_more_rows_than_inputs_is_named_once(flat, rng):
    tail = [L.Lambda(lambda t: tf.reshape(t, [-1, 3]))] if flat else []
    net = keras.Sequential([keras.Input((5, 4)), L.Dense(3), *tail])
    step = kt.Optimizer(net, crossentropy(), SGD(0.1))
    x, y = rng.normal(size=(4, 5, 4)), rng.integers(0, 3, (4, 5))
    y = y.ravel() if flat else y
    if flat:
        with pytest.warns(UserWarning, match=r"has 20 rows for 4 inputs.* return them as axes, \(4, 5, outputs\)"):
            step.step(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step.step(x, y)


class Shrunk(L.Layer):
    """A kernel that each pass of training makes anew, as SpectralNormalization does, here by a factor."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(4, 3), name="kernel", initializer="glorot_uniform")

    def call(self, x, training=None):
        if training:
            self.kernel.assign(0.5 * self.kernel)
        return x @ self.kernel


def test_weights_that_a_pass_writes_are_written_once_a_step(rng):
    """The judge's pass leaves no trace on them: what it judged is what stays, and nothing is said."""
    x, y = rng.normal(size=(6, 4)), np.arange(6) % 3
    net = keras.Sequential([keras.Input((4,)), Shrunk()])
    before = net.get_weights()[0] / 2
    logits = x @ before
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    gradient = x.T @ (p - np.eye(3)[y]) / 6
    step = kt.Optimizer(net, crossentropy(), method=kf.Identity())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step.step(x, y)
    moved = before - net.get_weights()[0]
    share = (moved * gradient).sum() / (gradient**2).sum()
    assert share > 1e-3
    np.testing.assert_allclose(moved, share * gradient, rtol=1e-9)


def test_spectral_normalization_is_judged_without_a_warning(rng):
    net = keras.Sequential([keras.Input((4,)), L.SpectralNormalization(L.Dense(4)), L.Dense(3)])
    step = kt.Optimizer(net, crossentropy())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step.step(rng.normal(size=(6, 4)), np.arange(6) % 3)
