"""Keras 3 on its JAX backend: models as functions of their variables by path, and what cannot be one."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

import kfaccore as kf
from jax_checks import close, examples, reference
from jax_models import FAST, normal
from jax_needed import jax, jnp, kj


@pytest.fixture(scope="module")
def keras():
    """Keras on JAX with true float64: its own promotion rules compute norms and means of it in float32."""
    if "keras" not in sys.modules:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KERAS_BACKEND", "jax")
            pytest.importorskip("keras")
    import keras
    from keras.src.backend.common import dtypes

    if keras.backend.backend() != "jax":
        pytest.skip(f"Keras runs on {keras.backend.backend()} in this process")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dtypes, "BIT64_TO_BIT32_DTYPE", {})
        keras.config.set_floatx("float64")
        yield keras
        keras.config.set_floatx("float32")


def filled(model):
    """The model with no variable zero."""
    rng = np.random.default_rng(5)
    for v in model.trainable_variables:
        v.assign(rng.normal(size=v.shape) / np.sqrt(max(v.shape[:-1], default=4)) + (len(v.shape) < 2))
    return model


def tokens():
    return jnp.asarray(np.random.default_rng(3).integers(0, 7, (3, 5)))


def transformer(keras, dropout=0.1):
    """Without dropout Keras takes JAX's own attention, which computes in float32."""
    L, ids = keras.layers, keras.Input((5,), dtype="int32")
    x = L.Embedding(7, 4)(ids)
    y = L.LayerNormalization()(x)
    x = x + L.MultiHeadAttention(2, 3, dropout=dropout)(y, y)
    y = L.EinsumDense("abc,cd->abd", output_shape=(None, 6), bias_axes="d", activation="gelu")(L.RMSNormalization()(x))
    x = x + L.EinsumDense("...c,cd->...d", output_shape=4)(y)
    return keras.Model(ids, L.Dense(3)(L.GlobalAveragePooling1D()(x))), tokens()


def convolutional(keras):
    L = keras.layers
    layers = [
        L.Conv2D(4, 3, strides=2, padding="same", activation="relu"),
        L.Conv2D(6, 2, groups=2, dilation_rate=(1, 2), padding="same"),
        L.GroupNormalization(3),
        L.DepthwiseConv2D(2, depth_multiplier=2, padding="same", activation="gelu"),
        L.SeparableConv2D(3, 2),
        L.Flatten(),
        L.Dense(3),
    ]
    return keras.Sequential([keras.Input((5, 5, 2)), *layers]), normal((3, 5, 5, 2), seed=2)


def subclassed(keras):
    class Net(keras.Model):
        def __init__(self):
            super().__init__(name="net")
            self.table, self.dense = keras.layers.Embedding(7, 1), keras.layers.Dense(4, activation="tanh")

        def call(self, given):
            ids, x = given
            for _ in range(3):
                x = self.dense(x)
            return x + keras.ops.sum(self.table(ids), 1)

    model, given = Net(), [tokens(), normal((3, 4), seed=2)]
    model(given)
    return model, given


MODELS = {
    transformer: "dense dense embedding scale bias scale dense dense dense dense dense",
    convolutional: "conv conv scale bias conv conv conv dense",
    subclassed: "embedding dense",
}


def compared(apply, params, x, plan):
    """(prediction, examples from records, examples by vmap(grad), mean gradient) for the same two draws."""

    @partial(jax.jit, compiler_options=FAST)
    def run(params, x):
        captured = kj.capture(plan, params, x)
        draws = jnp.asarray(np.random.default_rng(7).normal(size=(2, *captured.prediction.shape)))
        n = draws.shape[1]
        got, mean = examples(plan, params, captured.records(draws, n)), captured.gradients(draws[0] / n)
        return captured.prediction, got, reference(apply, params, draws, x), mean

    return run(params, x)


def summed(plan, params, x, state):
    """(gradient of one draw from records, summed over their rows; by autograd; aux), leaf by leaf."""

    @partial(jax.jit, compiler_options=FAST)
    def run(params, x, state):
        captured = kj.capture(plan, params, x, state)
        draws = jnp.asarray(np.random.default_rng(7).normal(size=(1, *captured.prediction.shape)))
        records = captured.records(draws, x.shape[0], fisher=kf.monte_carlo)  # told so, shared rows get no signs
        totals = plan.tree(params, {name: record.examples()[:, 0].sum(1) for name, record in records.items()})
        return totals, captured.gradients(draws[0]), captured.aux

    totals, gradients, aux = run(params, x, state)
    measured = {part.leaf for layer in plan.layers for part in layer.parts}
    return {k: v for k, v in totals.items() if k in measured}, gradients, aux


@pytest.mark.parametrize("make", MODELS)
def test_examples_from_records_are_those_of_vmap_grad(keras, make):
    model, x = make(keras)
    apply, params = kj.keras_apply(filled(model), training=False)
    assert list(params) == [v.path for v in model.trainable_variables]
    plan = kj.plan(apply, params, x, strict=True)
    assert sorted(layer.kind for layer in plan.layers) == sorted(MODELS[make].split())
    prediction, got, want, mean = compared(apply, params, x, plan)
    close(prediction, jax.jit(lambda x: model(x, training=False))(x), 1e-12)
    close(got, want)
    close(jax.tree.map(lambda j: j[0].mean(0), want), mean)


def test_attention_by_jax_itself_is_covered(keras):
    model, x = transformer(keras, 0.0)
    apply, params = kj.keras_apply(filled(model))
    plan = kj.plan(apply, params, x, strict=True)
    _, got, want, _ = compared(apply, params, x, plan)
    close(got, want, 1e-5)


