"""What a prediction's gradient comes to: products that go elsewhere too, and what stands behind no gradient."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from tf_shared import SGD, L, crossentropy, keras, kt, tf
from tf_shared import double as double

layers = pytest.importorskip("test_tensorflow_layers")


class Own(L.Layer):
    """Weights by shape, and what `how` makes of them."""

    def __init__(self, how, **shapes):
        super().__init__(name="own")
        self.how = how
        self.shapes = shapes

    def build(self, shape):
        for name, size in self.shapes.items():
            setattr(self, name, self.add_weight(shape=size, name=name, initializer="normal"))

    def call(self, x):
        return self.how(self, x)


def relative(own, x):
    """Attention of Transformer-XL: two biases of one product."""
    q, k = x @ own.q, x @ own.k
    content = tf.matmul(q + own.u, k, transpose_b=True)
    return tf.nn.softmax(content + tf.matmul(q + own.v, tf.roll(k, 1, 1), transpose_b=True)) @ x


def swish(own, x):
    z = x @ own.w
    return z * tf.sigmoid(z + own.b)


def beside(own, x):
    z = x @ own.w
    return tf.concat(
        [tf.tanh(tf.reshape(z, (-1, 20))), tf.reshape(tf.tanh(tf.reshape(z, (-1, 5, 4)) + own.b), (-1, 20))], 1
    )


def around(own, x):
    """A convolution whose output a residual goes around."""
    z = tf.nn.conv1d(x, own.w, 1, "SAME")
    return tf.tanh(tf.nn.bias_add(z, own.b)) + z


def targets(own, x):
    """What stands behind no gradient is no second way."""
    z = x @ own.w
    return tf.tanh(z + own.b) - tf.stop_gradient(z) + tf.round(z) + tf.cast(z > 0, z.dtype)


def mixed(own, x):
    """Tokens are mixed, the bias is of features: as many, and another axis than the product's outputs."""
    return tf.tanh(tf.reshape(tf.matmul(own.w, x[:, :4]), (-1, 4, 4)) + own.b)


def turned(own, x):
    return tf.tanh(tf.expand_dims(tf.einsum("bti,io->bot", x[:, :4], own.w), 1) + own.b)


def spread(own, x):
    """Every output with every element of the bias."""
    return tf.tanh(tf.expand_dims(x @ own.w, -1) + own.b)


def heads(own, x):
    z = tf.einsum("bti,iho->btho", x, own.w)
    return tf.tanh(tf.reshape(z, (-1, 1, 5, 2, 3)) + own.b)


def split(own, x):
    """Attention as published: one product, then heads."""
    return tf.tanh(tf.reshape(x @ own.w, (-1, 5, 2, 3)) + own.b)


def split_turned(own, x):
    return tf.tanh(tf.reshape(x @ own.w, (-1, 5, 2, 3)) + tf.transpose(own.b))


def flat(own, x):
    """Heads and their bias as one axis."""
    return tf.tanh(tf.reshape(tf.einsum("bti,iho->btho", x, own.w), (-1, 5, 6)) + own.b)


def regrouped(own, x):
    """Outputs of two axes as two others."""
    return tf.tanh(tf.reshape(tf.einsum("bti,iho->btho", x, own.w), (-1, 5, 4, 3)) + own.b)


def some(own, x):
    """A bias of each head, whatever the output."""
    return tf.tanh(tf.reshape(x @ own.w, (-1, 5, 2, 3)) + own.b[:, None])


def positions(own, x):
    """As many as the outputs, along positions and heads."""
    return tf.tanh(tf.reshape(x @ own.w, (-1, 5, 2, 5)) + own.b[..., None])


def mapped(own, x):
    """Channels of a convolution in groups."""
    return tf.tanh(tf.reshape(tf.nn.conv1d(x, own.w, 1, "SAME"), (-1, 5, 2, 3)) + own.b)


SQUARE = (4, 4)
BIASED = {
    "two biases": (relative, {"q": SQUARE, "k": SQUARE, "u": (4,), "v": (4,)}, ()),
    "gated": (swish, {"w": SQUARE, "b": (4,)}, ()),
    "beside": (beside, {"w": SQUARE, "b": (4,)}, ()),
    "around": (around, {"w": (3, 4, 4), "b": (4,)}, ()),
    "mixed": (mixed, {"w": SQUARE, "b": (4,)}, ()),
    "turned": (turned, {"w": SQUARE, "b": (4,)}, ()),
    "spread": (spread, {"w": SQUARE, "b": (4,)}, ()),
    "heads": (heads, {"w": (4, 2, 3), "b": (2, 3)}, ("own.w",)),
    "targets": (targets, {"w": SQUARE, "b": (4,)}, ("own.w",)),
    "split": (split, {"w": (4, 6), "b": (2, 3)}, ("own.w",)),
    "split, turned": (split_turned, {"w": (4, 6), "b": (3, 2)}, ("own.w",)),
    "flat": (flat, {"w": (4, 2, 3), "b": (6,)}, ("own.w",)),
    "regrouped": (regrouped, {"w": (4, 6, 2), "b": (4, 3)}, ("own.w",)),
    "some": (some, {"w": (4, 6), "b": (2,)}, ()),
    "positions": (positions, {"w": (4, 10), "b": (5, 2)}, ()),
    "mapped": (mapped, {"w": (3, 4, 6), "b": (2, 3)}, ("own.w",)),
}


