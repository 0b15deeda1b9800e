"""Every layer of keras.layers that holds weights, and models of one's own: records against one example at a time."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from tf_shared import L, crossentropy, keras, kt, tf
from tf_shared import double as double

slopes_of = pytest.importorskip("kfaccore_tensorflow.slopes")
ACTIVATIONS = {"Softplus", "Softsign", "Relu", "Relu6", "LeakyRelu", "Elu", "Selu"}
IMAGE = (6, 5, 4)
WORDS = (3, 4)


class Own(keras.Model):
    """Weights of the root model: a prefix token, a table of positions, a gain, a matrix on the left, a temperature."""

    def __init__(self):
        super().__init__()
        self.token = self.add_weight(shape=(1, 1, 4), name="token", initializer="normal")
        self.table = self.add_weight(shape=(4, 4), name="table", initializer="normal")
        self.gain = self.add_weight(shape=(4,), name="gain", initializer="normal")
        self.left = self.add_weight(shape=(3, 4), name="left", initializer="normal")
        self.heat = self.add_weight(shape=(), name="heat", initializer="ones")
        self.scale = self.add_weight(shape=(4,), name="scale", initializer="normal")

    def call(self, x):
        x = tf.concat([tf.tile(self.token, [tf.shape(x)[0], 1, 1]), x], axis=1) + self.table
        x = tf.nn.tanh(x * self.gain) * tf.exp(self.scale)
        return tf.reduce_sum(self.left @ x, axis=1)[:, :2] / self.heat


class Tied(keras.Model):
    """Logits by the transposed table of the words."""

    def __init__(self, how):
        super().__init__()
        self.words = L.Embedding(7, 4, name="words")
        self.dense = L.Dense(4, "tanh", name="dense")
        self.how = how

    def call(self, ids):
        x = self.dense(self.words(ids))
        table = self.words.embeddings
        if self.how == "einsum":
            return keras.ops.einsum("bsd,vd->bsv", x, table)
        if self.how == "keras":
            return keras.ops.matmul(x, keras.ops.transpose(table))
        return tf.matmul(x, table, transpose_b=True)


class Doubled(L.Dense):
    """A subclass with another call."""

    def call(self, inputs, training=None):
        return 2 * super().call(inputs)


class Decorated(keras.Model):
    """`call` in a tf.function of its own."""

    def __init__(self):
        super().__init__()
        self.dense = L.Dense(3)

    @tf.function
    def call(self, x):
        return self.dense(x)


class Asking(Decorated):
    """One that asks tensors in Python, which a tf.function may."""

    @tf.function
    def call(self, x):
        if tf.reduce_sum(x) > 100:
            x = x / 100
        for _ in tf.range(2):
            x = tf.tanh(x)
        return self.dense(x)


class Scale(L.Layer):
    """A gain of one's own, as ConvNeXt has it."""

    def build(self, shape):
        self.gain = self.add_weight(shape=(shape[-1],), name="gain", initializer="ones")

    def call(self, x):
        return x * self.gain


class Changed(L.Layer):
    """Gains that are changed on their way, by several paths too, and a matrix times a number."""

    def build(self, shape):
        self.gains = [self.add_weight(shape=(4,), name=f"gain{i}", initializer="normal") for i in range(5)]
        self.matrix = self.add_weight(shape=(4, 4), name="matrix", initializer="normal")

    def call(self, x):
        one, two, three, four, five = (tf.convert_to_tensor(g) for g in self.gains)
        x = x * (one * tf.sigmoid(one)) + (two + two)
        x = x / (1 + tf.square(three))
        x = x * (four / tf.norm(tf.constant([3.0, 4.0], x.dtype)) - tf.square(four) * 0.3)
        return tf.matmul(x * (1 - tf.abs(five)), -2 * self.matrix / 3 + self.matrix)


def sequence(*layers, shape=IMAGE):
    """Layers and a head of two numbers."""
    return lambda: keras.Sequential([keras.Input(shape), *(layer() for layer in layers), L.Flatten(), L.Dense(2)])


def attention():
    query = keras.Input((3, 4))
    value = keras.Input((4, 6))
    x = L.MultiHeadAttention(2, 3, value_dim=2, name="mha")(query, value)
    x = x + L.GroupQueryAttention(4, 4, 2, name="gqa")(x, x)
    return keras.Model([query, value], L.Dense(2)(L.Flatten()(x)))


def images(rng):
    return rng.normal(size=(3, *IMAGE))


def words(rng):
    return rng.normal(size=(3, *WORDS))