def test_recurrent_layers(keras):
    layers = [keras.layers.LSTM(3, return_sequences=True), keras.layers.GRU(3), keras.layers.Dense(2)]
    model, x = filled(keras.Sequential([keras.Input((4, 5)), *layers])), normal((3, 4, 5), seed=2)
    apply, params = kj.keras_apply(model)
    _, got, want, _ = compared(apply, params, x, kj.plan(apply, params, x, strict=True))
    close(got, want)


def noisy(keras):
    L = keras.layers
    layers = [
        L.Dense(5, activation="tanh", name="first"),
        L.BatchNormalization(name="norm"),
        L.Dropout(0.3),
        L.Dense(2),
    ]
    return filled(keras.Sequential([keras.Input((4,)), *layers], name="noisy")), 1 + normal((6, 4), seed=2)


def test_state_is_handed_through(keras):
    model, x = noisy(keras)
    apply, params, state = kj.keras_stateful(model)
    plan = kj.plan(apply, params, x, state, has_aux=True)
    refused = {row.leaf: row.reason for row in plan.table if row.reason}
    # Keras adds beta - mean * gamma / deviation, and multiplies rows by gamma / deviation
    assert refused == {"noisy/norm/gamma": "goes into: scale on rows of examples and on rows that all of them share"}
    assert not [layer.name for layer in plan.layers if layer.common]
    got, mean, after = summed(plan, params, x, state)
    close(got, {k: g for k, g in mean.items() if k not in refused})
    hidden = jnp.tanh(x @ params["noisy/first/kernel"] + params["noisy/first/bias"])
    np.testing.assert_allclose(after["noisy/norm/moving_mean"], 0.01 * hidden.mean(0), rtol=1e-10)
    seed = next(path for path in state if "seed" in path)
    assert not np.array_equal(after[seed], state[seed])
    other = apply(params, x, state | {seed: after[seed]})[0]
    assert not np.array_equal(other, apply(params, x, state)[0])

    with pytest.raises(ValueError, match=r"noisy moves \['noisy/norm/moving_mean', .*seed.* use keras_stateful"):
        kj.plan(kj.keras_apply(model)[0], params, x)
    still, _ = kj.keras_apply(model, training=False)
    close(still(params, x), model(x), 1e-12)
    kj.keras_assign(model, params | after)
    np.testing.assert_array_equal(model.layers[1].moving_mean, after["noisy/norm/moving_mean"])


def test_frozen_layers_are_no_parameters(keras):
    model, x = filled(dense(keras)), normal((6, 4), seed=2)
    want = model(x)
    model.layers[0].trainable = False
    apply, params = kj.keras_apply(model)
    assert list(params) == ["plain/last/kernel", "plain/last/bias"]
    close(kj.capture(kj.plan(apply, params, x, strict=True), params, x).prediction, want, 1e-12)


def dense(keras, **options):
    L = keras.layers
    layers = [L.Dense(5, activation="tanh", name="first", **options), L.Dense(2, name="last")]
    return keras.Sequential([keras.Input((4,)), *layers], name="plain")


def test_a_donated_step_leaves_the_model_its_own(keras):
    model, x, y = filled(dense(keras)), normal((6, 4), seed=2), normal((6, 2), seed=3)
    apply, params = kj.keras_apply(model)
    plan, loss, before = kj.plan(apply, params, x), kf.Gaussian(), model(x)
    tx = kj.kfac(plan, kf.KFAC(), schedules=kf.Schedules(damping=0.3))

    @partial(jax.jit, donate_argnums=(0, 1), compiler_options=FAST)
    def step(params, state, x, y):
        captured = kj.capture(plan, params, x)
        f = captured.prediction
        grads = captured.gradients(loss.gradient(f, y) / 6)
        moves, state = tx.update(grads, state, records=captured.records(kf.type2(loss, f), 6.0))
        return {k: p - 0.5 * moves[k] for k, p in params.items()}, state, loss.value(f, y)

    state, losses = tx.init(params), []
    for _ in range(8):
        params, state, value = step(params, state, x, y)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
    np.testing.assert_array_equal(model(x), before)
    kj.keras_assign(model, params)
    close(model(x), apply(params, x), 1e-12)


def test_refusals_say_what_to_do(keras, monkeypatch):
    x = normal((6, 4), seed=2)
    with pytest.raises(ValueError, match="net has no variables yet; give it an Input, or call it on a batch"):
        kj.keras_apply(keras.Sequential([keras.layers.Dense(2)], name="net"))
    apply, params = kj.keras_apply(dense(keras, kernel_regularizer="l2"))
    with pytest.raises(ValueError, match=r"plain adds 1 penalties; take them out, Schedules\(l2=\.\.\.\) is one"):
        kj.plan(apply, params, x)
    with pytest.raises(ValueError, match=r"plain has no variables \['kernel'\]"):
        kj.keras_assign(dense(keras), {"kernel": x})
    twice = type("Twice", (keras.Model,), {"call": lambda self, x: self.b(self.a(x))})(name="twice")
    twice.a, twice.b = (keras.layers.Dense(4, name="same") for _ in range(2))
    twice(x)
    with pytest.raises(ValueError, match=r"several variables have the path \['twice/same/bias', 'twice/same/kernel'\]"):
        kj.keras_apply(twice)
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with pytest.raises(ValueError, match="Keras runs on 'torch'; set KERAS_BACKEND=jax before keras is imported"):
        kj.keras_apply(dense(keras))


def test_the_example_trains_without_tensorflow(keras):
    code = "import sys, jax; jax.config.update('jax_disable_most_optimizations', True)\n"
    code += "from kfaccore_jax.examples import keras_jax; f = keras_jax.main(12); print(f[-1] / f[0])\n"
    code += "assert 'tensorflow' not in sys.modules"
    env = {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.split()[-1]) < 0.7
