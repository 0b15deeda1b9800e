"""What rules of the step are told beside records: the loss, and its own gradients by example."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest

import kfaccore as kf
from kfaccore.step.known import Known
from kfaccore.step.model import expansion
from tf_shared import SGD, L, keras, kt, tf
from tf_shared import double as double

SEEN: dict = {}
TOLD: list = []
NOTHING = Known()


class Keeping(kf.SelfTuning):
    """Remembers what the last step was given."""

    def __call__(self, motion, directions, grads, records, l2=0.0, known=NOTHING):
        SEEN.update(grads=grads, known=known, records=records)
        return super().__call__(motion, directions, grads, records, l2, known)


def images():
    layers = (L.Conv2D(4, 3, padding="same"), L.BatchNormalization(), L.ReLU(), L.DepthwiseConv2D(2))
    return keras.Sequential([keras.Input((5, 5, 2)), *layers, L.Flatten(), L.Dense(3)])


class Tied(keras.Model):
    """Padded words, their mask, and logits by the table of the words."""

    def __init__(self):
        super().__init__()
        self.words = L.Embedding(7, 4, mask_zero=True)
        self.inner = L.Dense(4, "tanh")

    def call(self, ids):
        return tf.matmul(self.inner(self.words(ids)), self.words.embeddings, transpose_b=True)


def with_losses():
    """A model that adds a loss of its prediction to the one it is trained on."""

    class Shrunk(L.Layer):
        def call(self, f):
            self.add_loss(0.1 * tf.reduce_mean(tf.square(f)))
            return f

    return keras.Sequential([keras.Input((4,)), L.Dense(5, "tanh"), L.Dense(3), Shrunk()])


CROSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
CASES = {  # model, loss, inputs, targets, parts with own gradients
    "images": (images, CROSS, lambda rng: rng.normal(size=(6, 5, 5, 2)), lambda rng: rng.integers(0, 3, 6), 4),
    "tied": (Tied, CROSS, lambda rng: rng.integers(0, 7, (6, 5)), lambda rng: rng.integers(0, 7, (6, 5)), 1),
    "soft labels, losses of its own": (
        with_losses,
        keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1),
        lambda rng: rng.normal(size=(6, 4)),
        lambda rng: rng.dirichlet(np.ones(3), 6),
        2,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_own_gradients_add_up_to_the_gradient(name, rng):
    """Under sample weights and whatever the labels are. Rows before BatchNorm mix examples, and those of a tied table
    are drawn: neither has any of its own."""
    make, loss, inputs, targets, parts = CASES[name]
    model = make()
    x = inputs(rng)
    y = targets(rng)
    model(x[:1])
    ours = kt.Optimizer(model, loss, core=kf.Preconditioner(kf.KFAC(), step=Keeping()), draws=2)
    value = ours.step(x, y, None if name == "tied" else np.arange(1.0, 7.0) / 3)
    known, grads, drawn = SEEN["known"], SEEN["grads"], SEEN["records"]
    assert float(known.loss) == pytest.approx(float(value), rel=1e-12)
    assert len(known.own.records) == parts < len(grads) + (name == "soft labels, losses of its own")
    for part, record in known.own.records.items():
        found = np.einsum("dbnso,bnsi->boi", record.g, record.rows()) / record.n
        np.testing.assert_allclose(found, grads[part].reshape(found.shape), rtol=1e-9, atol=1e-12)
    assert {record.draws for record in drawn.values()} == {2}
    assert ours.info.step["with_own"] == len(grads) - parts


class Asked(kf.SelfTuning):
    """Remembers what it was asked to judge."""

    def judge(self, motion, share, before, after):
        SEEN.update(before=before, after=after)
        return super().judge(motion, share, before, after)


def test_a_step_is_judged_under_the_draws_it_was_made_with(rng):
    """The second forward pass drops the same units, and what the first one left behind stays: statistics move once."""
    layers = [L.Dense(6), L.BatchNormalization(momentum=0.5), L.Dropout(0.5), L.Dense(3)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    x = rng.normal(size=(8, 4))
    y = rng.integers(0, 3, 8)
    before = model.non_trainable_variables
    start = [v.numpy() for v in before]
    first = np.array(model.layers[0](x)).mean(0)
    ours = kt.Optimizer(model, CROSS, step=Asked())
    value = float(ours.step(x, y))
    assert SEEN["before"] == value
    np.testing.assert_allclose(model.layers[1].moving_mean.numpy(), first / 2, rtol=1e-12)
    after = [v.numpy() for v in before]
    for v, old in zip(before, start, strict=True):
        v.assign(old)
    assert float(CROSS(y, model(x, training=True))) == pytest.approx(SEEN["after"], rel=1e-12)
    for v, new in zip(before, after, strict=True):
        assert np.array_equal(v.numpy(), new) or "moving" in v.path  # one draw of the seeds, as one pass takes


class Traced(L.Layer):
    """Draws numbers of Python and NumPy while it is traced, as AugMix does."""

    def call(self, x, training=None):
        noise = np.random.normal(size=x.shape[1:]) * random.choice([1.0, -2.0, 3.0])
        TOLD.append(noise)
        return x + noise


def test_numbers_drawn_while_a_step_is_traced_are_those_it_is_judged_under(rng):
    model = keras.Sequential([keras.Input((4,)), L.Dense(6), Traced(), L.Dense(3)])
    x, y = rng.normal(size=(8, 4)), rng.integers(0, 3, 8)
    ours = kt.Optimizer(model, CROSS, step=Asked())
    TOLD.clear()
    np.random.seed(2)
    random.seed(2)
    ours.step(x, y)
    follows = np.random.normal(), random.random()
    first, second = TOLD
    np.testing.assert_array_equal(first, second)
    dense = [layer for layer in model.layers if isinstance(layer, L.Dense)]
    assert float(CROSS(y, dense[1](dense[0](x) + first))) == pytest.approx(SEEN["after"], rel=1e-12)
    np.random.seed(2)
    random.seed(2)
    Traced()(tf.zeros((1, 6), "float64"))
    assert follows == (np.random.normal(), random.random())  # as after one pass


class Counting(L.Layer):
    """What no list of Keras's holds: a variable of TensorFlow, a metric, and draws of the seed of all."""

    def __init__(self):
        super().__init__()
        self.many = tf.Variable(0.0, dtype="float64", trainable=False)
        self.sum = keras.metrics.Sum()

    def call(self, x, training=None):
        self.many.assign_add(1.0)
        self.sum.update_state(2.0)
        return x + keras.random.normal(tf.shape(x)) if training else x


