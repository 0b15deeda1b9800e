"""What the TensorFlow adapter will not serve, and the reason it gives, word for word."""

from __future__ import annotations

import runpy
from contextlib import nullcontext

import numpy as np
import pytest

import kfaccore as kf
from tf_shared import L, keras, kt, tf


class Own(L.Layer):
    """A weight and what `how` makes of it."""

    def __init__(self, how, shape=(6,), **options):
        super().__init__(**options)
        self.how = how
        self.shape_of_weight = shape

    def build(self, shape):
        self.w = self.add_weight(shape=self.shape_of_weight, name="w", initializer="normal")

    def call(self, x):
        return self.how(x, self.w)


def sequential(*layers, shape=(6,)):
    return keras.Sequential([keras.Input(shape), *layers])


def own(how, shape=(6,), inputs=(6,)):
    return sequential(Own(how, shape, name="it"), shape=inputs)


def loop(x, w):
    return tf.while_loop(lambda i, y: i < 2, lambda i, y: (i + 1, y * w), [tf.constant(0), x])[1]


def function(x, w):
    return tf.function(lambda x: tf.nn.tanh(tf.nn.tanh(x @ w) @ w))(x)


def rematerialised():
    with keras.RematScope(mode="full"):
        layer = L.Conv1D(3, 2, name="it")
    return sequential(layer, shape=(5, 6))


