"""What the TensorFlow adapter will not serve, and the reason it gives, word for word."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import numpy as np
import pytest

import kfaccore as kf

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")
kt = pytest.importorskip("kfaccore_tensorflow")
L = keras.layers


class Doubled(L.Dense):
    """A Dense whose call is another function."""

    def call(self, inputs, training=None):
        return 2 * super().call(inputs)


class Own(L.Layer):
    """A layer of its own."""

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1],), name="w")

    def call(self, x):
        return x * self.w


def sequential(*layers, shape=(6,)):
    return keras.Sequential([keras.Input(shape), *layers])


def changed(change, *layers, shape=(6,)):
    model = sequential(*layers, shape=shape)
    change(model.layers[0])
    return model


def replaced(layer):
    vars(layer)["call"] = lambda x: x


def frozen_kernel(layer):
    layer.kernel.trainable = False


def quantised(layer, mode="int8"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras's own
        layer.quantize(mode)


def einsum(equation, output, **options):
    return sequential(L.EinsumDense(equation, output_shape=output, name="it", **options), shape=(5, 6))


LOOP = "it runs inside {}, whose steps leave no outputs to read"
REFUSED = {
    "subclass": (
        lambda: sequential(Doubled(3, name="it")),
        "it: Doubled is a subclass of Dense, whose call may compute something else",
    ),
    "lora": (
        lambda: changed(lambda layer: layer.enable_lora(2), L.Dense(3, name="it")),
        "it: Dense has LoRA enabled: its matrix is a frozen kernel plus a product",
    ),
    "lora embedding": (
        lambda: changed(lambda layer: layer.enable_lora(2), L.Embedding(7, 3, name="it")),
        "it: Embedding has LoRA enabled: its matrix is a frozen kernel plus a product",
    ),
    "quantised": (
        lambda: changed(quantised, L.Dense(3, name="it")),
        "it: Dense is quantised to int8",
    ),
    "quantised to four bits": (
        lambda: changed(lambda layer: quantised(layer, "int4"), L.Dense(3, name="it")),
        "it: Dense is quantised to int4",
    ),
    "reversible": (
        lambda: sequential(L.ReversibleEmbedding(7, 3, name="it"), shape=(5,)),
        "it: ReversibleEmbedding is a subclass of Embedding, whose call may compute something else",
    ),
    "batch norm": (
        lambda: sequential(L.BatchNormalization(name="it")),
        "it: BatchNormalization has no row in the table",
    ),
    "group norm": (
        lambda: sequential(L.GroupNormalization(2, name="it")),
        "it: GroupNormalization has no row in the table",
    ),
    "transposed": (
        lambda: sequential(L.Conv2DTranspose(3, 2, name="it"), shape=(4, 4, 2)),
        "it: Conv2DTranspose has no row in the table",
    ),
    "separable": (
        lambda: sequential(L.SeparableConv2D(3, 2, name="it"), shape=(4, 4, 2)),
        "it: SeparableConv2D has no row in the table",
    ),
    "prelu": (lambda: sequential(L.PReLU(name="it")), "it: PReLU has no row in the table"),
    "own": (lambda: sequential(Own(name="it")), "it: Own has no row in the table"),
    "lstm": (lambda: sequential(L.LSTM(3, name="it"), shape=(5, 6)), f"it.lstm_cell: {LOOP.format('LSTM')}"),
    "loop over dense": (
        lambda: sequential(L.TimeDistributed(L.Dense(3, name="inner"), name="it"), shape=(5, 6)),
        f"it.inner: {LOOP.format('TimeDistributed')}",
    ),
    "frozen kernel": (
        lambda: changed(frozen_kernel, L.Dense(3, name="it")),
        "it: the kernel is frozen and another variable is not",
    ),
    "replaced call": (
        lambda: changed(replaced, L.Dense(3, name="it")),
        "it: the call of this Dense was replaced",
    ),
    "remat": (
        lambda: rematerialised(),
        "it: Dense recomputes its outputs in the backward pass",
    ),
    "scaled": (
        lambda: scaled(),
        "it: LayerNormalization with rms_scaling normalises by something else",
    ),
    "axes": (
        lambda: sequential(L.LayerNormalization(axis=1, name="it"), shape=(5, 6)),
        "it: LayerNormalization over axes [1]; need negative ones, counted from the last",
    ),
    "summed axis": (
        lambda: einsum("abc,cd->ad", (4,)),
        "it: in the equation 'abc,cd->ad' an axis of the input is summed without a weight",
    ),
    "shared kernel": (
        lambda: sharing(),
        "a: it shares some variables with another layer, but not all in the same roles",
    ),
}


def sharing():
    model = sequential(L.Dense(6, name="a"), L.Dense(6, name="b"))
    a, b = model.layers
    b._trainable_variables[b._trainable_variables.index(b.kernel)] = a.kernel
    vars(b)["_kernel"] = a.kernel
    return model


def rematerialised():
    with keras.RematScope(mode="full"):
        layer = L.Dense(3, name="it")
    return sequential(layer)


def scaled():
    with pytest.warns(UserWarning, match="rms_scaling"):
        layer = L.LayerNormalization(rms_scaling=True, name="it")
    return sequential(layer)


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_covered_is_named_with_its_reason(make, reason):
    model = make()
    with pytest.raises(ValueError, match="Pass strict=False to give their variables plain gradients") as error:
        kt.coverage(model, strict=True)
    assert reason in str(error.value)
    plan = kt.coverage(model)
    name, _, why = reason.partition(": ")
    assert plan.refused[name][1] == why
    assert f"PLAIN GRADIENT: {why}" in str(plan)
    covered = [v for part in plan.parts for v in part.variables.values()]
    left = [v for variables, _ in plan.refused.values() for v in variables]
    assert {id(v) for v in [*covered, *left]} == {id(v) for v in model.trainable_variables}


K = keras.losses
LOSSES = {
    "probabilities": (K.SparseCategoricalCrossentropy(), "end the model linearly and set from_logits=True"),
    "probabilities by name": ("binary_crossentropy", "need a loss of kfaccore or one of Keras's"),
    "sum": (K.BinaryCrossentropy(from_logits=True, reduction="sum"), "has reduction 'sum'; need 'sum_over_batch_size'"),
    "other": (K.KLDivergence(), "has no Fisher here"),
    "huber": (K.Huber(), "has no Fisher here"),
    "function": (lambda y, f: 0.0, "has no Fisher here"),
}


@pytest.mark.parametrize(("loss", "reason"), LOSSES.values(), ids=LOSSES)
def test_losses_without_a_fisher_are_refused(loss, reason):
    with pytest.raises(ValueError, match=reason):
        kt.objective(loss)


def test_soft_labels_have_no_empirical_fisher():
    smoothed = K.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)
    with pytest.raises(ValueError, match="needs hard labels; sample them: fisher=monte_carlo"):
        kt.objective(smoothed, kf.empirical)
    with pytest.raises(ValueError, match="need one of kfaccore's"):
        kt.objective(kf.Gaussian(), np.mean)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"step": kf.SelfTuning()}, r"SelfTuning sets its own rate, and SGD would change it: use SGD\(1.0\)"),
        ({"step": kf.LineSearch()}, r"LineSearch sets its own rate, and SGD would change it: use SGD\(1.0\)"),
        ({"draws": 0}, "draws is 0; need at least 1"),
    ],
)
def test_settings_that_cannot_be_served(settings, reason):
    with pytest.raises(ValueError, match=reason):
        kt.Optimizer(sequential(L.Dense(3)), kf.Gaussian(), "sgd", **settings)


@pytest.mark.parametrize(
    "optimizer",
    [
        keras.optimizers.Adam(1.0),
        keras.optimizers.SGD(1.0, momentum=0.9),
        keras.optimizers.SGD(1.0, clipnorm=1.0),
        keras.optimizers.SGD(1.0, weight_decay=0.1),
    ],
)
def test_optimizers_that_would_change_a_self_tuned_step(optimizer):
    with pytest.raises(ValueError, match="SelfTuning sets its own rate"):
        kt.Optimizer(sequential(L.Dense(3)), kf.Gaussian(), optimizer, step=kf.SelfTuning())


def test_a_self_tuned_step_wants_all_variables():
    model = sequential(L.BatchNormalization(name="it"), L.Dense(3))
    with (
        pytest.warns(UserWarning, match="keep plain gradients: it: "),
        pytest.raises(ValueError, match="SelfTuning finds no rate for variables that are not covered: it"),
    ):
        kt.Optimizer(model, kf.Gaussian())


def test_optimizers_that_would_spoil_directions():
    model = sequential(L.Dense(3))
    with pytest.raises(ValueError, match="LossScaleOptimizer looks for overflow in gradients"):
        kt.Optimizer(model, kf.Gaussian(), keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()))
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"][:1]).scope():
        kt.Optimizer(model, kf.Gaussian())


def test_models_without_variables_or_with_several_outputs():
    with pytest.raises(ValueError, match="has no variables yet: build it, or call it on a batch, first"):
        kt.coverage(keras.Sequential([L.Dense(3)]))
    x = keras.Input((6,))
    two = keras.Model(x, [L.Dense(3)(x), L.Dense(2)(x)])
    with pytest.raises(ValueError, match="need one tensor"):
        kt.records(two, np.ones((4, 6)), np.ones((4, 3)), kf.Gaussian())


def test_a_layer_must_see_the_batch_first():
    x = keras.Input((5, 6))
    merged = L.Dense(3, name="merged")(keras.ops.reshape(x, (-1, 6)))
    model = keras.Model(x, keras.ops.reshape(merged, (-1, 15)))
    with pytest.raises(ValueError, match="layer 'merged' is called on 20 rows of a batch of 4"):
        kt.records(model, np.ones((4, 5, 6), "f4"), np.ones((4, 15), "f4"), kf.Gaussian())


def test_uses_of_a_variable_outside_its_layer_are_found(rng):
    """Logits by the embedding's own matrix: only its look-up is a call of the layer."""
    ids, words = keras.Input((5,), dtype="int32"), L.Embedding(7, 4, name="words")
    x = L.Dense(4, name="dense")(words(ids))
    tied = keras.Model(ids, L.Lambda(lambda x: x @ tf.transpose(words.embeddings))(x))
    plain = keras.Model(ids, x)
    given = rng.integers(0, 7, (3, 5))
    assert kt.unread(plain, given) == {}
    found = kt.unread(tied, given)
    assert list(found) == ["words"]
    assert found["words"] > 0.1


def test_another_backend_of_keras_is_refused():
    code = "import keras; keras.backend.backend = lambda: 'jax'; import kfaccore_tensorflow"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: Keras runs on 'jax' here; kfaccore_tensorflow needs 'tensorflow'" in done.stderr
    assert "; on 'jax' use kfaccore_jax.keras_apply(model)" in done.stderr
