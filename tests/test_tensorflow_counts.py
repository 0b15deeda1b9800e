"""What counts in the TensorFlow adapter: masks that reach the prediction, ignored labels, outputs without a loss."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from tf_shared import SAVES, SGD, L, crossentropy, keras, kt, tf
from tf_shared import double as double

told_of = pytest.importorskip("kfaccore_tensorflow.losses")
pytestmark = SAVES
SHAPE = (4, 3, 3)  # examples, positions, outputs
MASK = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]], bool)
LOSSES = {
    "sparse": crossentropy,
    "ignoring": lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=1),
    "onehot": lambda: keras.losses.CategoricalCrossentropy(from_logits=True),
    "binary": lambda: keras.losses.BinaryCrossentropy(from_logits=True),
    "mse": keras.losses.MeanSquaredError,
}


def masked(f):
    """A prediction as layers with a mask give it."""
    f = tf.identity(f)
    f._keras_mask = tf.constant(MASK)
    return f


def target(name, rng):
    labels = rng.integers(0, 3, SHAPE[:-1])
    values = {"onehot": np.eye(3)[labels], "binary": rng.uniform(size=SHAPE), "mse": rng.normal(size=SHAPE)}
    return values.get(name, labels)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum", "mean_with_sample_weight"])
@pytest.mark.parametrize("name", LOSSES)
def test_under_a_mask_draws_over_n_are_the_hessian_of_the_keras_loss(name, weighted, reduction, rng):
    """Masked positions that have a label too, and the other way."""
    f, y = rng.normal(size=SHAPE), target(name, rng)
    w = rng.uniform(0.5, 2, SHAPE[:-1]) if weighted else None
    loss = LOSSES[name]()
    loss.reduction = reduction
    ours = kt.objective(loss)
    told = [told_of.Told(y, w, MASK)]
    draws = ours.draws_of(kf.type2, 1, [f], told, None)[0].reshape(-1, 12, 3)
    H = np.einsum("vpi,vpj->pij", draws, draws) / ours.share_of([f], told)
    flat = tf.Variable(f)
    with tf.GradientTape() as outer:
        with tf.GradientTape() as inner:
            value = ours.value(tf.constant(y), masked(flat), w)
        first = inner.gradient(value, flat)
    want = outer.jacobian(first, flat).numpy().reshape(12, 3, 12, 3)
    np.testing.assert_allclose(np.einsum("pij,pq->piqj", H, np.eye(12)), want, atol=1e-13)


@pytest.mark.parametrize("name", ["softmax", "bernoulli", "gaussian"])
def test_a_loss_of_the_core_is_over_the_positions_a_mask_leaves(name, rng):
    loss = {"softmax": kf.SoftmaxCrossEntropy(ignore=1), "bernoulli": kf.Bernoulli(), "gaussian": kf.Gaussian()}[name]
    f, y = tf.constant(rng.normal(size=SHAPE)), target({"softmax": "", "bernoulli": "binary"}.get(name, "mse"), rng)
    ours = kt.objective(loss)
    n = float(loss.normaliser(f.numpy(), y, MASK))
    with tf.GradientTape() as tape:
        tape.watch(f)
        value = ours.value(tf.constant(y), masked(f), None)
    assert float(value) == pytest.approx(float(loss.value(f.numpy(), y, MASK)) / n, rel=1e-13)
    told = [told_of.Told(y, None, MASK)]
    g = ours.draws_of(kf.empirical, 1, [f.numpy()], told, None)[0][0] / ours.share_of([f.numpy()], told)
    np.testing.assert_allclose(tape.gradient(value, f), g, atol=1e-14)
    np.testing.assert_allclose(g, loss.gradient(f.numpy(), y, MASK) / n, atol=1e-14)


def trunk(*heads):
    keras.utils.set_random_seed(1)
    x = keras.Input((4,))
    h = L.Dense(5, "tanh", name="trunk")(x)
    outputs = {name: L.Dense(size, name=name)(h) for name, size in {"size": 2, "kind": 3}.items() if name in heads}
    return keras.Model(x, outputs)


def stepped(model, loss, x, y):
    """What the trunk is after two steps."""
    step = kt.Optimizer(model, loss, SGD(0.5), fisher=kf.type2)
    for _ in range(2):
        step.step(x, y)
    return np.asarray(model.get_layer("trunk").kernel)


IGNORING = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
UNLABELLED = {
    "left out": {"size": "mse"},
    "None": {"kind": None, "size": "mse"},
    "ignored": {"kind": IGNORING, "size": "mse"},
    "joint": kf.Joint({"kind": kf.SoftmaxCrossEntropy(ignore=-1), "size": kf.Gaussian()}, {"size": 1.0}),
}


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("loss", UNLABELLED.values(), ids=UNLABELLED)
def test_an_output_that_nothing_is_told_of_is_as_good_as_none(loss, rng):
    x, y = rng.normal(size=(6, 4)), {"kind": np.full(6, -1), "size": rng.normal(size=(6, 2))}
    alone = kf.Joint({"size": kf.Gaussian()}) if isinstance(loss, kf.Joint) else {"size": "mse"}
    want = stepped(trunk("size"), alone, x, {"size": y["size"]})
    model = trunk("size", "kind")
    head = np.asarray(model.get_layer("kind").kernel)
    np.testing.assert_allclose(stepped(model, loss, x, y), want, rtol=1e-11)
    np.testing.assert_array_equal(model.get_layer("kind").kernel, head)


@pytest.mark.parametrize("loss", [IGNORING, kf.SoftmaxCrossEntropy(ignore=-1)], ids=["keras", "core"])
def test_a_batch_in_which_nothing_counts_is_left_out(loss, rng):
    """Of weights, curvature and the step's own numbers nothing is moved by it."""
    x, y = rng.normal(size=(3, 8, 4)), rng.integers(0, 3, (3, 8))
    y[1] = -1
    found = []
    for batches in ((0, 2) * 3, (1, 0, 1, 2) * 3):
        keras.utils.set_random_seed(1)
        model = kt.KFACModel(keras.Sequential([keras.Input((4,)), L.Dense(3)]), step=kf.SelfTuning())
        model.compile(SGD(1.0), loss)
        with pytest.warns(UserWarning, match="nothing counts") if 1 in batches else np.errstate():
            losses = [float(model.train_on_batch(x[i], y[i])) for i in batches]
        found.append((losses, np.asarray(model.inner.layers[0].kernel), model.engine.state.motion.damping))
    assert found[1][0][0] == 0.0
    np.testing.assert_array_equal(found[1][1], found[0][1])
    assert found[1][2] == found[0][2]


