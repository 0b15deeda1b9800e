"""The TensorFlow adapter as people use it: one processor, masks, tied weights, methods, several outputs."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import kfaccore as kf
from tf_shared import SAVES, SGD, L, crossentropy, keras, kt, tf
from tf_shared import double as double

pytestmark = SAVES

ALONE = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import keras, numpy as np, kfaccore as kf, kfaccore_tensorflow as kt
x, y = np.ones((8, 4), "f4"), np.zeros((8, 3), "f4")
made = lambda: keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
keras.utils.set_random_seed(3)
net, loss = made(), keras.losses.MeanSquaredError()
kt.records(net, x, y, loss)
optimizer = kt.Optimizer(net, loss)
losses = [float(optimizer.step(x, y)) for _ in range(4)]
print(losses[-1] < losses[0] / 2)
model = kt.KFACModel(made(), step=kf.SelfTuning())
model.compile(keras.optimizers.SGD(1.0), loss)
print(len(model.fit(x, y, batch_size=4, epochs=2, verbose=0).history["loss"]))
"""


def weights(model):
    return np.concatenate([np.asarray(v).ravel() for v in model.trainable_variables])


def test_one_processor_is_enough():
    """A graph that waits for another would never end: the only thread is its own."""
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.split() == ["True", "2"], done.stderr[-2000:]


class Block(L.Layer):
    """A residual block that loses the mask on its way and passes it on."""

    def __init__(self):
        super().__init__()
        self.supports_masking = True
        self.attention = L.MultiHeadAttention(2, 3)
        self.inner = L.Dense(4, "relu")

    def call(self, x, mask=None):
        x = x + self.attention(x, x, attention_mask=None if mask is None else mask[:, None, :])
        return x + self.inner(x * 1.0)


MASKED = {
    "every token": lambda: [L.Embedding(7, 4, mask_zero=True), L.Dense(4, "tanh"), L.Dense(3)],
    "pooled": lambda: [L.Embedding(7, 4, mask_zero=True), L.Dense(4), L.GlobalAveragePooling1D(), L.Dense(3)],
    "recurrent": lambda: [L.Embedding(7, 4, mask_zero=True), L.Bidirectional(L.GRU(3)), L.Dense(3)],
    "masking": lambda: [
        L.Embedding(7, 4, embeddings_initializer=zero_first),
        L.Masking(),
        L.LSTM(3, return_sequences=True),
        L.Dense(3),
    ],
    "blocks": lambda: [L.Embedding(7, 4, mask_zero=True), Block(), L.LayerNormalization(), L.Dense(3)],
}


def zero_first(shape, dtype=None):
    """Rows of numbers, the first of zeros."""
    rows = np.random.default_rng(0).normal(size=shape)
    rows[0] = 0
    return rows


