"""The TensorFlow adapter: records against per-example gradients, the NumPy network and the dense block."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kfaccore as kf
import kfaccore_numpy as kn
from oracle import Chain, block
from tf_shared import SGD, L, keras, kt, tf
from tf_shared import double as double


class Scaled(L.Layer):
    """A block of its own that calls inner layers twice."""

    def __init__(self):
        super().__init__(name="scaled")
        self.inner = L.Dense(6, activation="tanh", name="inner")

    def build(self, shape):
        self.inner.build(shape)

    def call(self, x):
        return self.inner(self.inner(x)) * 0.5


def text():
    """Every kind of sequence layer."""
    ids = keras.Input((5,), dtype="int32")
    x = L.Embedding(7, 6, name="ids")(ids)
    x = x + L.MultiHeadAttention(2, 3, name="mha")(x, x)
    x = L.LayerNormalization(name="norm")(x)
    x = x + Scaled()(x)
    x = L.EinsumDense("...x,xy->...y", output_shape=4, bias_axes="y", activation="tanh", name="ellipsis")(x)
    x = L.EinsumDense("abc,cde->abde", output_shape=(5, 2, 3), bias_axes="e", name="lone")(x)
    x = L.EinsumDense("abde,def->abdf", output_shape=(5, 2, 4), bias_axes="df", name="heads")(x)
    x = L.EinsumDense("abcd,bde->abce", output_shape=(5, 2, 3), name="places")(x)
    x = L.Reshape((5, 6))(x)
    x = L.Conv1D(4, 3, padding="causal", dilation_rate=2, name="causal")(x)
    x = L.DepthwiseConv1D(2, depth_multiplier=2, padding="same", use_bias=False, name="deep")(x)
    x = L.LayerNormalization(axis=[-2, -1], name="both")(x)
    return keras.Model(ids, L.Dense(3, name="out")(L.GlobalAveragePooling1D()(x)))


def images():
    """Every kind of convolution; one called twice, on images of two sizes."""
    image = keras.Input((7, 6, 2))
    same = L.Conv2D(2, (3, 2), padding="same", activation="tanh", name="twice")
    x = same(image)
    y = same(L.MaxPooling2D(2)(x))
    x = L.Conv2D(4, 3, strides=(2, 1), padding="same", activation=L.ReLU(), name="strided")(x)
    x = L.Conv2D(4, (2, 3), groups=2, dilation_rate=(2, 1), name="grouped")(x)
    x = L.DepthwiseConv2D(2, depth_multiplier=3, name="deep")(x)
    x = L.Concatenate()([L.Flatten()(x), L.Flatten()(y)])
    return keras.Model(image, L.Dense(3, name="out")(x))


def categories():
    """One id an example."""
    one = keras.Input((), dtype="int32")
    return keras.Model(one, L.Dense(3, name="out")(L.Embedding(7, 4, name="ids")(one)))


NETS = {
    "categories": (categories, lambda rng: rng.integers(0, 7, 5)),
    "text": (text, lambda rng: rng.integers(0, 7, (4, 5))),
    "images": (images, lambda rng: rng.normal(size=(4, 7, 6, 2))),
}
nets = pytest.mark.parametrize(("make", "inputs"), NETS.values(), ids=NETS)


def shaken(model, rng):
    """Biases, gains and all away from their special values."""
    model.set_weights([w + 0.3 * rng.normal(size=w.shape) for w in model.get_weights()])
    return model


def per_example(model, x, draws):
    """{id of a variable: (draws, batch, *shape)} gradients of sum(f draw), one example at a time."""
    variables = model.trainable_variables

    @tf.function
    def one(x, draw):
        with tf.GradientTape(persistent=True) as tape:
            f = model(x)
        rows = [tape.gradient(f, variables, output_gradients=d) for d in tf.unstack(draw)]
        return [tf.stack([tf.convert_to_tensor(g) for g in grads]) for grads in zip(*rows, strict=True)]

    found = [one(tf.constant(x[b : b + 1]), tf.constant(draws[:, b : b + 1])) for b in range(len(x))]
    return {id(v): np.stack(g, axis=1) for v, g in zip(variables, zip(*found, strict=True), strict=True)}


@nets
def test_records_give_per_example_gradients(make, inputs, rng):
    model, x = shaken(make(), rng), inputs(rng)
    f = model(x).numpy()
    y = rng.normal(size=f.shape)
    plan = kt.coverage(model)
    assert not plan.refused
    covered = [v for part in plan.parts for v in part.variables.values()]
    assert {id(v) for v in covered} == {id(v) for v in model.trainable_variables}
    found = kt.records(model, x, y, kf.Gaussian(), fisher=kf.type2)
    draws = kf.type2(kf.Gaussian(), f)
    every = per_example(model, x, draws)
    for part in plan.parts:
        record, want = found[part.name], {role: every[id(v)] for role, v in part.variables.items()}
        assert kf.Block.of(record) == plan.blocks()[part.name]
        J = record.examples()
        for v in range(len(draws)):
            for b in range(len(x)):
                for role, got in part.arrays(J[v, :, b]).items():
                    error = np.abs(got - want[role][v, b]).max()
                    assert error <= 1e-10 * max(np.abs(want[role]).max(), 1e-4), (part.name, role)


@nets
def test_the_matrix_of_a_part_goes_there_and_back(make, inputs, rng):
    plan = kt.coverage(make())
    for part in plan.parts:
        arrays = {role: rng.normal(size=v.shape) for role, v in part.variables.items()}
        back = part.arrays(part.matrix(arrays))
        assert all(np.array_equal(back[role], arrays[role]) for role in arrays), part.name


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_channels_first_is_channels_last_turned(padding, rng):
    from kfaccore_tensorflow.kinds import Convolution

    window = kf.Window((2, 3), (1, 2))
    last, first = (Convolution(window, padding, 2, turned) for turned in (False, True))
    x = rng.normal(size=(3, 5, 6, 4))
    gy = rng.normal(size=(2, 3, *last._padded((5, 6)).outputs((5, 6)), 6))
    turned = first.rows(np.moveaxis(x, -1, 1), np.moveaxis(gy, -1, 2), True)
    plain = last.rows(x, gy, True)
    assert np.array_equal(turned.a.unfold(), plain.a.unfold())
    assert np.array_equal(turned.g, plain.g)


@pytest.mark.parametrize(
    ("equation", "reason"),
    [
        ("abb,bc->ac", "repeats an axis"),
        ("ab,bc->c", "contracts the batch axis"),
        ("ab,bcd->ad", "sums the weight over an axis"),
    ],
)
def test_equations_that_are_not_a_matrix_a_block(equation, reason):
    from kfaccore_tensorflow.terms import einsum_terms

    ranks = tuple(len(term) for term in equation.split("->")[0].split(","))
    assert einsum_terms(equation, ranks, 1).refusal() == reason


def test_layouts_follow_views_and_find_the_elements_again(rng):
    from kfaccore_tensorflow.layout import Layout

    x = np.arange(120.0).reshape(2, 3, 4, 5)
    layout = Layout.of(x.shape).transposed((1, 0, 2, 3)).reshaped((3, 1, 2, 20)).sliced(3, 4, 5, 3).flipped(0)
    want = x.transpose(1, 0, 2, 3).reshape(3, 1, 2, 20)[::-1, :, :, 4:19:3]
    assert np.array_equal(layout.take(x), want)
    back = np.zeros_like(x)
    layout.put(back, want)
    assert np.array_equal(layout.take(back), want)
    assert np.count_nonzero(back) == want.size
    with pytest.raises(ValueError, match="not neighbours"):
        Layout.of((2, 3)).transposed((1, 0)).reshaped((6,))


def test_empirical_records_add_up_to_the_gradient(rng):
    model, x, y = shaken(text(), rng), rng.integers(0, 7, (4, 5)), rng.integers(0, 3, 4)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    found = kt.records(model, x, y, loss, fisher=kf.empirical)
    with tf.GradientTape() as tape:
        value = loss(y, model(x))
    grads = dict(zip(map(id, model.trainable_variables), tape.gradient(value, model.trainable_variables), strict=True))
    for part in kt.coverage(model).parts:
        record = found[part.name]
        summed = part.arrays(record.examples()[0].sum(1) / record.n)
        for role, v in part.variables.items():
            np.testing.assert_allclose(summed[role], kt.to_numpy(grads[id(v)]), rtol=1e-9, atol=1e-13)


def test_attention_is_covered_through_its_inner_layers():
    names = {part.name for part in kt.coverage(text()).parts}
    assert {f"mha.{inner}" for inner in ("query", "key", "value", "attention_output")} <= names
    assert "scaled.inner" in names
    assert "places" in str(kt.coverage(text()))


NUMPY = {
    "dense": (
        kn.Sequential((5,), (kn.Dense(4), kn.Tanh(), kn.Dense(3), kn.Sigmoid(), kn.Dense(3))),
        lambda: [keras.Input((5,)), L.Dense(4, "tanh"), L.Dense(3, "sigmoid"), L.Dense(3)],
    ),
    "cnn": (
        kn.Sequential(
            (6, 6, 2),
            (
                kn.Conv2d(3, kf.Window((3, 3), padding=1)),
                kn.Tanh(),
                kn.Conv2d(2, kf.Window((2, 3), stride=2)),
                kn.Sigmoid(),
                kn.Flatten(),
                kn.Dense(3),
            ),
        ),
        lambda: [
            keras.Input((6, 6, 2)),
            L.Conv2D(3, 3, padding="same", activation="tanh"),
            L.Conv2D(2, (2, 3), strides=2, activation="sigmoid"),
            L.Flatten(),
            L.Dense(3),
        ],
    ),
}


@pytest.mark.parametrize("method", [kf.KFAC(), kf.EKFAC()], ids=["kfac", "ekfac"])
@pytest.mark.parametrize(("net", "layers"), NUMPY.values(), ids=NUMPY)
def test_records_and_steps_are_those_of_the_numpy_network(net, layers, method, rng):
    params, x, y = net.init(rng, np.asarray), rng.normal(size=(24, *net.inputs)), rng.integers(0, 3, 24)
    model = keras.Sequential(layers())
    plan = kt.coverage(model)
    for part, W in zip(plan.parts, params.values(), strict=True):
        for role, value in part.arrays(W).items():
            part.variables[role].assign(value)
    loss = kf.SoftmaxCrossEntropy()
    f, tape = net.forward(params, x)
    batch = kn.train.Batch(f, y, loss)
    g = kn.sampled(net, params, tape, batch, None, np.random.default_rng([5, 0]))
    found = kt.records(model, x, y, loss, seed=5)
    wanted = net.records(tape, g, 24.0)
    for got, name in zip(found.values(), params, strict=True):
        want = wanted[name]
        np.testing.assert_allclose(got.rows(), want.rows(), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(got.g, want.g, rtol=1e-10, atol=1e-12)
    clocks, schedules = kf.Clocks(2, 3), kf.Schedules(0.01, 0.9)
    pre = kf.Preconditioner(method, clocks, schedules, step=kf.Fixed(0.1))
    ours = kt.Optimizer(model, loss, SGD(0.1), method=method, clocks=clocks, schedules=schedules, seed=5)
    state = pre.init(net.blocks(), x)
    for i in range(5):
        value, state, _ = kn.step(net, params, (x, y), loss, pre, state, i, np.random.default_rng([5, i]))
        np.testing.assert_allclose(ours.step(x, y), value, rtol=1e-10)
    for part, W in zip(plan.parts, params.values(), strict=True):
        got = part.matrix({role: v.numpy() for role, v in part.variables.items()})
        np.testing.assert_allclose(got.reshape(W.shape), W, rtol=1e-10, atol=1e-12)


def test_deep_linear_nets_give_the_dense_type_2_block(rng):
    """K-FAC's block is F itself in a deep linear net with squared error, through the whole path."""
    net, damping = Chain((4, 3, 3, 2)), 0.1
    weights = net.init(rng)
    model = keras.Sequential([keras.Input((4,)), *(L.Dense(size, use_bias=False) for size in net.sizes[1:])])
    model.set_weights([W.T for W in weights])
    x, y = rng.normal(size=(6, 1, 4)), rng.normal(size=(6, 2))
    method = kf.KFAC(inverse=kf.eigh, split=kf.exact)
    options = {"method": method, "schedules": kf.Schedules(damping, 0.0), "fisher": kf.type2}
    ours = kt.Optimizer(model, kf.Gaussian(), SGD(1.0), **options)
    ours.step(x[:, 0], y)
    curvature = np.broadcast_to(np.eye(2), (6, 2, 2))
    f, _, _ = net.run(weights, x)
    grads = net.backward(weights, x, (f - y[:, None])[None])
    _, inputs, _ = net.run(weights, x)
    for layer, W in enumerate(weights):
        F = block(net, weights, x, layer, curvature, 1 / 6)
        state = ours.engine.state.layers[list(ours.engine.state.layers)[layer]]
        np.testing.assert_allclose(np.kron(state.G[0], state.A[0]), F, atol=1e-10 * np.abs(F).max())
        gradient = np.einsum("bso,bsi->oi", grads[layer][0], inputs[layer]) / 6
        want = np.linalg.solve(F + damping * np.eye(len(F)), gradient.ravel()).reshape(W.shape)
        np.testing.assert_allclose(W - model.trainable_variables[layer].numpy().T, want, rtol=1e-9, atol=1e-11)


