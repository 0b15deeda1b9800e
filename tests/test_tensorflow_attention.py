"""Masks that attention layers are called under: what nobody may look at and moves nothing is not there."""

from __future__ import annotations

import importlib
import warnings

import numpy as np
import pytest

import kfaccore as kf
from tf_shared import SGD, L, crossentropy, keras, kt, tf
from tf_shared import double as double


def block(x, exists, layer=None):
    """A block of an encoder, the mask of positions expanded anew."""
    layer = L.MultiHeadAttention(2, 3) if layer is None else layer
    y = L.LayerNormalization()(x)
    x = x + layer(y, y, attention_mask=exists[:, None, :])
    return x + L.Dense(6)(L.Dense(8, "tanh")(L.LayerNormalization()(x)))


class Block(L.Layer):
    """The same as a layer of one's own, for which rows are masked too."""

    def __init__(self):
        super().__init__()
        self.attention = L.MultiHeadAttention(2, 3)
        self.inner = L.Dense(6, "tanh")

    def build(self, shape):
        self.attention.build(shape, shape)
        self.inner.build(shape)
        self.built = True

    def call(self, x, exists):
        exists = tf.cast(exists, "int32")
        x = x + self.attention(x, x, attention_mask=exists[:, None, :] * exists[:, :, None])
        return x + self.inner(x)


def mean(x, exists):
    there = keras.ops.cast(exists, "float64")[..., None]
    return keras.ops.sum(x * there, 1) / keras.ops.sum(there, 1)


def decoded(x, exists):
    """Of other positions, which look at x."""
    x = block(x, exists)
    q = L.Dense(6)(x[:, :1] * keras.ops.reshape(keras.ops.arange(1.0, 6.0, dtype="float64"), (1, 5, 1)))
    for _ in range(2):
        q = q + L.MultiHeadAttention(2, 3)(q, q, use_causal_mask=True)
        q = q + L.MultiHeadAttention(2, 3)(q, x, attention_mask=exists[:, None, :])
        q = q + L.Dense(6, "tanh")(q)
    return keras.ops.mean(q, 1)


def plain(x, exists):
    q, k, v = L.Dense(6)(x[:, :1]), L.Dense(6)(x), L.Dense(6)(x)
    return L.Attention()([q, v, k], mask=[None, exists])[:, 0]


TOLD = {
    "blocks": lambda x, exists: mean(block(block(x, exists), exists), exists),
    "the first position alone": lambda x, exists: block(block(x, exists), exists)[:, 0],
    "layers of one's own": lambda x, exists: mean(Block()(Block()(x, exists), exists), exists),
    "grouped queries": lambda x, exists: mean(block(x, exists, L.GroupQueryAttention(3, 4, 2)), exists),
    "value_mask": lambda x, exists: L.MultiHeadAttention(2, 3)(x, x, value_mask=exists)[:, 0],
    "encoder and decoder": decoded,
    "no heads": plain,
    "sums": lambda x, exists: L.AdditiveAttention()([x, x], mask=[None, exists])[:, 0],
}


@pytest.mark.parametrize("make", TOLD.values(), ids=TOLD)
def test_padding_that_nobody_looks_at_leaves_no_trace(make, rng):
    ids, y = rng.integers(1, 9, (4, 5)), rng.integers(0, 3, 4)
    there = np.arange(5) < np.array([3, 5, 2, 4])[:, None]
    found = []
    for length in (5, 8):
        keras.utils.set_random_seed(1)
        i, exists = keras.Input((length,), dtype="int32"), keras.Input((length,), dtype="bool")
        net = keras.Model([i, exists], L.Dense(3)(make(L.Dense(6)(L.Embedding(9, 6)(i)), exists)))
        step = kt.Optimizer(net, crossentropy(), SGD(1.0), fisher=kf.type2)
        pad = ((0, 0), (0, length - 5))
        step.step([np.pad(ids * there, pad), np.pad(there, pad)], y)
        assert not step.engine.plan.refused
        found.append(np.concatenate([np.ravel(v) for v in net.trainable_variables]))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore:examples of:UserWarning")  # those without a label are named