@pytest.mark.parametrize("make", MASKED.values(), ids=MASKED)
def test_padding_changes_nothing(make, rng):
    ids = rng.integers(1, 7, (4, 3))
    ids[:, 2:] = 0
    y = rng.integers(0, 3, (4, 3))
    found = []
    for length in (3, 6):
        keras.utils.set_random_seed(1)
        net = keras.Sequential([keras.Input((length,), dtype="int32"), *make()])
        pad = ((0, 0), (0, length - 3))
        target = np.pad(y, pad) if len(net.output_shape) == 3 else y[:, 0]
        step = kt.Optimizer(net, crossentropy(), SGD(1.0), fisher=kf.type2)
        assert not step.engine.plan.refused
        loss = float(step.step(np.pad(ids, pad), target))
        found.append((loss, weights(net)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("layer", [L.LSTM, L.SimpleRNN], ids=lambda layer: layer.__name__)
def test_unrolled_steps_are_those_of_the_loop(layer, rng):
    """Whatever positions are masked, and whether masked outputs are zero: what is trained is what the model computes.

    Unrolled, Keras zeroes the outputs of steps that run backwards by the mask as it stands."""
    ids = rng.integers(1, 7, (4, 5))
    ids[[0, 1, 1, 2, 3], [4, 0, 3, 2, 1]] = 0
    words = keras.Input((5,), dtype="int32")
    x = L.Embedding(7, 4, mask_zero=True)(words)
    back = layer(3, go_backwards=True, return_sequences=True, return_state=True, zero_output_for_mask=True)
    outputs, *states = back(x)
    both = L.Bidirectional(layer(2, return_sequences=True))(x)
    last = layer(2, go_backwards=True, zero_output_for_mask=True)(x)
    flat = [L.Reshape((-1,))(each * 1.0) for each in (outputs, *states, both, last)]
    model = keras.Model(words, L.Dense(2)(L.Concatenate()(flat)))

    @tf.function(autograph=False)
    def tapped(ids):
        with kt.tap(model):
            return model(ids)

    np.testing.assert_allclose(tapped(ids), model(ids), rtol=1e-12)
    assert kt.unread(model, ids, 1e-10) == {}
    assert back.zero_output_for_mask
    assert not back.unroll


class Tied(keras.Model):
    """Logits by the transposed table of the words."""

    def __init__(self):
        super().__init__()
        self.words = L.Embedding(7, 4, name="words")
        self.dense = L.Dense(4, "tanh", name="dense")

    def call(self, ids):
        return tf.matmul(self.dense(self.words(ids)), self.words.embeddings, transpose_b=True)


def test_a_tied_table_is_one_block_of_both_uses(rng):
    """F of the records is the Hessian's own, and K-FAC's block the balanced average of both uses."""
    net = Tied()
    ids = rng.integers(0, 7, (3, 2))
    f = np.asarray(net(ids))
    record = kt.records(net, ids, np.zeros_like(f), kf.Gaussian(), fisher=kf.type2)["words"]
    table = net.words.embeddings
    with tf.GradientTape() as tape:
        f = tf.reshape(net(ids), -1)
    J = np.stack([np.asarray(j).T.ravel() for j in tf.convert_to_tensor(tape.jacobian(f, table.value))])
    np.testing.assert_allclose(np.asarray(kf.dense(record))[0], J.T @ J / 3, atol=1e-10)
    x = np.asarray(net.dense(net.words(ids))).reshape(-1, 4)
    step = kt.Optimizer(net, kf.Gaussian(), SGD(0.0), fisher=kf.type2, schedules=kf.Schedules(0.1, 0.0))
    step.step(ids, np.zeros((3, 2, 7)))
    state = step.engine.state.layers["words"]
    block = np.kron(np.asarray(state.G[0]), np.asarray(state.A[0]))
    assert np.linalg.eigvalsh(block)[0] >= 0
    apart = kf.settle(kf.KFAC(), record, 1, 0.1)  # draws as positions of their own, not as examples: the same block
    np.testing.assert_allclose(np.kron(np.asarray(apart.G[0]), np.asarray(apart.A[0])), block, atol=1e-12)
    E = np.asarray(table)
    h = np.einsum("vd,rd,ed->rve", E, 1 - x**2, np.asarray(net.dense.kernel))  # of each output, by a token's row
    # look-ups: A counts tokens, as often as there are draws. The head's: one output at a time, in G each with its x
    counts = 14 * np.diag(np.bincount(ids.ravel(), minlength=7))
    A = (counts + 6 * np.eye(7)) / (14 * 12)
    G = (np.einsum("rve,rvf->ef", h, h) + 7 * np.einsum("ri,rj->ij", x, x)) / 3
    np.testing.assert_allclose(block, np.kron(G, A), atol=1e-12)


@pytest.mark.parametrize("method", [kf.KFAC(), kf.EKFAC()], ids=["kfac", "ekfac"])
def test_micro_batches_of_a_tied_table_add_up(rng, method):
    net = Tied()
    ids = rng.integers(0, 7, (4, 2))
    y = np.zeros((4, 2, 7))
    net(ids)
    whole = kt.records(net, ids, y, kf.Gaussian(), fisher=kf.type2)["words"]
    parts = [kt.records(net, ids[s], y[s], kf.Gaussian(), fisher=kf.type2)["words"] for s in (slice(0, 1), slice(1, 4))]
    hyper = kf.Hyper(0, 0.0, 0.1)
    state = kf.settle(method, whole)
    one = method.measure(state, whole, hyper)
    two = method.combine(*(method.measure(state, part, hyper) for part in parts))
    for a, b in zip(kf.flatten(one).values(), kf.flatten(two).values(), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-10, atol=1e-12)


def test_batch_norm_couples_examples_and_is_marked(rng):
    """In training rows mix examples: of independent signs the mean of F is the Hessian's, and FNGD is refused."""
    net = keras.Sequential([keras.Input((3,)), L.Dense(2), L.BatchNormalization(name="norm"), L.Dense(2)])
    net.set_weights([w + 0.1 * rng.normal(size=w.shape) for w in net.get_weights()[:-2]] + net.get_weights()[-2:])
    x = rng.normal(size=(4, 3))
    y = np.zeros((4, 2))
    found = [
        kt.records(net, x, y, kf.Gaussian(), training=True, draws=500, seed=seed, method=kf.KFAC()) for seed in range(2)
    ]
    variables = net.layers[0].trainable_variables
    with tf.GradientTape() as tape:
        f = tf.reshape(net(x, training=True), -1)
    J = np.concatenate([np.asarray(j).reshape(8, -1, 2) for j in tape.jacobian(f, variables)], axis=1)
    F = np.einsum("kio,kjp->oipj", J, J).reshape(8, 8) / 4
    got = np.mean([np.asarray(kf.dense(next(iter(r.values()))))[0] for r in found], axis=0)
    assert next(iter(found[0].values())).batch == 1
    assert np.linalg.norm(got - F) < 0.15 * np.linalg.norm(F)
    step = kt.Optimizer(net, kf.Gaussian(), SGD(0.1), method=kf.FNGD(steps=0))
    with pytest.raises(Exception, match="mix examples or are shared by them"):
        step.step(x, y)


def test_methods_of_own_gradients_are_given_them(rng):
    """FNGD of one layer is (F + damping)^-1 of the gradient, F of the true labels; sampled ones are refused."""
    net = keras.Sequential([keras.Input((3,)), L.Dense(2, use_bias=False)])
    x, y = rng.normal(size=(5, 3)), rng.integers(0, 2, 5)
    record = kt.records(net, x, y, crossentropy(), fisher=kf.empirical)[
        "dense" if net.layers[0].name == "dense" else net.layers[0].name
    ]
    before = weights(net)
    step = kt.Optimizer(net, crossentropy(), SGD(1.0), method=kf.FNGD(steps=0), schedules=kf.Schedules(0.1))
    step.step(x, y)
    assert step.engine.fisher is kf.empirical
    gradient = np.asarray(record.examples())[0, 0].sum(0) / 5
    want = np.linalg.solve(np.asarray(kf.dense(record))[0] + 0.1 * np.eye(6), gradient.ravel()).reshape(2, 3).T
    np.testing.assert_allclose(before - weights(net), want.ravel(), rtol=1e-8, atol=1e-11)
    with pytest.raises(ValueError, match="takes the loss's own gradients"):
        kt.Optimizer(net, crossentropy(), SGD(1.0), method=kf.FNGD(), fisher=kf.monte_carlo)
    with pytest.raises(ValueError, match="shares coefficients between epochs"):
        kt.Optimizer(net, crossentropy(), SGD(1.0), method=kf.FNGD())


def test_what_is_not_covered_has_a_diagonal_for_the_asking(rng):
    """For many draws the squares of a shared row are the diagonal of the Hessian; a step that judges has it unasked."""

    class Sorted(L.Layer):
        def build(self, shape):
            self.gain = self.add_weight(shape=(shape[-1],), name="gain", initializer="normal")

        def call(self, x):
            return x * tf.math.top_k(self.gain, x.shape[-1]).values

    net = keras.Sequential([keras.Input((3,)), Sorted(name="sorted"), L.Dense(2)])
    x = rng.normal(size=(4, 3))
    y = np.zeros((4, 2))
    record = kt.records(net, x, y, kf.Gaussian(), draws=2000, uncovered=kf.Diagonal())["sorted.gain"]
    with tf.GradientTape() as tape:
        f = tf.reshape(net(x), -1)
    J = np.asarray(tape.jacobian(f, net.layers[0].gain.value))
    assert (record.batch, record.d_in) == (1, 1)
    np.testing.assert_allclose(np.diag(np.asarray(kf.dense(record))[0]), np.sum(J**2, 0) / 4, rtol=0.15)
    step = kt.Optimizer(net, kf.Gaussian())
    assert list(step.engine.plan.blocks()) == [net.layers[1].name, "sorted.gain"]
    losses = [float(step.step(x, y)) for _ in range(5)]
    assert losses[-1] < 0.5 * losses[0]


def heads():
    keras.utils.set_random_seed(1)
    x = keras.Input((4,))
    h = L.Dense(5, "tanh", name="trunk")(x)
    return keras.Model(x, {"kind": L.Dense(3, name="kind")(h), "size": L.Dense(2, name="size")(h)})


def test_several_outputs(rng):
    """The Fisher of a weighted sum of losses is its Hessian, and `fit` takes the steps of the own loop."""
    x = rng.normal(size=(6, 4))
    y = {"kind": rng.integers(0, 3, 6), "size": rng.normal(size=(6, 2))}
    joint = kf.Joint({"kind": kf.SoftmaxCrossEntropy(), "size": kf.Gaussian()}, {"size": 0.5})
    losses = {"kind": crossentropy(), "size": keras.losses.MeanSquaredError()}
    ours, theirs = heads(), kt.KFACModel(heads(), clocks=kf.Clocks(1, 1))
    step = kt.Optimizer(ours, joint, SGD(0.1), clocks=kf.Clocks(1, 1))
    theirs.compile(SGD(0.1), losses, loss_weights={"kind": 1.0, "size": 0.5})
    for _ in range(2):
        step.step(x, y)
        theirs.fit(x, y, batch_size=6, shuffle=False, verbose=0)
    np.testing.assert_allclose(weights(theirs), weights(ours), rtol=1e-8)
    record = kt.records(ours, x, y, joint, fisher=kf.type2)["trunk"]
    variable = ours.get_layer("trunk").bias
    with tf.GradientTape(persistent=True) as tape:
        f = ours(x)
    jac = {name: np.asarray(tape.jacobian(head, variable.value)) for name, head in f.items()}
    p = np.asarray(tf.nn.softmax(f["kind"]))
    H = np.einsum("bc,cd->bcd", p, np.eye(3)) - p[:, :, None] * p[:, None, :]
    F = np.einsum("bci,bcd,bdj->ij", jac["kind"], H, jac["kind"])
    F += 0.5 * np.einsum("bci,bcj->ij", jac["size"], jac["size"])
    got = np.asarray(kf.dense(record))[0].reshape(5, 5, 5, 5)[:, 4, :, 4]
    np.testing.assert_allclose(got, F / 6, atol=1e-10)


class Plain(keras.Model):
    """A call without mask and training."""

    def __init__(self):
        super().__init__()
        self.hidden = L.Dense(5, "tanh")
        self.out = L.Dense(3)

    def call(self, x):
        return self.out(self.hidden(x))


def test_subclassed_models_and_names_that_keras_counts_up(tmp_path, rng):
    x, y = rng.normal(size=(20, 4)), rng.integers(0, 3, 20)
    made = [kt.KFACModel(Plain(), clocks=kf.Clocks(1, 2)) for _ in range(2)]  # dense and dense_2
    for model in made:
        model.compile(SGD(0.1), crossentropy())
        model.fit(x, y, batch_size=10, epochs=2, shuffle=False, verbose=0)
    made[0].save_weights(tmp_path / "it.weights.h5")
    made[1].load_weights(tmp_path / "it.weights.h5")
    for model in made:
        model.fit(x, y, batch_size=10, shuffle=False, verbose=0)
    np.testing.assert_array_equal(weights(made[1]), weights(made[0]))


def test_callbacks_of_every_day(tmp_path, rng):
    x, y = rng.normal(size=(20, 4)), rng.integers(0, 3, 20)
    model = kt.KFACModel(Plain())
    model.compile(SGD(0.1), crossentropy(), metrics=["accuracy"], weighted_metrics=["accuracy"])
    told = []
    calls = [
        keras.callbacks.ReduceLROnPlateau(monitor="loss", factor=0.5, patience=0, min_delta=10.0),
        keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.weights.h5", save_weights_only=True),
        keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: told.append(model.engine.info.metrics())),
    ]
    weight = np.linspace(0.5, 1, 20)
    model.fit(x, y, batch_size=10, epochs=3, verbose=0, callbacks=calls, class_weight={0: 1.0, 1: 2.0, 2: 1.0})
    model.fit(x, y, batch_size=10, verbose=0, sample_weight=weight, validation_data=(x, y, weight))
    assert float(model.optimizer.learning_rate) < 0.1
    assert all(isinstance(value, float) for each in told for value in each.values())
    assert len(told) == 3


def test_one_example_and_ids_shared_by_all(rng):
    """A batch of one is traced as any other; embedded positions are rows of no example."""
    x = rng.normal(size=(1, 4))
    net = keras.Sequential([keras.Input((4,)), L.LayerNormalization(), L.Dense(3)])
    step = kt.Optimizer(net, kf.Gaussian(), SGD(0.1))
    step.step(x, np.zeros((1, 3)))
    assert not step.engine.plan.refused
    assert step.info.counts() == {kf.Code.OK: len(step.engine.plan.parts)}

    class Placed(keras.Model):
        def __init__(self):
            super().__init__()
            self.places = L.Embedding(5, 4, name="places")
            self.head = L.Dense(2, name="head")

        def call(self, x):
            return self.head(tf.nn.tanh(x + self.places(tf.range(5))))

    net = Placed()
    x = rng.normal(size=(3, 5, 4))
    f = np.asarray(net(x))
    found = kt.records(net, x, np.zeros_like(f), kf.Gaussian(), draws=3000)["places"]
    with tf.GradientTape() as tape:
        f = tf.reshape(net(x), -1)
    J = np.stack([np.asarray(j).T.ravel() for j in tf.convert_to_tensor(tape.jacobian(f, net.places.embeddings.value))])
    assert found.batch == 1
    F = J.T @ J / 3
    assert np.linalg.norm(np.asarray(kf.dense(found))[0] - F) < 0.1 * np.linalg.norm(F)


def recurrent():
    return keras.Sequential([keras.Input((None, 5)), L.LSTM(4, name="lstm"), L.Dense(3, name="head")])


def test_steps_of_any_length_are_read_from_the_batch(rng):
    """An input of open length is as one of the batches' length: in the first step, which strict refuses in too."""
    x, y = rng.normal(size=(8, 6, 5)), rng.integers(0, 3, 8)
    found = []
    for length in (None, 6):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((length, 5)), L.LSTM(4, name="lstm"), L.Dense(3, name="head")])
        step = kt.Optimizer(model, crossentropy(), SGD(1.0), fisher=kf.type2, strict=True)
        step.step(x, y)
        found.append(np.concatenate(model.get_weights(), None))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-12)
    assert not kt.Optimizer(recurrent(), crossentropy(), SGD(1.0)).engine.ready  # a batch shows the length


def test_a_file_is_taken_in_the_first_step_where_a_batch_makes_the_plan(rng, tmp_path):
    x, y = rng.normal(size=(8, 6, 5)), rng.integers(0, 3, 8)
    first = kt.Optimizer(recurrent(), crossentropy(), SGD(1.0))
    with pytest.raises(ValueError, match="has no plan before its first batch: step once, then save"):
        first.save(tmp_path / "none.safetensors")
    first.step(x, y)
    first.save(tmp_path / "run.safetensors")
    second = kt.Optimizer(recurrent(), crossentropy(), SGD(1.0))
    second.load(tmp_path / "run.safetensors")
    losses = [[float(one.step(x, y)) for _ in range(2)] for one in (first, second)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-12)