LOSSES = {
    "sparse": (lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True), (5, 3), "labels"),
    "sequence": (lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True), (5, 2, 3), "labels"),
    "ignoring": (
        lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=1),
        (5, 2, 3),
        "labels",
    ),
    "categorical": (lambda: keras.losses.CategoricalCrossentropy(from_logits=True), (5, 3), "onehot"),
    "binary": (lambda: keras.losses.BinaryCrossentropy(from_logits=True), (5, 3), "binary"),
    "mse": (keras.losses.MeanSquaredError, (5, 2, 3), "real"),
    "mse of positions": (keras.losses.MeanSquaredError, (5, 2, 1), "flat"),
}
LOSSES |= {
    f"{name}, {reduction}": (lambda make=make, reduction=reduction: reduced(make(), reduction), shape, kind)
    for name, (make, shape, kind) in LOSSES.items()
    for reduction in ("sum", "mean_with_sample_weight")
}


def reduced(loss, reduction):
    loss.reduction = reduction
    return loss


def target(kind, shape, rng):
    labels = rng.integers(0, 3, shape[:-1])
    return {
        "labels": labels,
        "onehot": np.eye(3)[labels],
        "binary": rng.integers(0, 2, shape).astype(float),
        "real": rng.normal(size=shape),
        "flat": rng.normal(size=shape[:-1]),
    }[kind]