@pytest.mark.parametrize("masked", ["keys", "queries"])
@pytest.mark.parametrize("how", ["Keras", "attention_mask"])
def test_a_mask_of_the_other_sequence_leaves_all_positions(masked, how, rng):
    """As many queries as keys, some of them without a label: they have no gradient and count."""
    keras.utils.set_random_seed(1)
    i, exists, d = keras.Input((5,), dtype="int32"), keras.Input((5,), dtype="bool"), keras.Input((5,), dtype="int32")
    hides = how == "Keras"
    keys = L.Dense(6, name="keys")(L.Embedding(9, 6, mask_zero=hides and masked == "keys")(i))
    queries = L.Dense(6, name="queries")(L.Embedding(9, 6, mask_zero=hides and masked == "queries")(d))
    mask = None if hides else exists[:, None, :]
    if masked == "keys":
        looked = L.MultiHeadAttention(2, 3, name="looks")(queries, keys, attention_mask=mask)
    else:
        queries = queries + L.MultiHeadAttention(2, 3)(queries, queries, attention_mask=mask)
        looked = L.MultiHeadAttention(2, 3, name="looks")(queries, keys)
    net = keras.Model([i, exists, d], L.Dense(3, name="head")(L.Dense(6, name="inner")(queries + looked)))
    there = np.arange(5) < np.array([3, 5, 2, 4])[:, None]
    labelled = np.arange(5) < np.array([5, 3, 3, 2])[:, None]
    ids, other = rng.integers(1, 9, (4, 5)), rng.integers(1, 9, (4, 5))
    x = [ids * there, there, other] if masked == "keys" else [other, there, ids * there]
    labels = rng.integers(0, 3, (4, 5))
    records = kt.records(net, x, labels, crossentropy(), (labelled & (there | (masked == "keys"))) * 1.0)
    rows = {name: 20 if one.mask is None else int(np.asarray(one.mask).sum()) for name, one in records.items()}
    assert {rows[name] for name in ("keys", "looks.key", "looks.value")} == {14 if masked == "keys" else 20}
    assert {rows[name] for name in ("looks.query", "looks.attention_output", "inner", "head")} == {
        20 if masked == "keys" else 14
    }


def test_a_mask_without_examples_leaves_all_positions(rng):
    """Of steps alone, as one that is strictly causal: the last key is looked at by nobody, in no example."""
    x = keras.Input((5, 4))
    before = np.tril(np.ones((5, 5), bool), -1)
    looked = L.MultiHeadAttention(2, 3, name="looks")(x, x, attention_mask=before)
    record = kt.records(
        keras.Model(x, L.Dense(3)(looked)), rng.normal(size=(4, 5, 4)), np.zeros((4, 5), int), crossentropy()
    )["looks.key"]
    assert record.mask is None
    assert not np.any(np.asarray(record.g)[..., -1, :])