class Adapted(L.Layer):
    """Weights that are products of two parameters, or of one with itself, added to others or not: filters, matrices and
    a transposed one."""

    def build(self, shape):
        sizes = {"e": (16, 2), "f": (2, 3), "a": (3, 2), "b": (2, 5), "c": (4, 2), "d": (2, 5), "s": (5, 5)}
        self.w = {name: self.add_weight(shape=size, name=name, initializer="normal") for name, size in sizes.items()}
        self.base = self.add_weight(shape=(3, 5), name="base", initializer="normal", trainable=False)

    def call(self, x):
        w = self.w
        x = tf.nn.conv2d(x, tf.reshape(2.0 * (w["e"] @ w["f"]), (2, 2, 4, 3)), 2, "SAME")
        x = tf.tanh(x @ (self.base - 0.5 * (w["a"] @ w["b"])))
        x = tf.tanh(x @ (w["s"] @ w["s"]))
        return tf.matmul(x, w["c"] @ w["d"], transpose_b=True)


def ids(rng):
    return rng.integers(0, 7, (3, 2))


TEXT = {"shape": WORDS}
CASES = {
    "separable": (sequence(lambda: L.SeparableConv2D(3, 2, depth_multiplier=2, strides=2, padding="same")), images),
    "separable 1d": (sequence(lambda: L.SeparableConv1D(3, 2, dilation_rate=2), **TEXT), words),
    "depthwise": (sequence(lambda: L.DepthwiseConv2D((2, 3), depth_multiplier=2, dilation_rate=2)), images),
    "dilated": (sequence(lambda: L.Conv2D(3, 2, dilation_rate=2, padding="same")), images),
    "grouped": (sequence(lambda: L.Conv2D(4, 2, groups=2)), images),
    "grouped 1d": (sequence(lambda: L.Conv1D(4, 2, groups=2, strides=2, padding="causal"), **TEXT), words),
    "conv 1d": (sequence(lambda: L.Conv1D(3, 2, padding="causal", dilation_rate=2), **TEXT), words),
    "transposed 1d": (sequence(lambda: L.Conv1DTranspose(3, 2, strides=3, padding="same"), **TEXT), words),
    "transposed": (sequence(lambda: L.Conv2DTranspose(2, (3, 2), strides=(2, 1), padding="same")), images),
    "transposed wide": (sequence(lambda: L.Conv2DTranspose(2, 2, strides=2, output_padding=1)), images),
    "transposed 3d": (
        sequence(lambda: L.Reshape((3, 2, 5, 4)), lambda: L.Conv3DTranspose(2, 2, strides=(1, 2, 1))),
        images,
    ),
    "conv 3d": (sequence(lambda: L.Reshape((3, 2, 5, 4)), lambda: L.Conv3D(2, 2, padding="same")), images),
    "group norm": (sequence(lambda: L.GroupNormalization(2)), images),
    "rms norm": (sequence(lambda: L.RMSNormalization(), **TEXT), words),
    "prelu": (sequence(lambda: L.PReLU(shared_axes=[1])), images),
    "scaled": (sequence(Scale), images),
    "changed": (sequence(Changed, **TEXT), words),
    "distributed": (sequence(lambda: L.TimeDistributed(L.Dense(3, "tanh")), **TEXT), words),
    "distributed conv": (
        sequence(lambda: L.Reshape((3, 2, 5, 4)), lambda: L.TimeDistributed(L.Conv2D(2, 2))),
        images,
    ),
    "lstm": (sequence(lambda: L.LSTM(3, return_sequences=True, go_backwards=True), **TEXT), words),
    "gru": (sequence(lambda: L.GRU(3), **TEXT), words),
    "gru before": (sequence(lambda: L.GRU(2, reset_after=False), **TEXT), words),
    "bidirectional": (sequence(lambda: L.Bidirectional(L.SimpleRNN(3)), **TEXT), words),
    "einsum": (
        sequence(lambda: L.EinsumDense("abc,cde->abde", output_shape=(3, 2, 3), bias_axes="e"), **TEXT),
        words,
    ),
    "summed": (sequence(lambda: L.EinsumDense("abc,cd->ad", output_shape=(3,), bias_axes="d"), **TEXT), words),
    "batch norm": (sequence(lambda: L.BatchNormalization()), images),
    "attention": (attention, lambda rng: [rng.normal(size=(3, 3, 4)), rng.normal(size=(3, 4, 6))]),
    "adapted": (sequence(Adapted), images),
    "own": (Own, words),
    "tied": (lambda: Tied("tf"), ids),
    "tied by keras": (lambda: Tied("keras"), ids),
    "tied by einsum": (lambda: Tied("einsum"), ids),
    "subclass": (sequence(lambda: Doubled(3), **TEXT), words),
    "decorated": (Decorated, words),
    "asking in Python": (Asking, words),
}


def shaken(model, rng):
    """Biases, gains and all away from their special values."""
    model.set_weights([w + 0.3 * np.abs(rng.normal(size=w.shape)) for w in model.get_weights()])
    return model


