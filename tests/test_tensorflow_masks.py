"""Which mask a row stands under: that of its own positions, whatever the sizes are."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import kfaccore as kf
from tf_shared import SGD, L, crossentropy, keras, kt, tf
from tf_shared import double as double

masks = pytest.importorskip("kfaccore_tensorflow.masks")
places = pytest.importorskip("kfaccore_tensorflow.places")


class Heads(L.Layer):
    """Rows (heads, positions), or what `turn` makes of them."""

    def __init__(self, heads, flat=False):
        super().__init__()
        self.supports_masking = True
        self.heads = heads
        self.flat = flat

    def build(self, shape):
        self.w = self.add_weight(shape=(2, 2), name="w")

    def call(self, x, mask=None):
        shape = (-1, x.shape[1], self.heads, 2)
        h = tf.transpose(tf.reshape(x, shape), [0, 2, 1, 3])
        h = tf.reshape(tf.reshape(h, [-1, 2]) @ self.w, tf.shape(h)) if self.flat else h @ self.w
        return tf.reshape(tf.transpose(h, [0, 2, 1, 3]), [-1, x.shape[1], 2 * self.heads])


class Cell(L.Layer):
    """A layer that is used twice a step."""

    def __init__(self):
        super().__init__()
        self.state_size = 6
        self.inner = L.Dense(6, "tanh")

    def build(self, shape):
        self.inner.build((None, 6))
        self.built = True

    def call(self, x, states):
        h = self.inner(x) + self.inner(states[0])
        return h, [h]


class Shared(L.Layer):
    """One layer as often as there are positions."""

    def __init__(self):
        super().__init__()
        self.supports_masking = True
        self.inner = L.Dense(6, "tanh")

    def call(self, x, mask=None):
        for _ in range(3):
            x = self.inner(x * 1.0)
        return x


class Loop(L.Layer):
    """A loop over steps of one's own: `orders` of them behind each other, `uses` of one layer a step."""

    def __init__(self, *orders, uses=1):
        super().__init__()
        self.supports_masking = True
        self.orders = orders
        self.uses = uses
        self.inner = L.Dense(6, "tanh")

    def build(self, shape):
        self.inner.build((None, 6))
        self.built = True

    def call(self, x, mask=None):
        found = []
        for order in self.orders:
            h = tf.zeros_like(x[:, 0])
            for t in range(x.shape[1])[::order]:
                new = x[:, t] + h
                for _ in range(self.uses):
                    new = self.inner(new)
                h = tf.where(mask[:, t : t + 1], new, h)
            found.append(h)
        return tf.concat(found, -1)

    def compute_mask(self, x, mask=None):
        return None  # there are no positions any more


PADDED = {
    "a loop of one's own": lambda: [Loop(1)],
    "backwards": lambda: [Loop(-1)],
    "two uses a step": lambda: [Loop(1, uses=2)],
    "there and back by one layer": lambda: [Loop(1, -1)],
    "TimeDistributed": lambda: [L.TimeDistributed(L.Dense(6, "tanh")), L.GlobalAveragePooling1D()],
    "heads first": lambda: [Heads(3), L.GlobalAveragePooling1D()],
    "as many heads as positions, flattened": lambda: [Heads(3, flat=True), L.GlobalAveragePooling1D()],
    "used twice a step": lambda: [L.RNN(Cell())],
    "used twice a step, backwards": lambda: [L.RNN(Cell(), go_backwards=True)],
    "as often as positions": lambda: [Shared(), L.GlobalAveragePooling1D()],
    "images": lambda: [L.TimeDistributed(L.Reshape((3, 2, 1))), L.ConvLSTM2D(2, 2), L.Flatten()],
}


@pytest.mark.parametrize("make", PADDED.values(), ids=PADDED)
def test_padding_leaves_no_trace(make, rng):
    ids, y = rng.integers(1, 7, (4, 3)), rng.integers(0, 3, 4)
    ids[:, 2:] = 0
    found = []
    for length in (3, 9):
        keras.utils.set_random_seed(1)
        words = L.Embedding(7, 6, mask_zero=True)
        net = keras.Sequential([keras.Input((length,), dtype="int32"), words, *make(), L.Dense(3)])
        step = kt.Optimizer(net, crossentropy(), SGD(1.0), fisher=kf.type2)
        step.step(np.pad(ids, ((0, 0), (0, length - 3))), y)
        assert not step.engine.plan.refused
        found.append(np.concatenate([np.ravel(v) for v in net.trainable_variables]))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-9, atol=1e-12)