class Pool(L.Layer):
    """A layer of one's own that is told which positions exist."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.inner = L.Dense(4, "tanh")

    def build(self, shape):
        self.inner.build(shape)
        self.built = True

    def call(self, x, exists):
        h = self.inner(x)
        if self.how == "mean":
            there = tf.cast(exists, h.dtype)[..., None]
            return tf.reduce_sum(there * h, 1) / tf.reduce_sum(there, 1)
        if self.how == "there":
            return tf.reduce_max(tf.where(exists[..., None], h, tf.cast(-2.0, h.dtype)), 1)
        return tf.reduce_sum(tf.where(~exists[..., None], tf.zeros_like(h), h), 1)


def scored(x, exists, how):
    """A mean under the softmax of scores, a number (batch, positions)."""
    scores = L.Dense(1)(x)[..., 0]
    if how == "chosen":
        scores = keras.ops.where(exists, scores, -1e9)
    else:
        scores = scores - (1.0 - keras.ops.cast(exists, "float64")) * 1e9
    return keras.ops.sum(keras.ops.softmax(scores)[..., None] * x, 1)


OWN = {
    "einsum": lambda ids, x: keras.ops.einsum("bt,btd->bd", keras.ops.cast(ids > 0, "float64"), x),
    "row": lambda ids, x: L.Dot(1)([keras.ops.cast(ids > 0, "float64"), x]),
    "column": lambda ids, x: keras.ops.matmul(
        keras.ops.transpose(x, (0, 2, 1)), keras.ops.cast(ids > 0, "float64")[..., None]
    )[..., 0],
    "scores chosen": lambda ids, x: scored(x, ids > 0, "chosen"),
    "scores lowered": lambda ids, x: scored(x, ids > 0, "lowered"),
    "maximum": lambda ids, x: keras.ops.max(x + keras.ops.where(ids > 0, 0.0, -1e9)[..., None], 1),
    "mean": lambda ids, x: Pool("mean")(x, ids > 0),
    "there": lambda ids, x: Pool("there")(x, ids > 0),
    "not there": lambda ids, x: Pool("not there")(x, ids > 0),
    "no layer": lambda ids, x: mean(L.Dense(4, "tanh")(x), ids > 0),
    "repeated": lambda ids, x: keras.ops.sum(
        x * keras.ops.repeat(keras.ops.cast(ids > 0, "float64")[..., None], 6, 2), 1
    ),
    "repeated, chosen": lambda ids, x: keras.ops.max(
        keras.ops.where(keras.ops.tile((ids > 0)[..., None], (1, 1, 6)), x, -1e9), 1
    ),
    "repeated, each with a number": lambda ids, x: keras.ops.sum(
        x * (keras.ops.cast(ids > 0, "float64")[..., None] * np.arange(6.0)), 1
    ),
    "heads": lambda ids, x: keras.ops.sum(
        L.EinsumDense("abc,cde->abde", (None, 2, 3))(x) * keras.ops.cast(ids > 0, "float64")[..., None, None], (1, 2)
    ),
}


@pytest.mark.parametrize("make", OWN.values(), ids=OWN)
def test_padding_that_operations_of_one_s_own_leave_out_leaves_no_trace(make, rng):
    """A mask made of the inputs that no layer of Keras is told."""
    ids, y = rng.integers(1, 9, (4, 5)), rng.integers(0, 3, 4)
    ids[~(np.arange(5) < np.array([3, 5, 2, 4])[:, None])] = 0
    found = []
    for length in (5, 8):
        keras.utils.set_random_seed(1)
        i = keras.Input((length,), dtype="int32")
        net = keras.Model(i, L.Dense(3)(make(i, L.Dense(6, "tanh")(L.Embedding(9, 6)(i)))))
        step = kt.Optimizer(net, crossentropy(), SGD(1.0), fisher=kf.type2)
        step.step(np.pad(ids, ((0, 0), (0, length - 5))), y)
        found.append(np.concatenate([np.ravel(v) for v in net.trainable_variables]))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-9, atol=1e-11)


NO_MASKS = {
    "of an example": lambda x, h: h * x[:, :1, :1],
    "of each number": lambda x, h: h * x,
    "of data": lambda x, h: h * x[..., :1],
    "added": lambda x, h: h + x[..., :1],
    "of numbers by feature": lambda x, h: h * tf.cast(x > 0, x.dtype),
    "of a gate": lambda x, h: tf.cast(x[..., :1] > 0, x.dtype) * tf.reduce_mean(h, 1, keepdims=True),
    "of no example": lambda x, h: h * x[:1, :, :1],
    "of weights": lambda x, h: h * tf.nn.relu(tf.reduce_sum(h, -1, True)),
    "of the sizes": lambda x, h: h * tf.round(tf.random.stateless_uniform(tf.shape(x), [1, 2], dtype=x.dtype))[..., :1],
}


@pytest.mark.parametrize("make", NO_MASKS.values(), ids=NO_MASKS)
def test_what_else_multiplies_rows_is_no_mask(make, rng):
    """Rows that have no gradient there are rows all the same."""

    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner, self.head = L.Dense(4, "tanh", name="inner"), L.Dense(3)

        def call(self, x):
            h = self.inner(x)
            return self.head(tf.reduce_sum(make(x, h), 1))

    x = rng.normal(size=(4, 5, 4))
    x[1] = x[:, 3] = 0.0
    net = Net()
    net(x)
    assert kt.records(net, x, rng.integers(0, 3, 4), crossentropy())["inner"].mask is None


def seen_in(names, net, x, y, **settings):
    """Whether padding was named, of which parts, in three steps of one batch."""
    step = kt.Optimizer(net, crossentropy(), SGD(0.1), **settings)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            step.step(x, y)
    found = [str(one.message) for one in told if "move nothing" in str(one.message)]
    return len(found) == 1 and all(repr(name) in found[0] for name in names) if names else not found


def flat(i, x):
    """Tokens of all examples behind each other, then their sums."""
    there = i > 0
    return tf.math.segment_sum(tf.boolean_mask(x, there), tf.cast(tf.where(there)[:, 0], "int32"))


class Untold(keras.Model):
    """Positions that only operations know of."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.table, self.inner, self.head = L.Embedding(9, 6, name="table"), L.Dense(6, name="inner"), L.Dense(3)
        self.loop = L.GRU(6, return_sequences=True, name="loop")

    def build(self, shape):
        self.table.build(shape)
        for layer in (self.inner, self.loop, self.head):
            layer.build((*shape, 6))
        self.built = True

    def call(self, i):
        x = self.inner(self.table(i))
        last = tf.reduce_sum(tf.cast(i > 0, "int32"), 1) - 1
        return self.head(self.loop(x) if self.how is None else self.how(self, i, x, last))