@pytest.mark.parametrize("fit", [False, True])
def test_whatever_a_pass_writes_is_written_once_a_step(fit, rng):
    x, y = rng.normal(size=(2, 4, 3)), np.array([0, 1])
    layers = [Counting(), L.LSTM(3, stateful=True), L.GRU(3, stateful=True), L.SimpleRNN(3, stateful=True)]
    expanded = [layer for rnn in layers[1:] for layer in (rnn, L.RepeatVector(2))][:-1]
    model = keras.Sequential([keras.Input(batch_shape=(2, 4, 3)), layers[0], *expanded, L.Dense(2)])
    written = [layers[0].many, *layers[0].sum.variables, *layers[1].states, *layers[2].states, *layers[3].states]
    start = [v.numpy() for v in written]
    keras.utils.set_random_seed(7)
    value = float(CROSS(y, model(x, training=True)))
    right = [v.numpy() for v in written]
    for v, old in zip(written, start, strict=True):
        v.assign(old)
    keras.utils.set_random_seed(7)
    if fit:
        ours = kt.KFACModel(model, step=Asked())
        ours.compile(SGD(1.0), CROSS)
        ours.fit(x, y, shuffle=False, verbose=0)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert float(kt.Optimizer(model, CROSS, step=Asked()).step(x, y)) == pytest.approx(value, rel=1e-12)
    for v, wanted in zip(written, right, strict=True):
        np.testing.assert_allclose(v.numpy(), wanted, rtol=1e-12)
    for v, old in zip(written, start, strict=True):
        v.assign(old)
    keras.utils.set_random_seed(7)
    assert float(CROSS(y, model(x, training=True))) == pytest.approx(SEEN["after"], rel=1e-12)


class Mixing(keras.Model):
    """Embedded places, and normalisations of few values one after the other: a row moves every example."""

    def __init__(self):
        super().__init__()
        self.places = L.Embedding(3, 4, name="places")
        self.inner = [layer for _ in range(3) for layer in (L.Dense(4), L.BatchNormalization(center=False))]
        self.head = L.Dense(3, name="head")

    def call(self, x, training=False):
        x = tf.reduce_mean(x + self.places(tf.range(3)), 1)
        for layer in self.inner:
            x = layer(x, training=training) if isinstance(layer, L.BatchNormalization) else tf.tanh(layer(x))
        return self.head(x)


def test_a_rule_has_an_example_s_rows_even_where_each_moves_all(rng):
    """As one example they are one sample of the curvature: the model would be flat along a mixture of any two
    directions. What all examples share stays one row."""
    model = Mixing()
    x = rng.normal(size=(4, 3, 4))
    model(x)
    core = kf.Preconditioner(kf.KFAC(), step=Keeping())
    ours = kt.Optimizer(model, CROSS, core=core)
    ours.step(x, rng.integers(0, 3, 4))
    records = SEEN["records"]
    assert {name for name, record in records.items() if record.batch != 4} == {"places"}
    assert any(place.axis is None for name in records.keys() - {"places"} for place in ours.engine.owners.places[name])
    inner = {name: record for name, record in records.items() if name in ours.engine.mixing and name != "places"}
    grads = {name: SEEN["grads"][name] for name in inner}
    pair = tuple({name: rng.normal(size=grad.shape) for name, grad in grads.items()} for _ in range(2))
    F = expansion(inner, grads, pair).F
    assert np.linalg.det(F) > 1e-2 * F[0, 0] * F[1, 1]


def test_sample_weights_of_both_signs_go_below_0(double):
    """A policy gradient: its loss with a constant takes the same steps."""

    def trained(shift):
        keras.utils.set_random_seed(0)
        rng = np.random.default_rng(0)
        x = rng.normal(size=(128, 4))
        action = rng.integers(3, size=128)
        advantage = np.where(action == (x[:, 0] > 0).astype(int) + (x[:, 1] > 0), 1.0, -0.3)

        class Shifted(L.Layer):
            def call(self, f):
                self.add_loss(tf.constant(shift, f.dtype))
                return f

        model = keras.Sequential([keras.Input((4,)), L.Dense(8, "tanh"), L.Dense(3), Shifted()])
        optimizer = kt.Optimizer(model, CROSS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.array([float(optimizer.step(x, action, sample_weight=advantage)) - shift for _ in range(20)])

    plain = trained(0.0)
    assert plain[-1] < -0.5
    np.testing.assert_allclose(trained(5.0), plain, atol=2e-5)