def test_padding_leaves_no_trace_where_rows_stand_together(rng):
    """Before a BatchNormalization that trains, and of a table of positions that all examples share."""

    class Positions(L.Layer):
        def __init__(self):
            super().__init__(name="positions")
            self.supports_masking = True
            self.table = L.Embedding(6, 4, name="table")

        def call(self, x):
            return x + self.table(tf.range(tf.shape(x)[1]))

    ids, y = rng.integers(1, 7, (6, 3)), rng.integers(0, 3, 6)
    ids[::2, 1:] = 0
    found = []
    for length in (3, 6):
        keras.utils.set_random_seed(1)
        words = [L.Embedding(7, 4, mask_zero=True), Positions(), L.Dense(4, name="mixed"), L.BatchNormalization()]
        net = keras.Sequential([keras.Input((length,), dtype="int32"), *words, L.GlobalAveragePooling1D(), L.Dense(3)])
        step = kt.Optimizer(net, crossentropy(), SGD(1.0), fisher=kf.type2)
        step.step(np.pad(ids, ((0, 0), (0, length - 3))), y)
        assert {"mixed", "positions.table"} <= set(step.engine.mixing)
        found.append(np.concatenate([np.ravel(v) for v in net.trainable_variables]))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-9, atol=1e-12)


def test_a_model_is_exported_as_it_predicts(tmp_path, rng):
    x, y = rng.normal(size=(8, 4)), rng.integers(0, 3, 8)
    model = kt.KFACModel(keras.Sequential([keras.Input((4,)), L.Dense(3)]))
    model.compile(SGD(0.1), crossentropy())
    model.fit(x, y, verbose=0)
    model.export(tmp_path / "it", verbose=False)
    served = tf.saved_model.load(str(tmp_path / "it"))
    np.testing.assert_allclose(served.serve(tf.constant(x)), model.predict(x, verbose=0), rtol=1e-12)