def slopes(model, x, draws):
    """{id of a variable: (draws, batch, *shape)} gradients of sum(f draw), one example at a time."""
    variables = model.trainable_variables

    @tf.function
    def one(x, draw):
        with tf.GradientTape(persistent=True) as tape:
            f = model(x)
        rows = [tape.gradient(f, variables, output_gradients=d) for d in tf.unstack(draw)]
        return [tf.stack([tf.convert_to_tensor(g) for g in grads]) for grads in zip(*rows, strict=True)]

    found = []
    for b in range(draws.shape[1]):
        example = tf.nest.map_structure(lambda t, b=b: tf.constant(t[b : b + 1]), x)
        found.append(one(example, tf.constant(draws[:, b : b + 1])))
    return {id(v): np.stack(g, axis=1) for v, g in zip(variables, zip(*found, strict=True), strict=True)}


def of_part(part, every):
    """Slopes of a part's matrix, (draws, batch, blocks, d_out, d_in)."""
    rows = {role: every[id(v)] for role, v in part.variables.items()}
    first = next(iter(rows.values()))
    return np.stack(
        [
            [part.matrix({role: g[k, b] for role, g in rows.items()}) for b in range(first.shape[1])]
            for k in range(len(first))
        ]
    )


@pytest.mark.parametrize(("make", "inputs"), CASES.values(), ids=CASES)
def test_records_are_the_slopes_of_each_example(make, inputs, rng):
    x = inputs(rng)
    model = make()
    f = np.asarray(model(x))
    shaken(model, rng)
    f = np.asarray(model(x))
    loss = kf.Gaussian()
    plan = kt.coverage(model)
    assert not plan.refused
    covered = {id(v) for part in plan.parts for v in part.variables.values()}
    assert covered == {id(v) for v in model.trainable_variables}
    found = kt.records(model, x, np.zeros_like(f), loss, fisher=kf.type2)
    draws = kf.type2(loss, f)
    every = slopes(model, x, draws)
    for part in plan.parts:
        want = of_part(part, every)
        got = np.moveaxis(np.asarray(found[part.name].examples()), 1, 2)
        assert kf.Block.of(found[part.name]) == plan.blocks()[part.name]
        np.testing.assert_allclose(got, want, atol=1e-10 * max(np.abs(want).max(), 1e-4), rtol=0, err_msg=part.name)


def test_low_rank_adapters_of_keras(rng):
    """Their matrices are read although the kernel under them is frozen; Keras keeps them in float32."""
    layers = [L.Conv2D(3, 2, name="conv"), L.Flatten(), L.Dense(4, "tanh", name="dense"), L.Dense(2, name="out")]
    model = keras.Sequential([keras.Input(IMAGE), *layers])
    for layer in (model.get_layer("conv"), model.get_layer("dense")):
        layer.enable_lora(2)
        layer.lora_kernel_b.assign(rng.normal(size=layer.lora_kernel_b.shape))
    plan = kt.coverage(model, strict=True)
    names = {f"{layer}.lora_kernel_{half}" for layer in ("conv", "dense") for half in "ab"}
    assert names < {part.name for part in plan.parts}
    assert kt.unread(model, rng.normal(size=(3, *IMAGE)), tolerance=1e-6) == {}


def test_low_rank_adapters_of_heads(rng):
    """Of kernels (inputs, heads, outputs), of which the first axis alone is inputs, and (heads, inputs, outputs)."""
    x = keras.Input((4, 6))
    mha = L.MultiHeadAttention(2, 3, value_dim=4, name="mha")
    model = keras.Model(x, L.Dense(2)(mha(x, x[:, 1:])))
    inner = {
        "query": mha.query_dense,
        "key": mha.key_dense,
        "value": mha.value_dense,
        "attention_output": mha.output_dense,
    }
    for layer in inner.values():
        layer.enable_lora(5)
        layer.lora_kernel_b.assign(rng.normal(size=layer.lora_kernel_b.shape))
    plan = kt.coverage(model, strict=True)
    sizes = {part.name: part.block() for part in plan.parts}
    assert sizes["mha.query.lora_kernel_a"] == kf.Block(10, 6)
    assert sizes["mha.query.lora_kernel_b"] == kf.Block(3, 5)
    assert sizes["mha.attention_output.lora_kernel_a"] == kf.Block(5, 8)
    assert kt.unread(model, rng.normal(size=(3, 4, 6)), tolerance=1e-5) == {}
    records = kt.records(model, rng.normal(size=(3, 4, 6)), rng.integers(0, 2, (3, 4)), crossentropy())
    assert records["mha.query.lora_kernel_b"].g.shape[2:] == (3, 8, 3)  # a row a position and head