NOTHING = "which is no product, sum, look-up or convolution"
REFUSED = {
    "squared": (lambda: own(lambda x, w: x @ tf.square(w), (6, 3)), "it: each element of it is changed before MatMul"),
    "thrice": (lambda: own(lambda x, w: x @ (w @ w @ w), (6, 6)), "it: it is multiplied with another parameter"),
    "softmax": (lambda: own(lambda x, w: x * tf.nn.softmax(w)), f"it: it goes into Softmax, {NOTHING}"),
    "sorted": (lambda: own(lambda x, w: x * tf.math.top_k(w, 6).values), f"it: it goes into TopKV2, {NOTHING}"),
    "normed": (lambda: own(lambda x, w: x @ tf.math.l2_normalize(w, 0), (6, 3)), "it: "),
    "joined": (lambda: own(lambda x, w: x @ tf.concat([w, w], 0), (3, 2)), f"it: it goes into ConcatV2, {NOTHING}"),
    "loop": (lambda: own(loop), "it: it runs inside a loop, whose steps leave no outputs to read"),
    "function": (
        lambda: own(function, (6, 6)),
        "it: it runs inside a function of its own, which leaves no outputs to read",
    ),
    "two shapes": (
        lambda: own(lambda x, w: tf.concat([x @ w, x[:, :3] @ tf.reshape(w, (3, 8))], 1), (6, 4)),
        "it: its elements are used in matrices of different shapes",
    ),
    "remat": (rematerialised, "it: it goes into IdentityN"),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_covered_is_named_with_its_reason(make, reason):
    model = make()
    with pytest.raises(ValueError, match="Pass strict=False to give their variables plain gradients") as error:
        kt.coverage(model, strict=True)
    assert reason in str(error.value)
    plan = kt.coverage(model)
    name, _, why = reason.partition(": ")
    assert why in plan.refused[name][1]
    assert f"PLAIN GRADIENT: {why}" in str(plan)
    covered = [v for part in plan.parts for v in part.variables.values()]
    left = [v for variables, _ in plan.refused.values() for v in variables]
    assert {id(v) for v in [*covered, *left]} == {id(v) for v in model.trainable_variables}


def test_what_the_forward_pass_does_not_use_is_no_fault():
    model = own(lambda x, w: x)
    plan = kt.coverage(model, strict=True)
    assert not plan.refused
    assert list(plan.unused) == ["it"]
    assert "UNUSED in the forward pass" in str(plan)


K = keras.losses


class Doubled(K.MeanSquaredError):
    """A loss of one's own, which nobody can know."""

    def call(self, y_true, y_pred):
        return 2 * super().call(y_true, y_pred)


LOSSES = {
    "probabilities": (K.SparseCategoricalCrossentropy(), "end the model linearly and set from_logits=True"),
    "probabilities by name": ("binary_crossentropy", r"loss=keras\.losses\.BinaryCrossentropy\(from_logits=True\)"),
    "none": (K.BinaryCrossentropy(from_logits=True, reduction=None), "has reduction None; need that of one number"),
    "other": (K.KLDivergence(), "has no Fisher here"),
    "huber": (K.Huber(), "has no Fisher here"),
    "function": (lambda y, f: 0.0, "has no Fisher here"),
    "own class": (Doubled(), "of the class Doubled has no Fisher here"),
    "another axis": (K.CategoricalCrossentropy(from_logits=True, axis=1), r"has axis 1; need .* axis=-1: permute"),
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


def test_a_rate_that_changes_under_a_self_tuned_step_is_refused(rng):
    """A callback or assignment changes it once the graph is traced: nothing is updated, and with 1.0 it goes on."""
    x, y = rng.normal(size=(8, 6)), rng.normal(size=(8, 3))
    model = sequential(L.Dense(3))
    step = kt.Optimizer(model, kf.Gaussian(), step=kf.SelfTuning())
    step.step(x, y)
    before, state = model.get_weights(), step.engine.state.step
    step.optimizer.learning_rate.assign(0.1)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"SelfTuning sets its own rate, and the learning rate of"):
        step.step(x, y)
    assert step.engine.state.step == state
    np.testing.assert_array_equal(np.concatenate(model.get_weights(), None), np.concatenate(before, None))
    step.optimizer.learning_rate.assign(1.0)
    step.step(x, y)
    step.optimizer.momentum = 0.5  # Keras reads it when a graph is traced
    with pytest.raises(ValueError, match=r"SelfTuning sets its own rate, and SGD would change it"):
        step.step(x[:5], y[:5])
    wrapped = kt.KFACModel(sequential(L.Dense(3)), step=kf.LineSearch())
    wrapped.compile(keras.optimizers.SGD(1.0), "mse")
    slow = lambda epoch, logs: wrapped.optimizer.learning_rate.assign(0.1 if epoch else 1.0)  # noqa: E731
    slower = keras.callbacks.LambdaCallback(on_epoch_begin=slow)
    with pytest.raises(tf.errors.InvalidArgumentError, match="LineSearch sets its own rate"):
        wrapped.fit(x, y, epochs=3, verbose=0, callbacks=[slower])


@pytest.mark.parametrize("rule", [kf.SelfTuning(), kf.LineSearch()])
def test_constraints_that_would_change_a_judged_step(rule, rng):
    """They are for a step of fixed length; added later, they are refused at the next graph."""
    bound = sequential(L.Dense(3, name="free"), L.Dense(3, kernel_constraint="non_neg", name="bound"))
    with pytest.raises(ValueError, match=r"judges the updates that it made.*constraints of \['.*bound/kernel'\]"):
        kt.Optimizer(bound, kf.Gaussian(), step=rule)
    wrapped = kt.KFACModel(bound, step=rule)
    wrapped.compile(keras.optimizers.SGD(1.0), "mse")
    with pytest.raises(ValueError, match="constraints of"):
        wrapped.train_on_batch(rng.normal(size=(4, 6)), rng.normal(size=(4, 3)))
    kt.Optimizer(bound, kf.Gaussian(), keras.optimizers.SGD(0.1)).step(rng.normal(size=(4, 6)), rng.normal(size=(4, 3)))
    assert min(bound.layers[-1].kernel.numpy().ravel()) >= 0


class Losing(kt.KFACModel):
    """A loss that it computes itself, of Keras's and the prediction."""

    how = staticmethod(lambda loss, f: loss)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return self.how(super().compute_loss(x, y, y_pred, sample_weight, training), y_pred)


COMPUTED = {
    "the same": (lambda loss, f: loss + 0.0 * tf.reduce_sum(f), None),
    "ten times": (lambda loss, f: 10 * loss, r"10 times the loss given to compile.*loss_weights=10 "),
    "another": (lambda loss, f: tf.reduce_mean(f**4), "another loss of the prediction"),
    "and more": (lambda loss, f: loss + 0.1 * tf.reduce_sum(f), "another loss of the prediction"),
}


@pytest.mark.parametrize(("how", "told"), COMPUTED.values(), ids=COMPUTED)
@pytest.mark.parametrize("rule", [kf.Fixed(), kf.SelfTuning()])
def test_a_loss_of_its_own_is_that_of_compile_in_the_prediction(how, told, rule, rng):
    x, y = rng.normal(size=(8, 6)), rng.normal(size=(8, 3))
    found = []
    for kind in (kt.KFACModel, Losing):
        keras.utils.set_random_seed(2)
        model = kind(sequential(L.Dense(4, "tanh"), L.Dense(3)), step=rule)
        model.how = how
        model.compile(keras.optimizers.SGD(1.0), "mse")
        before = np.concatenate(model.get_weights(), None)
        if told is not None and kind is Losing:
            with pytest.raises(tf.errors.InvalidArgumentError, match=f"compute_loss of Losing is {told}"):
                model.train_on_batch(x, y)
            np.testing.assert_array_equal(np.concatenate(model.get_weights(), None), before)
            return
        model.train_on_batch(x, y)
        found.append(np.concatenate(model.get_weights(), None))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6)