UNTOLD = {
    "boolean_mask": (lambda net, i, x, last: flat(i, x), ("table", "inner")),
    "ragged": (
        lambda net, i, x, last: tf.reduce_mean(tf.RaggedTensor.from_tensor(x, last + 1), 1),
        ("table", "inner"),
    ),
    "the last step": (
        lambda net, i, x, last: tf.gather(net.loop(x), last, batch_dims=1),
        ("table", "inner", "loop.gru_cell"),
    ),
    "behind a gate of data": (
        lambda net, i, x, last: tf.reduce_sum(
            x * tf.cast(i + 1, x.dtype)[..., None] * tf.cast(i > 0, x.dtype)[..., None], 1
        ),
        ("table", "inner"),
    ),
    "mean": (lambda net, i, x, last: tf.reduce_mean(net.loop(x), 1), ()),
    "maximum": (lambda net, i, x, last: tf.reduce_max(tf.concat([x[..., :2]] * 3, -1), 1), ()),
    "a mask": (lambda net, i, x, last: tf.reduce_sum(x * tf.cast(i > 0, x.dtype)[..., None], 1), ()),
}


@pytest.mark.parametrize(("how", "names"), UNTOLD.values(), ids=UNTOLD)
def test_padding_that_no_mask_tells_of_is_named_once(how, names, rng):
    ids = rng.integers(1, 9, (4, 5))
    ids[~(np.arange(5) < np.array([3, 5, 2, 4])[:, None])] = 0
    net = Untold(how)
    net(ids)
    assert seen_in(names, net, ids, rng.integers(0, 3, 4))


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "mask_zero"])
def test_padding_that_only_labels_tell_of_is_named(masked, rng):
    ids, y = rng.integers(1, 9, (4, 5)), rng.integers(0, 3, (4, 5))
    ids[~(np.arange(5) < np.array([3, 5, 2, 4])[:, None])] = 0
    y[ids == 0] = -1
    net = Untold(None)
    net.table = L.Embedding(9, 6, mask_zero=masked, name="table")
    net(ids)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    step = kt.Optimizer(net, loss, SGD(0.1))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        step.step(ids, y)
    assert any("move nothing" in str(one.message) for one in told) != masked


def test_no_mask_is_searched_or_made_where_there_can_be_none(monkeypatch):
    """Among what is added to rows are rows themselves, made of the whole network; and a plan needs no mask."""
    module = importlib.import_module("kfaccore_tensorflow.laid")
    asked = []
    monkeypatch.setattr(module, "_large", lambda number: asked.append(number))
    monkeypatch.setattr(module, "_along", lambda number, axes: pytest.fail("a mask was made"))
    i = keras.Input((5,), dtype="int32")
    x = L.Embedding(9, 6)(i)
    for _ in range(3):
        x = x + L.Dense(6, "tanh")(x)
    x = x + keras.ops.where(i > 0, 0.0, -1e9)[..., None]
    x = x * keras.ops.cast(i > 0, "float64")[..., None]
    kt.coverage(keras.Model(i, L.Dense(3)(keras.ops.max(x, 1))))
    assert len(asked) == 1