def test_the_mask_of_another_input_is_no_mask(rng):
    """Of as many positions: A of a branch that has none is of all its rows."""
    i, x = keras.Input((5,), dtype="int32"), keras.Input((5, 3))
    words = L.GlobalAveragePooling1D()(L.Embedding(7, 4, mask_zero=True)(i))
    last = L.Lambda(lambda t: t[:, -1])(L.Dense(3, name="inner")(x))
    net = keras.Model([i, x], L.Dense(2)(L.Concatenate()([words, last])))
    ids, v = rng.integers(1, 7, (4, 5)), rng.normal(size=(4, 5, 3))
    ids[:, 2:] = 0
    record = kt.records(net, [ids, v], np.zeros(4, int), crossentropy())["inner"]
    assert record.mask is None


def test_a_mask_is_laid_along_the_axis_that_moves_the_prediction_least(rng):
    """As many heads as positions: only the gradients tell which is which."""
    mask = np.array([[1, 0, 0], [1, 1, 0]], bool)
    g = rng.normal(size=(1, 1, 2, 3, 3, 2)) * mask[:, None, :, None]
    found = masks.existing(g.reshape(1, 1, 2, 9, 2), [((0,), None)], [mask], 2, (2, 3, 3), places.Place(0), False)
    np.testing.assert_array_equal(found.reshape(2, 3, 3), np.broadcast_to(mask[:, None], (2, 3, 3)))
    found = masks.existing(np.zeros((1, 1, 2, 9, 2)), [((0,), None)], [mask], 2, (2, 3, 3), places.Place(0), False)
    assert found is None  # not to be seen: all rows count


@pytest.mark.parametrize("apart", [False, True])
def test_words_of_sentences_are_those_of_their_mask(apart, rng):
    """A mask of two axes of positions: as of each sentence for itself, whose loss is the same."""
    ids, y = rng.integers(1, 9, (2, 3, 4)), rng.integers(0, 3, (2, 3, 4))
    there = np.arange(4) < np.array([[3, 4, 2], [2, 1, 3]])[..., None]
    ids, y = ids * there, y * there
    found = []
    for shape in ((2, 3, 4), (6, 4)):
        keras.utils.set_random_seed(1)
        layer = L.Dense(5, "tanh")
        layer = L.TimeDistributed(layer) if apart and len(shape) == 3 else layer
        words = L.Embedding(9, 4, mask_zero=True)
        net = keras.Sequential([keras.Input(shape[1:], dtype="int32"), words, layer, L.Dense(3)])
        step = kt.Optimizer(net, crossentropy(), SGD(1.0), fisher=kf.type2)
        step.step(ids.reshape(shape), y.reshape(shape))
        found.append(np.concatenate([np.ravel(v) for v in net.trainable_variables]))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-9, atol=1e-12)


class Later(L.Layer):
    """All positions but the first, as of a next word: one row less than the mask has."""

    def __init__(self):
        super().__init__()
        self.supports_masking = True
        self.inner = L.Dense(6, "tanh")

    def build(self, shape):
        self.inner.build((None, 6))
        self.built = True

    def compute_mask(self, x, mask=None):
        return None

    def call(self, x, mask=None):
        there = tf.cast(mask[:, 1:, None], x.dtype)
        return tf.reduce_sum(self.inner(x[:, 1:]) * there, 1)


def test_a_mask_that_fits_no_axis_is_named_once(rng):
    ids, y = rng.integers(1, 7, (4, 5)), rng.integers(0, 3, 4)
    ids *= np.arange(5) < np.array([3, 5, 2, 4])[:, None]
    found = []
    for length in (5, 8):
        keras.utils.set_random_seed(1)
        words = L.Embedding(7, 6, mask_zero=True)
        net = keras.Sequential([keras.Input((length,), dtype="int32"), words, Later(), L.Dense(3)])
        step = kt.Optimizer(net, crossentropy(), SGD(1.0), fisher=kf.type2)
        x = np.pad(ids, ((0, 0), (0, length - 5)))
        with pytest.warns(UserWarning, match=r"mask \(4, .\) that rows of '.*dense.*' stand under"):
            step.step(x, y)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step.step(x, y)
        found.append(np.concatenate([np.ravel(v) for v in net.trainable_variables]))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-9, atol=1e-12)