def test_a_call_that_is_not_trained_is_refused(rng):
    calling = type("Calling", (kt.KFACModel,), {"call": lambda self, x, training=None, mask=None: 2 * self.inner(x)})
    model = calling(sequential(L.Dense(3)))
    model.compile(keras.optimizers.SGD(1.0), "mse")
    with pytest.raises(ValueError, match="Calling has a call of its own, and what is trained is the inner model"):
        model.train_on_batch(rng.normal(size=(4, 6)), rng.normal(size=(4, 3)))


def test_optimizers_that_would_spoil_directions():
    model = sequential(L.Dense(3))
    with pytest.raises(ValueError, match="LossScaleOptimizer looks for overflow in gradients"):
        kt.Optimizer(model, kf.Gaussian(), keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()))
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"][:1]).scope():
        kt.Optimizer(model, kf.Gaussian())


@pytest.mark.parametrize("scope", [True, False])
def test_a_step_inside_a_strategy_of_one_replica_says_where_to_go(scope, rng):
    x, y = rng.normal(size=(4, 6)), rng.normal(size=(4, 3))
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        step = kt.Optimizer(sequential(L.Dense(3)), kf.Gaussian())
    call = step.step if scope else lambda x, y: strategy.run(step.step, args=(x, y))
    with strategy.scope() if scope else nullcontext(), pytest.raises(ValueError, match=r"call Optimizer\.step outside"):
        call(x, y)
    step.step(x, y)


def test_a_model_with_nothing_to_train_says_so(rng):
    net = sequential(L.Dense(3))
    model = kt.KFACModel(net)
    model.compile("sgd", "mse")
    net.trainable = False
    with pytest.raises(ValueError, match=r"no variable of model .* is trainable now"):
        model.train_on_batch(rng.normal(size=(4, 6)), rng.normal(size=(4, 3)))


def test_models_without_variables_or_with_several_outputs():
    with pytest.raises(ValueError, match="has no variables yet: build it, or call it on a batch, first"):
        kt.coverage(keras.Sequential([L.Dense(3)]))
    x = keras.Input((6,))
    two = keras.Model(x, [L.Dense(3)(x), L.Dense(2)(x)])
    with pytest.raises(ValueError, match=r"need one tensor.*kfaccore\.Joint"):
        kt.records(two, np.ones((4, 6)), np.ones((4, 3)), kf.Gaussian())


@pytest.mark.parametrize(
    ("backend", "instead"),
    [
        ("jax", "use kfaccore_jax.keras_apply(model)"),
        ("torch", "set KERAS_BACKEND=tensorflow, or jax with kfaccore_jax"),
    ],
)
def test_another_backend_of_keras_is_refused(backend, instead, monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: backend)
    with pytest.raises(ImportError, match="kfaccore_tensorflow needs 'tensorflow'") as error:
        runpy.run_path(kt.__file__)
    assert f"; on '{backend}'" in str(error.value)
    assert instead in str(error.value)


def test_a_batch_without_examples_is_refused():
    net = keras.Sequential([keras.Input((4,)), L.Dense(3)])
    with pytest.raises(ValueError, match=r"y holds numbers of Python; need arrays or tensors: give np.asarray\(y\)"):
        kt.Optimizer(net, kf.SoftmaxCrossEntropy()).step(np.zeros((2, 4)), [0, 1])
    with pytest.raises(ValueError, match=r"the batch has inputs of shape \(0, 4\); need at least one example"):
        kt.Optimizer(net, kf.SoftmaxCrossEntropy()).step(np.zeros((0, 4)), np.zeros(0, int))