@pytest.mark.parametrize("use_weights", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize(("make", "shape", "kind"), LOSSES.values(), ids=LOSSES)
def test_type_2_draws_over_n_are_the_hessian_of_the_keras_loss(make, shape, kind, use_weights, rng):
    loss, f, y = make(), rng.normal(size=shape), target(kind, shape, rng)
    w = rng.uniform(0.5, 2, shape[:1] if kind == "flat" else shape[:-1]) if use_weights else None
    ours = kt.objective(loss)
    draws = ours.draws(kf.type2, 1, f, y, w, None).reshape(-1, f.size // 5 * 5)
    draws = np.stack([d * e for d in draws for e in np.repeat(np.eye(5), f.size // 5, axis=1)])
    flat = tf.Variable(f)
    with tf.GradientTape() as outer:
        with tf.GradientTape() as inner:
            value = ours.value(tf.constant(y), flat, w)
        first = inner.gradient(value, flat)
    H = outer.jacobian(first, flat).numpy().reshape(f.size, f.size)
    np.testing.assert_allclose(draws.T @ draws / ours.share(f, y, None, w), H, atol=1e-12)
    if w is None and kind != "onehot":
        g = ours.draws(kf.empirical, 1, f, y, None, None)[0]
        np.testing.assert_allclose(g / ours.share(f, y, None, None), first.numpy(), atol=1e-10)


@pytest.mark.parametrize("loss", [kf.SoftmaxCrossEntropy(), kf.Bernoulli(), kf.Gaussian()])
def test_losses_of_the_core_are_differentiated(loss, rng):
    f = rng.normal(size=(5, 3))
    y = rng.integers(0, 2, 5) if isinstance(loss, kf.SoftmaxCrossEntropy) else rng.integers(0, 2, (5, 3)) * 1.0
    ours, x = kt.objective(loss), tf.constant(f)
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = 3 * ours.value(y, x, None)
    np.testing.assert_allclose(value, 3 * loss.value(f, y) / 5, rtol=1e-12)
    np.testing.assert_allclose(tape.gradient(value, x), 3 * loss.gradient(f, y) / 5, rtol=1e-12)


@given(st.integers(0, 70), st.integers(1, 3), st.booleans(), st.sampled_from(["f4", "f8", "i4", "i8", "?"]))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_what_crosses_the_bridge_is_copied_in_and_viewed_out(offset, stride, turned, dtype):
    values = (np.arange(24) % 5).astype(dtype)
    lead = bytes(offset)
    x = np.frombuffer(lead + values.tobytes(), dtype, 24, offset).reshape(6, 4)[::stride]
    x = x.T[::-1] if turned else x
    there = kt.to_tensor(x)
    back = kt.to_numpy(there)
    assert np.array_equal(back, x)
    assert back.dtype == x.dtype
    assert not back.flags.writeable
    assert not np.shares_memory(back, x)
    assert np.array_equal(kt.to_numpy(there + tf.zeros_like(there) if dtype != "?" else there), x)


def test_the_bridge_keeps_no_hold_on_what_came_in():
    for size in (3, 16, 4096):
        x = np.ones(size)
        there = kt.to_tensor(x)
        x[:] = 7
        assert np.all(there.numpy() == 1)
        assert np.shares_memory(kt.to_numpy(there), kt.to_numpy(there))


def test_half_precision_is_widened_and_slices_made_dense():
    assert kt.to_numpy(tf.ones(3, tf.bfloat16)).dtype == np.float32
    assert kt.to_numpy(tf.ones(3, tf.float16)).dtype == np.float32
    slices = tf.IndexedSlices(tf.ones((2, 3)), tf.constant([1, 1]), tf.constant([4, 3]))
    np.testing.assert_array_equal(kt.to_numpy(slices), [[0] * 3, [2] * 3, [0] * 3, [0] * 3])


def test_tensorflow_still_aborts_on_unaligned_memory():
    """Why the bridge copies; when this fails, TensorFlow has mended it."""
    code = """
import numpy as np, tensorflow as tf
x = np.zeros(64, 'f4'); x = x[(-x.ctypes.data // 4) % 16 + 1:][:8]
(tf.experimental.dlpack.from_dlpack(x.__dlpack__()) + 1).numpy()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode < 0