@pytest.mark.parametrize(("how", "shapes", "joined"), BIASED.values(), ids=BIASED)
def test_a_bias_joins_a_product_that_goes_nowhere_else(how, shapes, joined, rng):
    def make():
        return keras.Sequential([keras.Input((5, 4)), Own(how, **shapes), L.Flatten(), L.Dense(2, name="head")])

    assert [part.name for part in kt.coverage(make()).parts if part.bias] == [*joined, "head"]
    layers.test_records_are_the_slopes_of_each_example(make, lambda rng: rng.normal(size=(3, 5, 4)), rng)


def test_a_product_that_is_a_prediction_too_has_its_own_rows(rng):
    x = keras.Input((4,))
    z = L.Dense(3, use_bias=False, name="z")(x)
    model = keras.Model(x, [z, Own(lambda own, z: z + own.b, b=(3,))(z)])
    assert not any(part.bias for part in kt.coverage(model).parts)
    assert kt.unread(model, rng.normal(size=(5, 4))) == {}


STOPPED = {
    "stop_gradient": tf.stop_gradient,
    "round": tf.round,
    "argmax": lambda q: tf.one_hot(tf.argmax(q, -1), 2, dtype=q.dtype),
    "compared": lambda q: tf.cast(q > 0.1, q.dtype),
    "integers": lambda q: tf.cast(tf.cast(10 * q, "int32"), q.dtype),
    "numpy": lambda q: tf.ensure_shape(tf.numpy_function(np.sin, [q], q.dtype), q.shape),
}


@pytest.mark.parametrize("stopped", STOPPED.values(), ids=STOPPED)
def test_a_use_behind_no_gradient_is_none(stopped, rng):
    """The same loss with those values given as inputs has the same curvature and the same step."""

    class Ahead(keras.Model):
        def __init__(self, given):
            super().__init__()
            self.a, self.b = L.Dense(5, "tanh", name="a"), L.Dense(2, name="b")
            self.given = given

        def values(self, x):
            return stopped(self.b(self.a(x)))

        def call(self, xs):
            return self.b(self.a(xs[0])) - (xs[1] if self.given else 0.9 * self.values(xs[1]))

    s, later, y = rng.normal(size=(8, 4)), 5 + rng.normal(size=(8, 4)), rng.normal(size=(8, 2))
    found = []
    for given in (False, True):
        keras.utils.set_random_seed(1)
        model = Ahead(given)
        model([s, y if given else later])
        x = [s, 0.9 * np.asarray(model.values(later)) if given else later]
        kt.Optimizer(model, keras.losses.MeanSquaredError(), SGD(1.0), fisher=kf.type2).step(x, y)
        found.append(np.concatenate([np.ravel(v) for v in model.trainable_variables]))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-11, atol=1e-13)


def test_a_variable_behind_no_gradient_alone_is_unused(rng):
    model = keras.Sequential([keras.Input((4,)), Own(lambda own, x: x @ tf.stop_gradient(own.w), w=(4, 4)), L.Dense(2)])
    plan = kt.coverage(model, strict=True)
    assert list(plan.unused) == ["own"]
    step = kt.Optimizer(model, crossentropy(), SGD(0.1))
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        step.step(rng.normal(size=(6, 4)), rng.integers(0, 2, 6))


def gated(x, w, also):
    z = x @ w
    return z, tf.reduce_mean(tf.square(z), -1, keepdims=True)


FUNCTIONS = {
    "one output made of the other": (gated, False),
    "used for both": (lambda x, w, also: (x @ w, tf.sin(x) @ w), False),
    "one output twice": (lambda x, w, also: (x @ w,) * 2, False),
    "given twice": (lambda x, w, also: (x @ w, tf.sin(x) @ also), False),
    "beside another": (lambda x, w, also: (tf.sin(x), x @ w), True),
    "behind no gradient": (lambda x, w, also: (tf.stop_gradient(x @ w), x @ w), True),
}


@pytest.mark.parametrize(("made", "read"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_function_is_read_where_one_output_shows_all(made, read, rng):
    """Of several outputs, the gradients of one are the product's only where no other is made of it."""

    def called(own, x):
        w = tf.identity(own.w)
        first, second = tf.function(made)(x, w, w)
        return first + second

    model = keras.Sequential([keras.Input((5, 4)), Own(called, w=SQUARE), L.Flatten(), L.Dense(2, name="head")])
    assert list(kt.coverage(model).refused) == ([] if read else ["own"])
    if read:
        assert kt.unread(model, rng.normal(size=(3, 5, 4))) == {}