@pytest.mark.parametrize("tied", [False, True], ids=["words", "tied"])
def test_low_rank_adapters_of_tables(tied, rng):
    """Of words, under a mask where the table is looked up alone, and of positions, that all examples share."""
    words = L.ReversibleEmbedding(9, 4, name="words") if tied else L.Embedding(9, 4, mask_zero=True, name="words")
    places = L.Embedding(5, 4, name="places")
    ids = keras.Input((5,), dtype="int32")
    h = L.Dense(4, "tanh", name="h")(words(ids) + places(keras.ops.arange(5)))
    model = keras.Model(ids, words(h, reverse=True) if tied else L.Dense(3)(L.GlobalAveragePooling1D()(h)))
    for layer in (words, places):
        layer.enable_lora(2)
        layer.lora_embeddings_b.assign(rng.normal(size=layer.lora_embeddings_b.shape))
    plan = kt.coverage(model, strict=True)
    blocks = plan.blocks()
    assert blocks["words.lora_embeddings_a"] == kf.Block(2, 9, diagonal_in=not tied)
    assert blocks["words.lora_embeddings_b"] == kf.Block(4, 2)
    x = rng.integers(1, 9, (3, 5))
    x[1, 3:] = 0
    assert kt.unread(model, x, tolerance=1e-5) == {}
    y = rng.integers(0, 3, x.shape if tied else 3)
    found = kt.records(model, x, y, crossentropy(), fisher=kf.type2)
    draws = kf.type2(kf.SoftmaxCrossEntropy(), np.asarray(model(x)))
    every = slopes(model, x, draws)
    for part in plan.parts:
        want = of_part(part, every)
        got = np.moveaxis(np.asarray(found[part.name].examples()), 1, 2)
        if not part.name.startswith("places"):
            np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max(), rtol=0, err_msg=part.name)
        else:  # one example
            np.testing.assert_allclose(got[:, 0], want.sum(1), atol=2e-6 * np.abs(want).max(), err_msg=part.name)


@pytest.mark.parametrize("name", sorted({*slopes_of.FUNCTIONS, *slopes_of.BINARY}))
def test_slopes_are_those_of_tensorflow(name):
    """Of every function that may change a weight, and of products and sums of it with itself."""
    values = (
        np.array([-1.3, -0.4, 0.3, 0.9, 7.0]) if name not in ("Log", "Log1p", "Sqrt", "Rsqrt") else np.arange(1.0, 6.0)
    )
    other = np.array([0.7, 1.1, -2.0, 0.4, 3.0])
    pairs = [("x", "x"), ("x", "other"), ("other", "x")] if name in slopes_of.BINARY else [("x",)]
    for pair in pairs:

        @tf.function
        def both(x, other, pair=pair):
            given = {"x": x, "other": other}
            names = ("features",) if name in ACTIVATIONS else ("x", "y")
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = getattr(tf.raw_ops, name)(**{n: given[which] for n, which in zip(names, pair, strict=False)})
            factor = slopes_of.Factor(y.op, x, slopes_of.Layout.of((5,)))
            return tf.broadcast_to(factor.slope(), [5]), tape.gradient(y, x)

        found, want = both(tf.constant(values), tf.constant(other))
        np.testing.assert_allclose(found, 0 if want is None else want, rtol=1e-12, atol=1e-14, err_msg=str(pair))


class Leaking(L.Layer):
    """A state of its own, of one example: a bias is added to what is made of it, then to what is made of the input."""

    def __init__(self, kept):
        super().__init__()
        self.kept = kept

    def build(self, shape):
        self.w = self.add_weight(shape=(3, 3), name="w")
        self.b = self.add_weight(shape=(3,), name="b", initializer="ones")
        self.state = tf.Variable(tf.zeros((1, 3), "float64"), trainable=False)

    def call(self, x):
        h = self.state.read_value() if self.kept else tf.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            h = tf.tanh(x[:, t] + tf.sigmoid(h @ self.w + self.b))
        if self.kept:
            self.state.assign(h)
        return h


@pytest.mark.parametrize("make", [Leaking, lambda kept: L.GRU(3, stateful=kept)], ids=["own", "GRU"])
def test_a_state_of_one_example_is_a_row(make, rng):
    """From a state of zeros, kept or not, the step is the same, with the bias's curvature."""
    x, y = rng.normal(size=(1, 4, 3)), np.array([1])
    found = []
    for kept in (False, True):
        keras.utils.set_random_seed(2)
        layer = make(kept)
        net = keras.Sequential([keras.Input(batch_shape=(1, 4, 3)), layer, L.Dense(2)])
        states = [layer.state] if isinstance(layer, Leaking) else [*(layer.states or ())]
        for state in states:  # Keras calls a layer once to build it
            state.assign(tf.zeros_like(state))
        step = kt.Optimizer(net, crossentropy(), keras.optimizers.SGD(1.0), fisher=kf.type2)
        step.step(x, y)
        assert not step.engine.plan.refused
        found.append(np.concatenate([np.ravel(v) for v in net.trainable_variables]))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-9)
